"""The report: true numbers, safe text, pictures that show something, and nothing that must exist beforehand."""

import os
import re
from html.parser import HTMLParser

import pytest
from matplotlib import image

from nanozhchat import charts, paths, recipe
from nanozhchat.report import Model, duration, write_report
from nanozhchat.tokenizer import Tokenizer
from scripts import report as script
from tests.conftest import refused, write_jsonl

HOSTILE = "甲|乙\n<script>alert(1)</script> `x` [链](https://a.b) ![图](x:y) <img src=x onerror=1> &lt; **粗**"


def write(path, *rows):
    return write_jsonl(path, rows)


def make_run(base, tag="d4", stage="base"):
    folder = base / stage / tag
    rows = [{"step": i, "time_s": 7.5 * i, "tokens": i * 8192, "val/bpb": 3 / (1 + i)} for i in range(0, 61, 10)]
    for step, row in zip(range(10, 61, 10), rows[1:]):
        row |= {"bytes": step * 24576, "train/loss": 7.654 / step, "train/bpb": 3.2 / step, "lr": 0.01, "mfu": 0.61}
        row |= {"tok_per_sec": 9100 + step, "val/loss": 7.1 / step, "val/ppl": 9.0, "mem_bytes": 2**30}
        row |= {"flops": step * 1e9, "train/reward": 0.5}
    write(folder / "metrics.jsonl", *rows)
    write(folder / "recipe.json", recipe.resolve(4, vocab_size=4096).to_dict())
    began = {"event": "start", "world_size": 1, "device": "NVIDIA H100 80GB HBM3"}
    write(folder / "events.jsonl", began, {"event": "done", "step": 60, "time": "2030-01-02T03:04:05+00:00"})
    write(folder / "step_00000060" / "manifest.json", {"identity": {"tokenizer": "t", "data_hash": "cd" * 32}})
    return folder


def make_evaluations(base, said):
    samples = [{"step": s, "prompt": p, "text": said} for s in (6, 30, 60) for p in ("从前，", said)]
    write(base / "base" / "d4" / "samples.jsonl", *samples)
    scored = {"step": 60, "bpb": 1.0, "ppl": 9.97, "tokens": 3000, "bytes": 9900}
    write(base / "base" / "d4" / "base_eval.json", scored | {"baselines": {"gzip": 0.75, "xz": 1.42}})
    score = {"score": 0.86, "chance": 0.05, "low": 0.81, "high": 0.91, "n": 100}
    answers = [{"question": said, "expected": "8个", "given": said, "correct": good} for good in (True, False)]
    chat = {"overall": 0.545, "tasks": {"builtin:reading": score, "story": {**score, "score": 0.23}}, "step": 60}
    chat |= {"refusal": {"unknowable": 0.9, "knowable": None}, "examples": {"builtin:reading": answers}}
    write(base / "sft" / "d4" / "chat_eval.json", chat)
    totals = {"train": {"rows": 90000}, "val": {"rows": 12}}
    write(base / "corpus" / "c" / "manifest.json", {"hash": "cd" * 32, "totals": totals})
    tokenizer = Tokenizer.train(["只有字节"], 263)
    tokenizer.save(base / "tokenizer" / "t")
    write(base / "tokenizer" / "t" / "stats.json", {"common_3500_frac": 0.25, "unused_frac": 0.5})


def read(folder):
    return (folder / "report.md").read_text(encoding="utf-8"), (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    base = tmp_path_factory.mktemp("full")
    for stage in ("base", "sft"):
        make_run(base, stage=stage)
    make_run(base, tag="solo")
    make_evaluations(base, HOSTILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOZHCHAT_BASE_DIR", str(base))
        patch.setattr(charts, "DPI", 60)
        return write_report("d4")


def test_the_numbers_are_those_of_the_files_in_both_forms(full):
    shown = (
        "0.42 bits per byte better than xz -9", "0.25 bits per byte worse than gzip -9 on the same held-out bytes",
        "比 gzip -9 多 0.25 比特", "7 min 30 s", "491,520", "0.1276", "90.0% of the questions that cannot be answered",
        "54.5%", "90,000 documents", "263 tokens", "25.0%", "⏎", "175.0 Wh: 1 H100 at 700 W", "0.7500 USD: rented",
        "d4 (this one)", "solo",  "2030-01-02 03:04", "✗ reading 阅读", "n_embd", "Fine-tuning 对话微调",
        "12 documents: figures measured on so little say little",
    )  # fmt: skip
    for text in read(full):
        assert [s for s in shown if s not in text.replace("\\", "")] == []
    assert [duration(s) for s in (0, 59.6, 450, 7260)] == ["0 s", "1 min", "7 min 30 s", "2 h 1 min"]
    assert "| reading 阅读 | 86.0% | 81.0% – 91.0% | 5.0% | 100 |" in read(full)[0]


def test_charts_show_something_without_boxes_and_stand_in_the_markdown_with_a_description(full, recwarn):
    drawn = ("bpb", "loss-tokens", "loss-time", "speed", "lr", "memory", "reward")
    curves = {f"{s}-{c}.png" for s in ("base", "sft") for c in drawn} | {"base-mfu.png", "base-bpb-flops.png"}
    assert {*re.findall(r"!\[[^]]+\]\(([^)]+)\)", read(full)[0])} == curves | {"skills.png"}
    for path in full.glob("*.png"):
        pixels = image.imread(path)[:, :, :3].reshape(-1, 3)
        assert (pixels.min(axis=1) < 0.9).mean() > 0.003, f"{path.name} is blank"
    assert charts.smooth([3.0] * 500) == pytest.approx([3.0] * 500)
    charts.draw_scores([{"name": "算术", "score": 0.5, "low": 0.4, "high": 0.6, "chance": 0.1}])
    charts.draw_scaling("损失，对算力", {"预算": ([1.0, 10.0], [2.0, 1.0], [], [])})
    assert not [w for w in recwarn if "missing from" in str(w.message)]


def test_text_of_the_model_stays_text_and_the_page_loads_and_runs_nothing(full):
    tags, attributes, said = set(), [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: (tags.add(tag), attributes.extend(attrs))
    parser.handle_data = said.append
    text, page = read(full)
    parser.feed(page)
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    sources = [value for name, value in attributes if name in ("src", "href", "srcset")]
    assert [str(value)[:22] for value in sources] == ["data:image/png;base64,"] * 17
    assert not [name for name, _ in attributes if name.startswith("on")]
    assert "".join(said).count(HOSTILE.partition("\n")[2]) == 3 + 3 + 1 + 4  # as prompt, sample, question and answer
    assert ("default-src 'none'" in page, "url(" in page, "<script" in text) == (True, False, False)
    for table in (block.splitlines() for block in text.split("\n\n") if block.startswith("|")):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1, "a cell broke out of its table"


def test_what_is_not_there_is_named_with_the_next_commands(base_dir, monkeypatch):
    monkeypatch.setattr("nanozhchat.report.draw_curve", lambda *_: b"")
    refused(r"bash runs/runcpu\.sh", paths.latest_tag, "metrics.jsonl", error=FileNotFoundError)
    (make_run(base_dir, tag="solo") / "base_eval.json").write_text('{"bpb": 1.')  # torn
    text, _ = read(write_report("solo"))
    for command in ("chat_sft --model-tag=solo", "base_eval --model-tag=solo", "chat_eval --tasks builtin"):
        assert f"python -m scripts.{command}" in text
    with pytest.raises(FileNotFoundError, match=r"^[^\n]*'nope'[^\n]*tags there: solo[^\n]*scripts\.base_train[^\n]*$"):
        Model("nope")
    refused("model tag '../x' is not valid", write_report, "../x")


def test_metrics_alone_are_enough_and_the_script_takes_the_latest(base_dir, capsys):
    os.utime(make_run(base_dir, tag="old") / "metrics.jsonl", (1, 1))
    write(base_dir / "base" / "bare" / "metrics.jsonl", {"step": 1, "train/loss": float("nan")}, {"step": 2})
    script.main([])
    folder = base_dir / "report" / "bare"
    assert str(folder / "report.html") in capsys.readouterr().out
    assert "has not run to its end (step 2)" in read(folder)[0]
    assert not re.search(r"\bnan\b", read(folder)[0])
