"""What a trained model left on disk, read for its report. Everything but one stage's metrics may be missing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanozhchat import files, paths
from nanozhchat.errors import DamagedError
from nanozhchat.recipe import Recipe
from nanozhchat.report_numbers import UNITS, duration, is_number

Row = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One stage of training: its rows of metrics.jsonl in order of steps, and the files beside them."""

    name: str
    folder: Path
    rows: list[Row]
    samples: list[Row]
    events: list[Row]
    recipe: Recipe | None
    config: Row
    identity: Row

    def points(self, key: str, against: str) -> tuple[list[float], list[float]]:
        """Return (x, y) of the rows that have a finite value of both."""
        kept = [(x, y) for row in self.rows if is_number(x := row.get(against)) and is_number(y := row.get(key))]
        return [x for x, _ in kept], [y for _, y in kept]

    def last(self, key: str) -> float | None:
        """Return the latest finite value of a metric."""
        values = self.points(key, "step")[1]
        return values[-1] if values else None

    def took(self, units: Sequence[str] = UNITS) -> str:
        """Return the training time in words."""
        return duration(self.last("time_s") or 0.0, units)

    @property
    def finished(self) -> bool:
        """Whether it ran to its end."""
        return any(event.get("event") == "done" for event in self.events)


@dataclass(frozen=True)
class Model:
    """Everything known about one model. stages: in order of training, at least one."""

    tag: str
    stages: list[Stage]
    base_eval: Row = field(default_factory=dict)
    chat_eval: Row = field(default_factory=dict)
    chat_stage: str = ""
    corpus: Row = field(default_factory=dict)
    tokens: Row = field(default_factory=dict)
    tokenizer: Row = field(default_factory=dict)

    def stage(self, name: str) -> Stage | None:
        """Return a stage by name, None if it was not trained."""
        return next((s for s in self.stages if s.name == name), None)


def latest_tag() -> str:
    """Return the model that was trained last; raises FileNotFoundError if there is none."""
    found = [p for stage in paths.STAGES for p in (paths.base_dir() / stage).glob("*/metrics.jsonl")]
    if not found:
        raise FileNotFoundError(
            f"no training run under {paths.base_dir()}; train one with `bash runs/runcpu.sh` or set NANOZHCHAT_BASE_DIR"
        )
    return max(found, key=lambda p: p.stat().st_mtime).parent.name


def read_model(tag: str) -> Model:
    """Read all there is about a model; raises FileNotFoundError naming the tag and the next command."""
    paths.check_tag(tag)
    stages = [stage for name in paths.STAGES if (stage := read_stage(name, tag)).rows]
    if not stages:
        there = {p.parent.name for name in paths.STAGES for p in (paths.base_dir() / name).glob("*/metrics.jsonl")}
        raise FileNotFoundError(
            f"no training run of model tag {tag!r} under {paths.base_dir()} (tags there: "
            f"{', '.join(sorted(there)) or 'none'}); train one with "
            f"`python -m scripts.base_train --depth=4 --model-tag={tag}`"
        )
    identity = stages[0].identity
    base_eval = next((f for s in stages if (f := _object(s.folder / "base_eval.json"))), {})
    chat_stage = next((s for s in reversed(stages) if (s.folder / "chat_eval.json").exists()), None)
    corpus_folder, corpus = _by_hash("corpus/*/manifest.json", "hash", identity.get("data_hash"))
    tokens = _tokens(corpus_folder, identity.get("tokenizer_hash"))
    name = identity.get("tokenizer") or stages[0].config.get("tokenizer")
    tokenizer = _object(paths.base_dir() / "tokenizer" / str(name) / "meta.json") if name else {}
    return Model(
        tag=tag,
        stages=stages,
        base_eval=base_eval,
        chat_eval=_object(chat_stage.folder / "chat_eval.json") if chat_stage else {},
        chat_stage=chat_stage.name if chat_stage else "",
        corpus={**corpus, "name": corpus_folder.name} if corpus and corpus_folder else {},
        tokens=tokens,
        tokenizer={**tokenizer, "name": str(name)} if name else {},
    )


def read_stage(name: str, tag: str) -> Stage:
    """Read one stage; without metrics its rows are empty. A step that was done twice counts once, the later time."""
    folder = paths.run_dir(name, tag)
    rows: dict[float, Row] = {}
    for row in files.read_jsonl(folder / "metrics.jsonl"):
        if isinstance(row, dict) and is_number(row.get("step")):
            rows[row["step"]] = row
    samples = [
        r for r in files.read_jsonl(folder / "samples.jsonl") if isinstance(r, dict) and is_number(r.get("step"))
    ]
    recipe = None
    with contextlib.suppress(ValueError, TypeError):  # of another version: the report goes without its formulas
        recipe = Recipe.from_dict(_object(folder / "recipe.json"))
    manifests = sorted(folder.glob("step_[0-9]*[0-9]/manifest.json"))
    return Stage(
        name=name,
        folder=folder,
        rows=[rows[step] for step in sorted(rows)],
        samples=samples,
        events=[r for r in files.read_jsonl(folder / "events.jsonl") if isinstance(r, dict)],
        recipe=recipe,
        config=_config(folder / "config.yaml"),
        identity=_object(manifests[-1]).get("identity", {}) if manifests else {},
    )


def _object(path: Path) -> Row:
    """Read a JSON object; a missing or damaged file counts as empty."""
    try:
        value = files.read_json(path)
    except (OSError, DamagedError):
        return {}
    return value if isinstance(value, dict) else {}


def _config(path: Path) -> Row:
    """Read what `cli.write_config` wrote: lines of `name: JSON value`."""
    values: Row = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            name, colon, value = line.partition(": ")
            if colon and not line.startswith("#"):
                with contextlib.suppress(json.JSONDecodeError):
                    values[name] = json.loads(value)
    return values


def _by_hash(pattern: str, key: str, wanted: object) -> tuple[Path | None, Row]:
    for path in sorted(paths.base_dir().glob(pattern)) if wanted else ():
        manifest = _object(path)
        if manifest.get(key) == wanted:
            return path.parent, manifest
    return None, {}


def _tokens(corpus_folder: Path | None, tokenizer_hash: object) -> Row:
    if corpus_folder is None or not isinstance(tokenizer_hash, str):
        return {}
    return _object(paths.tokens_dir(corpus_folder.name, tokenizer_hash) / "manifest.json")


def machine() -> list[tuple[str, str]]:
    """Describe this machine as (what, value), without importing torch."""
    rows = [
        ("processor", _cpu_model()),
        ("cores", str(_cores())),
        ("system", f"{platform.system()} {platform.machine()}"),
    ]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        rows.insert(2, ("memory", f"{memory / 2**30:.1f} GiB"))
    gpus = [
        line.partition(":")[2].strip()
        for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        for line in path.read_text(errors="replace").splitlines()
        if line.startswith("Model")
    ]
    if gpus:
        rows.append(("GPUs", f"{len(gpus)} x {gpus[0]}"))
    rows.append(("Python", platform.python_version()))
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        rows.append(("torch", importlib.metadata.version("torch")))
    return rows


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


def finished_at(stage: Stage) -> str:
    """Return when the last step was recorded, UTC, by the clock of the file system."""
    when = (stage.folder / "metrics.jsonl").stat().st_mtime
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(when))
