"""What a report is made of: run folders read into numbers, and numbers and texts written as safe Markdown."""

import contextlib
import html
import math
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from nanozhchat import files, paths
from nanozhchat.errors import DamagedError
from nanozhchat.recipe import Recipe

Row = dict[str, Any]
UNITS, ZH_UNITS = (" h", " min", " s", " "), ("小时", "分", "秒", "")  # and what stands between two of them
CHARS_SHOWN = 400
ZH = files.read_json(Path(__file__).with_name("report_zh.json"))  # beside the English of headings and skills


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def both(name: str) -> str:
    """Put the Chinese beside an English heading or skill that has one."""
    return f"{name} {ZH[name]}" if name in ZH else name


def show(value: object, form: str = "{:.1%}") -> str:
    """Write a number, as a percentage unless told otherwise; "-" if there is none."""
    return form.format(value) if is_number(value) else "-"


def duration(seconds: float, units: Sequence[str] = UNITS) -> str:
    """Write a time as its two largest units: 7 min 30 s."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    pairs = [(hours, units[0]), (m, units[1])] if hours else [(m, units[1]), (s, units[2])]
    return units[3].join(f"{n}{unit}" for n, unit in pairs if n) or f"0{units[2]}"


def text(value: object) -> str:
    """Escape for one line or table cell: nothing in it is markup, line ends become <br>; long texts are cut."""
    whole = str(value).replace("\r", "").strip()
    cut = html.escape(whole[:CHARS_SHOWN] + "…" * (len(whole) > CHARS_SHOWN), quote=False)
    return re.sub(r"([\\`*_\[\]~$|#!])", r"\\\1", cut).replace("\n", "<br>")


def table(header: Sequence[object], rows: Iterable[Sequence[object]], right: Collection[int] = ()) -> str:
    """Make a table of plain texts. right: columns of numbers."""
    rule = ["---:" if i in right else "---" for i in range(len(header))]
    lines = [[text(cell) for cell in header], rule, *([text(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def read_object(path: Path) -> Row:
    """Read a JSON or YAML object; a missing or damaged file counts as empty."""
    with contextlib.suppress(OSError, ValueError, DamagedError, yaml.YAMLError):
        value = yaml.safe_load(path.read_text(encoding="utf-8")) if path.suffix == ".yaml" else files.read_json(path)
        return value if isinstance(value, dict) else {}
    return {}


class Stage:
    """One stage of training, read from its folder; without metrics its rows are empty."""

    def __init__(self, name: str, tag: str) -> None:
        self.name, self.folder = name, paths.run_dir(name, tag)
        by_step = {row["step"]: row for row in files.read_jsonl(self.folder / "metrics.jsonl") if "step" in row}
        self.rows = [by_step[step] for step in sorted(by_step)]  # a step done twice counts once, the later time
        for row in self.rows:
            row |= {"mem_gib": row["mem_bytes"] / 2**30} if is_number(row.get("mem_bytes")) else {}
        self.events = files.read_jsonl(self.folder / "events.jsonl")
        self.data = [str(spec) for spec in read_object(self.folder / "config.yaml").get("data") or ["builtin"]]
        self.recipe: Recipe | None = None
        self.seconds = max([0.0, *self.points("time_s")[1]])
        with contextlib.suppress(ValueError, TypeError):  # of another version: the report goes without its formulas
            self.recipe = Recipe.from_dict(read_object(self.folder / "recipe.json"))

    def points(self, key: str, against: str = "step") -> tuple[list[float], list[float]]:
        """Return (x, y) of the rows that have a finite value of both."""
        kept = [(r[against], r[key]) for r in self.rows if is_number(r.get(against)) and is_number(r.get(key))]
        return [x for x, _ in kept], [y for _, y in kept]

    def last(self, key: str) -> float:
        """Return the latest finite value of a metric, NaN if there is none."""
        return [math.nan, *self.points(key)[1]][-1]


class Model:
    """A model's stages in order of training and its evaluations; FileNotFoundError if nothing was trained."""

    def __init__(self, tag: str) -> None:
        self.tag, base = tag, paths.base_dir()
        self.stages = [stage for name in paths.STAGES if (stage := Stage(name, tag)).rows]
        if not self.stages:
            there = {path.parent.name for path in paths.run_files("metrics.jsonl")}
            remedy = f"train one with `python -m scripts.base_train --depth=4 --model-tag={tag}`"
            known = f"tags there: {', '.join(sorted(there)) or 'none'}"
            raise FileNotFoundError(f"no training run of model tag {tag!r} under {base} ({known}); {remedy}")
        found = [[read_object(s.folder / f"{what}_eval.json") for s in self.stages] for what in ("base", "chat")]
        self.base_eval = next(filter(None, found[0]), {})
        asked = [(s, e) for s, e in zip(self.stages, found[1], strict=True) if e]
        self.asked, self.chat_eval = asked[-1] if asked else (self.stages[-1], {})  # the last stage that was asked
        self.margins = []  # compressor, its bits per byte, how far the model is ahead of it, and that in words
        own, others = self.base_eval.get("bpb"), self.base_eval.get("baselines") or {}
        for name in ("gzip", "xz"):
            if is_number(bpb := others.get(name)) and is_number(own):
                said = f"{abs(bpb - own):.2f} bits per byte {'better' if own <= bpb else 'worse'} than {name} -9"
                self.margins.append((f"{name} -9", bpb, bpb - own, said))
        self.seconds = sum(s.seconds for s in self.stages)
        self.bpb = own if is_number(own) else self.stages[0].last("val/bpb")
        tasks = (self.chat_eval.get("tasks") or {}).items()
        self.scores: list[Row] = [{**t, "name": both(name.removeprefix("builtin:"))} for name, t in tasks]
        self.scores.sort(key=lambda t: -t["score"])
