"""The report: true numbers, safe text, pictures that show something, and nothing that must exist beforehand."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nanozhchat import charts, recipe, report_html
from nanozhchat.report import write_report
from nanozhchat.report_data import latest_tag
from nanozhchat.report_numbers import compare, duration, margins
from scripts import report as script

HOSTILE = "甲|乙\n<script>alert(1)</script> `x` [链接](https://example.com) <img src=x onerror=alert(1)> ${7*7} **粗**"
PNG = b"\x89PNG\r\n\x1a\n"
SKILLS = ("arithmetic", "reading", "facts", "antonyms", "measure", "idioms", "counting", "identity", "unknown", "story")


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = value if isinstance(value, list) else [value]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make_run(base: Path, tag: str = "d4", stage: str = "base", steps: int = 60, floor: float = 2.1) -> Path:
    """Leave the files of a training run: a loss that falls by a power law, evaluated ten times."""
    rng = random.Random(stage)
    folder, per_step, rows = base / stage / tag, 8192, []
    made = recipe.resolve(4, vocab_size=4096, overrides=recipe.Overrides(num_steps=steps, total_batch_size=per_step))
    for step in range(steps + 1):
        loss = floor + 6.2 * math.exp(-step / (steps * 0.02)) * (stage == "base") + 1.6 * (1 + 9 * step / steps) ** -0.9
        row: dict[str, Any] = {"step": step, "time_s": 7.5 * 60 * step / steps, "tokens": step * per_step}
        if step:
            noisy = loss + rng.gauss(0, 0.06)
            lr = 0.013 * min(1.0, step / (0.02 * steps), 1.05 - step / steps if step > 0.35 * steps else 1.0)
            row |= {
                "bytes": step * per_step * 3,
                "flops": 3e7 * step * per_step,
                "train/loss": noisy,
                "train/bpb": noisy / math.log(2) / 3.3,
                "lr": max(lr, 0.0005),
                "grad_norm": 0.4,
                "mfu": 0.61,
                "tok_per_sec": 9100 + rng.gauss(0, 120),
                "mem_bytes": 2.1e9,
                "eta_s": 1.0,
            }
        if step % max(1, steps // 10) == 0:
            row |= {"val/loss": loss, "val/bpb": loss / math.log(2) / 3.3, "val/ppl": math.exp(loss)}
        rows.append(row)
    write(folder / "metrics.jsonl", rows)
    write(folder / "recipe.json", made.to_dict())
    write(folder / "events.jsonl", [{"event": "start", "step": 0}, {"event": "done", "step": steps}])
    (folder / "config.yaml").write_text('# data specs\ndata: ["builtin"]\n# layers\ndepth: "4"\n', encoding="utf-8")
    identity = {"tokenizer": "builtin-4096", "tokenizer_hash": "ab" * 32, "data_hash": "cd" * 32}
    write(folder / f"step_{steps:08d}" / "manifest.json", {"step": steps, "identity": identity})
    return folder


def make_evaluations(base: Path, tag: str = "d4", given: str = "8个") -> None:
    """Leave samples, both evaluations, a corpus and a tokenizer."""
    texts = {
        6: "的的，的一个。的小小",
        30: "小猫在河边看见一条鱼，它很高兴，",
        60: "小猫花花住在山脚下。有一天，它想去河边看鱼。",
    }
    rows = [{"step": s, "prompt": p, "text": t} for s, t in texts.items() for p in ("从前，", "春天来了，")]
    write(base / "base" / tag / "samples.jsonl", rows)
    write(
        base / "base" / tag / "base_eval.json",
        {
            "step": 60,
            "loss": 2.3,
            "bpb": 1.0,
            "ppl": 9.97,
            "tokens": 3000,
            "bytes": 9900,
            "baselines": {"gzip": 2.25, "xz": 1.42},
        },
    )
    tasks = {
        f"builtin:{name}": {
            "score": 0.95 - 0.09 * i,
            "chance": 0.05 * (i % 5),
            "low": 0.9 - 0.09 * i,
            "high": min(1.0, 0.99 - 0.08 * i),
            "n": 100,
        }
        for i, name in enumerate(SKILLS)
    }
    question = "小红有5个苹果，又买了3个，现在一共有几个苹果？"
    answers = [
        {"question": question, "expected": "8个", "given": given, "correct": True},
        {"question": "“高”的反义词是什么？", "expected": "矮", "given": "大", "correct": False},
    ]
    write(
        base / "sft" / tag / "chat_eval.json",
        {
            "overall": 0.545,
            "tasks": tasks,
            "refusal": {"unknowable": 0.9, "knowable": 0.031},
            "step": 60,
            "examples": dict.fromkeys(tasks, answers),
        },
    )
    totals = {"train": {"rows": 90000, "bytes": 48_000_000}, "val": {"rows": 1900, "bytes": 1_000_000}}
    write(base / "corpus" / "builtin" / "manifest.json", {"hash": "cd" * 32, "totals": totals})
    write(
        base / "tokenizer" / "builtin-4096" / "meta.json",
        {"vocab_size": 4096, "kind": "bpe", "trained_on": {"documents": 9, "bytes": 48_000_000}},
    )


class Page(HTMLParser):
    """Collects tags, and every attribute that could load or run something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster")]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]


def read(folder: Path) -> tuple[str, str]:
    return (folder / "report.md").read_text(encoding="utf-8"), (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a model with everything there is; drawn once, read by many tests."""
    base = tmp_path_factory.mktemp("full")
    make_run(base)
    make_run(base, stage="sft", floor=0.4)
    make_evaluations(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOZHCHAT_BASE_DIR", str(base))
        patch.setattr(charts, "DPI", 60)
        return write_report("d4")


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write reports without the time it takes to draw."""
    for name in ("draw_curve", "draw_scores"):
        monkeypatch.setattr(f"nanozhchat.report_sections.{name}", lambda *_: PNG)


def test_the_numbers_are_those_of_the_metrics_file(full: Path) -> None:
    lines = (full.parents[1] / "base" / "d4" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    for text in read(full):
        for shown in (f"{last['val/bpb']:.4f}", f"{last['train/loss']:.4f}", f"{last['tokens']:,}", "7 min 30 s"):
            assert shown in text


def test_the_margin_over_compressors_is_stated_with_its_sign(full: Path) -> None:
    for text in read(full):
        assert "0.42 bits per byte better than xz -9 on the same held-out bytes" in text.replace("\\", "")
        assert "1.25 bits per byte better than gzip -9 on the same held-out bytes" in text.replace("\\", "")
    assert margins({"bpb": 2.0, "baselines": {"xz": 1.5}}) == [("xz", 1.5, -0.5)]
    assert compare(-0.5, "xz") == "0.50 bits per byte worse than xz -9"


def test_every_skill_has_score_interval_and_chance(full: Path) -> None:
    text = read(full)[0]
    row = next(line for line in text.splitlines() if line.startswith("| `reading`"))
    assert row == "| `reading` | 86.0 % | 81.0 % – 91.0 % | 5.0 % | 100 |"
    assert "90.0 % of the questions that cannot be answered" in text


def test_charts_are_pictures_that_show_something(full: Path) -> None:
    from matplotlib import image

    wanted = {f"{s}-{c}" for s in ("base", "sft") for c in ("bpb", "loss-tokens", "loss-time", "speed", "lr")}
    found = {path.stem: path for path in full.glob("*.png")}
    assert set(found) == wanted | {"skills"}
    for path in found.values():
        assert path.read_bytes().startswith(PNG)
        pixels = image.imread(path)[:, :, :3].reshape(-1, 3)
        assert (pixels.min(axis=1) < 0.9).mean() > 0.003, f"{path.name} is blank"


def test_markdown_shows_every_chart_with_a_description(full: Path) -> None:
    shown = dict(re.findall(r"!\[(?:[^]\\]|\\.)+\]\(([^)]+)()\)", read(full)[0]))
    assert set(shown) == {path.name for path in full.glob("*.png")}


def test_the_page_loads_and_runs_nothing(full: Path) -> None:
    text = read(full)[1]
    seen = Page(text)
    assert seen.loads
    assert all(value.startswith("data:image/png;base64,") for value in seen.loads)
    assert not seen.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert not seen.handlers
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text


@pytest.mark.usefixtures("no_charts")
def test_text_of_the_model_stays_text(base_dir: Path) -> None:
    make_run(base_dir)
    make_run(base_dir, stage="sft")
    make_evaluations(base_dir, given=HOSTILE)
    write(base_dir / "base" / "d4" / "samples.jsonl", {"step": 60, "prompt": HOSTILE, "text": HOSTILE})
    text, html = read(write_report("d4"))
    seen = Page(html)
    assert not seen.tags & {"script"}
    assert not seen.handlers
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<script" not in text
    assert "<img" not in text
    assert not re.search(r"(?<!\\)\](?=\(https)", text)
    rows = [line for line in text.splitlines() if "alert" in line]
    assert rows
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1, "a cell broke out of its table"


@pytest.mark.usefixtures("no_charts")
def test_a_base_run_alone_is_reported_with_the_next_commands(base_dir: Path) -> None:
    make_run(base_dir, tag="solo")
    text, _ = read(write_report("solo"))
    for command in ("chat_sft", "base_eval", "chat_eval --tasks builtin"):
        assert f"python -m scripts.{command}" in text
    assert "--model-tag=solo" in text


def test_metrics_alone_are_enough(base_dir: Path) -> None:
    write(base_dir / "base" / "bare" / "metrics.jsonl", [{"step": 1, "train/loss": float("nan")}, {"step": 2}])
    folder = write_report("bare")
    assert "has not run to its end" in read(folder)[0]
    assert not list(folder.glob("*.png"))


@pytest.mark.usefixtures("no_charts")
def test_a_torn_evaluation_counts_as_missing(base_dir: Path) -> None:
    make_run(base_dir)
    (base_dir / "base" / "d4" / "base_eval.json").write_text('{"bpb": 1.')
    assert "scripts.base_eval" in read(write_report("d4"))[0]


@pytest.mark.usefixtures("no_charts")
def test_an_unknown_tag_is_named_with_the_next_command(base_dir: Path) -> None:
    make_run(base_dir)
    with pytest.raises(FileNotFoundError, match=r"'nope'.*tags there: d4.*scripts\.base_train") as caught:
        write_report("nope")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="model tag '../x' is not valid"):
        write_report("../x")


def test_nothing_trained_says_how_to_begin() -> None:
    with pytest.raises(FileNotFoundError, match="bash runs/runcpu.sh"):
        latest_tag()


@pytest.mark.usefixtures("no_charts")
def test_the_script_reports_the_latest_run_and_prints_where(base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = make_run(base_dir, tag="old")
    os.utime(old / "metrics.jsonl", (1, 1))
    make_run(base_dir, tag="new")
    script.main([])
    assert str(base_dir / "report" / "new" / "report.html") in capsys.readouterr().out


def test_chinese_task_names_never_become_boxes(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(charts, "CJK_FONTS", ())
    assert charts.draw_scores([charts.Bar("算术", 0.5, 0.4, 0.6, 0.1)]).startswith(PNG)
    assert not [w for w in recwarn if "missing from font" in str(w.message)]


def test_importing_the_report_brings_in_neither_torch_nor_matplotlib() -> None:
    code = "import sys, nanozhchat.report; print({'torch', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant() -> None:
    assert charts.smooth([3.0] * 500) == pytest.approx([3.0] * 500)
    assert charts.smooth([8.0, *[2.0] * 99])[0] == 8.0


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (59.6, "1 min"), (450, "7 min 30 s"), (7260, "2 h 1 min")])
def test_durations_are_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_code_in_markdown_survives_its_own_backticks() -> None:
    assert report_html.md_text(report_html.Code("a`b|c")) == "``a`b\\|c``"
