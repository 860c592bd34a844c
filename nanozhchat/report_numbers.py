"""Numbers of a report as people write them: short, with units, and differences in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

COMPRESSORS = ("gzip", "xz")
UNITS = (" h", " min", " s", " ")  # hours, minutes, seconds, and what stands between


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def count(value: float) -> str:
    """Write a large number briefly: 10.6 M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g} {letter}"
    return f"{value:,.0f}"


def duration(seconds: float, units: Sequence[str] = UNITS) -> str:
    """Write a time as its two largest units: 7 min 30 s."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    pairs = [(hours, units[0]), (m, units[1])] if hours else [(m, units[1]), (s, units[2])]
    return units[3].join(f"{n}{unit}" for n, unit in pairs if n) or f"0{units[2]}"


def percent(share: object) -> str:
    """Write a share of one as a percentage; "-" if there is none."""
    return f"{100 * share:.1f} %" if is_number(share) else "-"


def number(value: float | None, form: str = "{:.4f}") -> str:
    """Write a number in a given form; "-" if there is none."""
    return "-" if value is None else form.format(value)


def margins(base_eval: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Return (compressor, its bits per byte, by how much the model is better) on the same held-out bytes."""
    own, others = base_eval.get("bpb"), base_eval.get("baselines") or {}
    if not is_number(own):
        return []
    return [(name, others[name], others[name] - own) for name in COMPRESSORS if is_number(others.get(name))]


def compare(margin: float, name: str) -> str:
    """Say a margin in words."""
    return f"{abs(margin):.2f} bits per byte {'better' if margin >= 0 else 'worse'} than {name} -9"
