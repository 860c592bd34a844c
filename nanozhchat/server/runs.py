"""What trainings have written so far, for the page that lets people watch: a list, and the curves of one."""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

from nanozhchat import paths
from nanozhchat.files import read_jsonl
from nanozhchat.report_data import Stage

CURVES = ("train/loss", "val/loss", "train/bpb", "val/bpb", "tok_per_sec", "lr")
POINTS = 400  # per curve
SAMPLES = 60
ACTIVE_S = 90  # a run that wrote this lately is going on


def _folders() -> dict[tuple[str, str], Path]:
    found = (path.parent for path in paths.run_files("metrics.jsonl"))
    return {(f.parent.name, f.name): f for f in found if paths.TAG_PATTERN.fullmatch(f.name)}


def list_runs() -> list[dict[str, Any]]:
    """Return every run with numbers, the latest first."""
    rows = []
    for (stage, tag), folder in _folders().items():
        written = (folder / "metrics.jsonl").stat().st_mtime
        ended = any(e.get("event") in ("done", "stop") for e in read_jsonl(folder / "events.jsonl")[-1:])
        active = time.time() - written < ACTIVE_S and not ended
        rows.append({"stage": stage, "tag": tag, "updated": int(written), "active": active, "last": _last(folder)})
    return sorted(rows, key=lambda row: -row["updated"])


def _last(folder: Path) -> dict[str, Any]:
    """Read the last whole row without reading the file."""
    with open(folder / "metrics.jsonl", "rb") as handle:
        handle.seek(max(0, handle.seek(0, 2) - 8192))
        for line in reversed(handle.read().split(b"\n")[:-1]):
            with contextlib.suppress(ValueError, AttributeError):
                row = json.loads(line)
                return {key: row.get(key) for key in ("step", "time_s", "eta_s", "tokens", *CURVES)}
    return {}


def read_run(stage: str, tag: str) -> dict[str, Any] | None:
    """Return the curves as [[step, value], ...], thinned out, and the newest samples; None = no such run."""
    folder = _folders().get((stage, tag))
    if folder is None:
        return None
    run, samples = Stage(stage, tag), read_jsonl(folder / "samples.jsonl")
    curves = {key: _thin(list(zip(*run.points(key), strict=True))) for key in CURVES}
    if len(samples) > SAMPLES:  # evenly spread, the last one among them
        samples = [samples[round(i * (len(samples) - 1) / (SAMPLES - 1))] for i in range(SAMPLES)]
    shown = {key: line for key, line in curves.items() if line}
    return {"stage": stage, "tag": tag, "last": _last(folder), "curves": shown, "samples": samples}


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbours until at most POINTS are left."""
    size = max(1, math.ceil(len(points) / POINTS))
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
