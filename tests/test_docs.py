"""README and guides: the commands run, made small, or say what they take; Python blocks run; tables are as printed."""

import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from itertools import islice
from unittest.mock import AsyncMock

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from nanozhchat import budget, builtin, compute, corpus, files, prepare, sources
from nanozhchat.tokenizer import Tokenizer
from tasks import registry
from tests.conftest import ROOT, pack, write_jsonl
from tests.fakes import LiveServer, real_chat
from tests.test_benchmarks import write
from tests.test_foreign import write_one
from tests.test_runs import dry_run, take_flags

PAGES = [*ROOT.glob("README*.md"), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "docs" / "colab.ipynb"]
GUIDES = re.findall(r"\((\w+\.md)\)", (ROOT / "docs" / "en" / "index.md").read_text(encoding="utf-8"))
BOOKS = {  # pages that one reader follows, in this order; the Chinese ones have the same commands
    "readme": [ROOT / "README.md"],
    "guides": [*(ROOT / "docs" / "en" / name for name in GUIDES), ROOT / "docs" / "colab.ipynb"],
}
SMALL = {  # flags put behind those printed: the last one wins
    "scripts.data_fetch": "--max-bytes=50000",
    "scripts.tok_train": "--max-bytes=50000 --vocab-size=500",
    "scripts.base_train": "--depth=1 --max-seq-len=128 --total-batch-size=256 --device-batch-size=2 --eval-tokens=512",
    "scripts.base_eval": "--eval-tokens=512 --max-items=1 --max-tokens=4",
    "scripts.chat_sft": "--max-conversations=50",
    "scripts.chat_rl": "--num-problems=4 --held-out=2 --prompts=2 --group=2 --max-tokens=4",
    "scripts.chat_eval": "--num-questions=1 --max-tokens=4",
    "scripts.chat_cli": "--max-tokens=4",
    "scripts.chat_web": "--port=0",
}
TRAINING = ("scripts.base_train", "scripts.chat_sft", "scripts.chat_rl")
LENGTHS = {"--budget": "1s", "--target-ratio": 0.001, "--target-flops": 1e8, "--num-steps": 2}  # as asked, else steps
CHAINS = ("runs/runcpu.sh", "runs/novel.sh", "runs/miniseries.sh", "runs/scaling_laws.sh")  # run as their commands
SLOW = ("dev.bench_learning",)  # a minute at least, and it changes the modules of its process
ELSEWHERE = ("source", "uv", "sbatch", "docker", "git", "tensorboard", "curl")  # programs that are not ours
NAMES = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(page, language):
    if page.suffix == ".ipynb":  # lines of its cells that begin with ! go to the shell
        cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
        lines = [line.rstrip() for cell in cells if cell["cell_type"] == "code" for line in cell["source"]]
        return ["\n".join(line[1:] for line in lines if line.startswith("!"))] if language == "bash" else []
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page):
    """Yield the knobs and words of each command, and whether a comment stands beside it, or above it in its block."""
    for block in blocks(page, "bash"):
        said = False
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            knobs = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
            said |= not words
            if words:
                yield knobs, words[len(knobs) :], said or "#" in line


def ours(knobs, words, folder, monkeypatch):
    """Return what a command runs of ours: itself, or the commands of a chain, whose flags are checked as they are."""
    first, *rest = words
    if "-m" in rest:
        assert first in ("python", ".venv/bin/python", "torchrun")
        return [rest[rest.index("-m") :]]
    assert first in (*ELSEWHERE, "bash"), shlex.join(words)
    if first != "bash" or rest[0] in ("runs/setup.sh", "runs/test.sh"):
        return []
    text = (ROOT / rest[0]).read_text(encoding="utf-8")
    assert [k for k in knobs if f"{k}=" not in text.split("\ncd ")[0]] == [], "a knob that is not explained"
    folder.mkdir()
    made = dry_run(rest[0].removeprefix("runs/"), folder, **knobs)[0]
    take_flags(made, monkeypatch)
    return made


def small(module, flags):
    more = SMALL.get(module, "").split()
    if any(flag.startswith("--from") for flag in flags):  # a vocabulary taken over has its size
        more = [flag for flag in more if not flag.startswith("--vocab-size=")]
    if module in TRAINING:
        asked = [name for name in LENGTHS for flag in flags if flag.startswith(f"{name}=")]
        more += [f"{name}={LENGTHS[name]}" for name in asked or ["--num-steps"]]
    return [*flags, *more]


def of_the_hub(word):
    source = sources.parse(word or "-")
    return sources.data_set(source) if source.kind == "hub" else None


@pytest.fixture
def world(tmp_path, base_dir, monkeypatch):
    """A folder with the files that the pages name; where they name none there is little text, and a quick probe."""
    monkeypatch.chdir(tmp_path)
    texts = list(islice(builtin.documents(1, split="train"), 320))
    for i in range(8):
        write_jsonl(tmp_path / f"texts/{i}.jsonl.gz", texts[i::8])
        write_jsonl(tmp_path / f"c4/{i}.json.gz", ["\n".join(texts[j : j + 5]) for j in range(40 * i, 40 * i + 40, 5)])
    for name in ("novel.txt", "hongloumeng.txt"):
        pack(tmp_path / name, "\n\n".join(texts))
    sums = [{"prompt": f"{i}加{i}等于几？", "completion": f"等于{2 * i}。"} for i in range(50)]
    write_jsonl(tmp_path / "conversations.jsonl", sums)
    pairs = [{"prompt": s["prompt"], "chosen": s["completion"], "rejected": "不知道。"} for s in sums]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    for name in (*registry.CORE_ZH, "cmmlu", "cmath"):
        write(tmp_path / "FOLDER", name)
    (tmp_path / "gpt2").mkdir()
    write_one(tmp_path / "gpt2" / "tokenizer.json", "gpt2")
    entries = Tokenizer.from_file(tmp_path / "gpt2" / "tokenizer.json").vocab_size
    config = GPT2Config(vocab_size=entries, n_positions=128, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    monkeypatch.setattr(corpus, "BUILTIN_BYTES", 200_000)
    monkeypatch.setattr(prepare, "TOKENIZER_BYTES", 50_000)
    monkeypatch.setattr(budget, "PROBE_SECONDS", 0)
    monkeypatch.setattr(budget, "PROBE", replace(budget.PROBE, n_layer=1, n_head=1, n_kv_head=1, n_embd=64))
    monkeypatch.setattr(compute, "PROBE_SHAPE", (8, 8, 8))
    monkeypatch.setattr("nanozhchat.server.serve.Server.main_loop", AsyncMock())  # once started, it stops
    return tmp_path


@pytest.mark.filterwarnings("ignore:Polyfit")  # all models of the sweeps have one size here
@pytest.mark.parametrize("book", BOOKS)
def test_every_command_runs_in_the_order_printed(book, world, monkeypatch, capsys):
    done = set()
    for number, (knobs, words, _) in enumerate(line for page in BOOKS[book] for line in commands(page)):
        todo = ours(knobs, words, world / f"chain{number}", monkeypatch)
        if words[0] == "bash" and (knobs.get("DRY_RUN") or words[1] not in CHAINS or words[1] in done):
            todo = [command for command in todo if command[1] == "scripts.recipe"]  # the estimate
        elif words[0] == "bash":
            done.add(words[1])
        for _, module, *flags in todo:
            if module in SLOW:
                take_flags([["-m", module, *flags]], monkeypatch)
                continue
            for remote in filter(None, map(of_the_hub, flags)):  # as if fetched before
                shutil.copytree(world / "texts", remote.folder, dirs_exist_ok=True)
                files.write_json(remote._listing, {"revision": "c" * 40, "files": [f"{i}.jsonl.gz" for i in range(8)]})
            if (command := shlex.join([module, *small(module, flags)])) not in done:
                done.add(command)
                print("+", command)  # shown when it fails
                monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
                importlib.import_module(module).main(small(module, flags))


@NAMES
def test_what_takes_long_or_needs_hardware_or_the_network_says_so(page):
    for knobs, words, said in commands(page):
        runs = words[0].endswith("python") and words[2] not in SLOW and not any(map(of_the_hub, words))
        assert said or runs or knobs.get("DRY_RUN") == "1", shlex.join(words)


@NAMES
def test_python_blocks_run(page, monkeypatch, capsys):
    if not (found := blocks(page, "python")):
        return
    with LiveServer(real_chat(sequence_len=256), batch=None) as server:
        monkeypatch.setattr("nanozhchat.chat.load", lambda *_a, **_k: real_chat(sequence_len=256))
        names = {"__name__": page.stem}
        for code in found:
            exec(compile(code.replace("http://localhost:8000", server.url), page.name, "exec"), names)
        asked = [[w.replace("http://localhost:8000", server.url) for w in ws] for _, ws, _ in commands(page)]
        for words in (ws for ws in asked if ws[0] == "curl"):
            assert json.loads(subprocess.check_output(words))["choices"]
    assert capsys.readouterr().out


@NAMES
def test_links_lead_somewhere_and_both_languages_have_the_same_commands(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    twin = {"README.md": ROOT / "README.zh.md", "en": ROOT / "docs" / "zh" / page.name}
    other = twin.get(page.name) or twin.get(page.parent.name)
    if other:
        assert [line[:2] for line in commands(page)] == [line[:2] for line in commands(other)]
        assert page.parent.name != "en" or page.name in (*GUIDES, "index.md"), "index.md leads to every guide"
        assert f"{page.parent.name}/{page.name}" in (ROOT / "mkdocs.yml").read_text() or page.name == "README.md"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_tables_of_depths_are_what_the_recipe_prints(language, capsys):
    page = (ROOT / "docs" / language / "bigger.md").read_text(encoding="utf-8")
    for hardware in re.findall(r"<!-- recipe: (\d\S*) -->", page):
        importlib.import_module("scripts.recipe").main(["--table", f"--hardware={hardware}"])
        assert f"<!-- recipe: {hardware} -->\n\n{capsys.readouterr().out}" in page
