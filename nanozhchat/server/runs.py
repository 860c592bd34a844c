"""What trainings have written so far, for the page that lets people watch: a list, and the curves of one."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from nanozhchat import paths
from nanozhchat.files import read_jsonl

CURVES = ("train/loss", "val/loss", "train/bpb", "val/bpb", "tok_per_sec", "lr")
POINTS = 400  # per curve
SAMPLES = 60
ACTIVE_S = 90  # a run that wrote this lately is going on


def _folders() -> dict[tuple[str, str], Path]:
    found = {}
    for stage in paths.STAGES:
        for folder in (paths.base_dir() / stage).glob("*"):
            if paths.TAG_PATTERN.fullmatch(folder.name) and (folder / "metrics.jsonl").is_file():
                found[stage, folder.name] = folder
    return found


def list_runs() -> list[dict[str, Any]]:
    """Return every run with numbers, the latest first."""
    rows = []
    for (stage, tag), folder in _folders().items():
        written = (folder / "metrics.jsonl").stat().st_mtime
        active = time.time() - written < ACTIVE_S
        rows.append({"stage": stage, "tag": tag, "updated": int(written), "active": active, "last": _last(folder)})
    return sorted(rows, key=lambda row: -row["updated"])


def _last(folder: Path) -> dict[str, Any]:
    """Read the last whole row without reading the file."""
    with open(folder / "metrics.jsonl", "rb") as handle:
        handle.seek(max(0, handle.seek(0, 2) - 8192))
        for line in reversed(handle.read().split(b"\n")[:-1]):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                return {key: row.get(key) for key in ("step", "time_s", "eta_s", "tokens", *CURVES)}
    return {}


def read_run(stage: str, tag: str) -> dict[str, Any] | None:
    """Return the curves as [[step, value], ...], thinned out, and the newest samples; None = no such run."""
    folder = _folders().get((stage, tag))
    if folder is None:
        return None
    rows, samples = read_jsonl(folder / "metrics.jsonl"), read_jsonl(folder / "samples.jsonl")
    curves = {key: _thin([(row["step"], row[key]) for row in rows if _is_point(row, key)]) for key in CURVES}
    return {
        "stage": stage,
        "tag": tag,
        "last": _last(folder),
        "curves": {key: points for key, points in curves.items() if points},
        "samples": _spread(samples, SAMPLES),
    }


def _is_point(row: dict[str, Any], key: str) -> bool:
    value = row.get(key)
    return isinstance(row.get("step"), int) and isinstance(value, (int, float)) and math.isfinite(value)


def _spread(rows: list[Any], most: int) -> list[Any]:
    """Keep at most `most`, evenly spread, the last one among them."""
    if len(rows) <= most:
        return rows
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Average neighbours until at most POINTS are left."""
    size = max(1, math.ceil(len(points) / POINTS))
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
