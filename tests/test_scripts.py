"""Entry points: each has main(), explains itself, refuses what it doesn't know, and does nothing when imported."""

import ast
import importlib
import os
import re
import signal
import sys
from functools import partial

import pytest

from nanozhchat import cli
from tests.conftest import ROOT, pack, program, refused

SCRIPTS = sorted(p.stem for p in (ROOT / "scripts").glob("*.py") if p.stem != "__init__")


def run(name, *argv, monkeypatch):
    """Run a script as `python -m scripts.<name>` would; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [f"scripts/{name}.py", *argv])
    return refused(None, cli.run, importlib.import_module(f"scripts.{name}").main, error=SystemExit).code


def test_a_python_without_the_packages_is_told_how_to_get_them_in_one_line():
    alone = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(ROOT)!r}); import scripts.chat_cli"]
    done = program(alone)
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
def test_an_unknown_key_in_a_config_file_exits_with_2_and_its_name(name, monkeypatch, capsys, base_dir):
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
    assert [text for text in others if not text.startswith(("if TYPE_CHECKING:", "cli.check(__name__, "))] == []


def test_ctrl_c_while_torch_is_imported_ends_the_command_without_a_traceback(tmp_path):
    stand_in = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)"
    pack(tmp_path / "torch" / "__init__.py", stand_in)
    env, listen = {**os.environ, "PYTHONPATH": str(tmp_path)}, partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    done = program([sys.executable, "-m", "scripts.chat_eval"], env=env, preexec_fn=listen)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_unknown_flag_exits_with_2_and_one_line_before_torch_is_loaded_or_a_folder_made(name, base_dir):
    done = program([sys.executable, "-X", "importtime", "-m", f"scripts.{name}", "--bogus=1"])
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert (done.returncode, done.stdout, [line[:7] for line in said]) == (2, "", ["error: "])
    assert (re.findall(r"\| +torch\n", done.stderr), base_dir.exists()) == ([], False)
