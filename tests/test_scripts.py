"""Entry points: each has main(), explains itself, refuses what it doesn't know, and does nothing when imported."""

import ast
import importlib
import os
import re
import signal
import subprocess
import sys

import pytest

from nanozhchat import cli
from tests.conftest import ROOT, pack, refused

SCRIPTS = sorted(p.stem for p in (ROOT / "scripts").glob("*.py") if p.stem != "__init__")


def run(name, *argv, monkeypatch):
    """Run a script as `python -m scripts.<name>` would; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [f"scripts/{name}.py", *argv])
    return refused(None, cli.run, importlib.import_module(f"scripts.{name}").main, error=SystemExit).code


def test_a_python_without_the_packages_is_told_how_to_get_them_in_one_line():
    alone = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(ROOT)!r}); import scripts.chat_cli"]
    done = subprocess.run(alone, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "bash runs/setup.sh" in done.stderr
    assert "source .venv/bin/activate" in done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_exits_with_0_and_shows_every_flag_with_its_default(name, monkeypatch, capsys, base_dir):
    assert run(name, "--help", monkeypatch=monkeypatch) in (0, None)
    out, err = capsys.readouterr()
    assert (err, out.startswith("usage: "), f"scripts.{name}" in out) == ("", True, True)
    flags, common = out.split("\ncommon:")
    entries = re.split(r"\n  (?=-)", flags)[1:]
    assert entries
    assert [e for e in entries if "(default:" not in " ".join(e.split())] == []
    assert [flag for flag in ("--config", "--debug") if flag not in common] == []
    assert not base_dir.exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_unknown_flag_or_key_in_a_config_file_exits_with_2_and_one_line(
    name, monkeypatch, capsys, tmp_path, base_dir
):
    assert run(name, "--bogus=1", monkeypatch=monkeypatch) == 2
    out, err = capsys.readouterr()
    assert (out, err.startswith("error: "), err.count("\n")) == ("", True, 1)
    flags = [*(["list"] if name == "ckpt" else []), f"--config={pack(base_dir.parent / 'c.yaml', 'bogus: 1')}"]
    assert run(name, *flags, monkeypatch=monkeypatch) == 2
    assert "unknown key 'bogus'" in capsys.readouterr().err
    assert not base_dir.exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_defines_main_and_runs_it_only_when_started(name):
    tree = ast.parse((ROOT / "scripts" / f"{name}.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    mains = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"]
    assert len(mains) == 1
    assert ast.unparse(mains[0].args) == "argv: Sequence[str] | None=None"
    assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    cli.run(main)"
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    others = [ast.unparse(n) for n in tree.body[1:-1] if not isinstance(n, allowed)]
    early = ("if TYPE_CHECKING:", "cli.check(__name__, ")
    assert [text for text in others if not text.startswith(early)] == []


def test_ctrl_c_while_torch_is_imported_ends_the_command_without_a_traceback(tmp_path):
    pack(
        tmp_path / "torch" / "__init__.py",
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)",
    )
    command = [sys.executable, "-m", "scripts.chat_eval"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_slip_in_a_flag_is_answered_before_torch_is_loaded(name):
    command = [sys.executable, "-X", "importtime", "-m", f"scripts.{name}", "--bogus=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, "\nerror: " in done.stderr) == (2, True)
    assert re.findall(r"\| +torch\n", done.stderr) == []
