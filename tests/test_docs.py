"""README and guides: every command takes its flags, chains are run dry, Python blocks run, tables are as printed."""

import importlib
import json
import re
import shlex

import pytest

from tests.conftest import ROOT
from tests.fakes import LiveServer, real_chat
from tests.test_runs import dry_run, take_flags

PAGES = [*ROOT.glob("README*.md"), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "docs" / "colab.ipynb"]
QUICK = ("scripts.recipe", "scripts.gen_identity")  # run for real, not only their flags
ELSEWHERE = ("source", "uv", "sbatch", "docker", "git", "tensorboard")  # programs that are not ours
NAMES = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(page, language):
    if page.suffix == ".ipynb":  # lines of its cells that begin with ! go to the shell
        cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
        lines = [line.rstrip() for cell in cells if cell["cell_type"] == "code" for line in cell["source"]]
        return ["\n".join(line[1:] for line in lines if line.startswith("!"))] if language == "bash" else []
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page):
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@NAMES
def test_every_command_is_one_of_ours_with_flags_it_takes(page, tmp_path, base_dir, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i, words in enumerate(commands(page)):
        knobs = dict(re.findall(r"^(\w+)=(.*)$", word)[0] for word in words if re.match(r"[A-Z_]+=", word))
        first, *rest = words[len(knobs) :]
        if first == "bash" and rest[0] not in ("runs/setup.sh", "runs/test.sh"):
            chain = rest[0].removeprefix("runs/")
            text = (ROOT / rest[0]).read_text(encoding="utf-8")
            assert [k for k in knobs if f"{k}=" not in text.split("\ncd ")[0]] == [], "a knob that is not explained"
            (tmp_path / str(i)).mkdir()
            take_flags(dry_run(chain, tmp_path / str(i), **knobs)[0], monkeypatch)
        elif "-m" in rest:
            at = rest.index("-m") + 1
            assert first in ("python", ".venv/bin/python", "torchrun")
            take_flags([["-m", *rest[at:]]], monkeypatch)
            if rest[at] in QUICK and "--measure" not in rest:
                importlib.import_module(rest[at]).main(rest[at + 1 :])
        else:
            assert first in (*ELSEWHERE, "bash"), shlex.join(words)


@NAMES
def test_python_blocks_run(page, monkeypatch, capsys):
    if not (found := blocks(page, "python")):
        return
    with LiveServer(real_chat(sequence_len=256), batch=None) as server:
        monkeypatch.setattr("nanozhchat.chat.load", lambda *_a, **_k: real_chat(sequence_len=256))
        names = {"__name__": page.stem}
        for code in found:
            exec(compile(code.replace("http://localhost:8000", server.url), page.name, "exec"), names)
    assert capsys.readouterr().out


@NAMES
def test_links_lead_somewhere_and_both_languages_have_the_same_commands(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    twin = {"README.md": ROOT / "README.zh.md", "en": ROOT / "docs" / "zh" / page.name}
    other = twin.get(page.name) or twin.get(page.parent.name)
    if other:
        plain = [[[w for w in words if w.isascii()] for words in commands(p)] for p in (page, other)]
        assert plain[0] == plain[1]
        assert f"{page.parent.name}/{page.name}" in (ROOT / "mkdocs.yml").read_text() or page.name == "README.md"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_tables_of_depths_are_what_the_recipe_prints(language, capsys):
    page = (ROOT / "docs" / language / "bigger.md").read_text(encoding="utf-8")
    for hardware in re.findall(r"<!-- recipe: (\d\S*) -->", page):
        importlib.import_module("scripts.recipe").main(["--table", f"--hardware={hardware}"])
        assert f"<!-- recipe: {hardware} -->\n\n{capsys.readouterr().out}" in page
