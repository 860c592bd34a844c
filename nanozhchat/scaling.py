"""Scaling laws from finished runs: iso-FLOP parabolas, best sizes, power laws, each with a 95 % interval.

The method of arXiv 2203.15556, section 3.2; intervals from a bootstrap of the parabolas' residuals.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 1000  # of the bootstrap
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sweep:
    """Runs of one budget. x: log parameters, y: bits per byte; per_token: log FLOPs of a token as a line over x."""

    flops: float
    x: Array
    y: Array
    per_token: Array

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> "Sweep":
        """Make one of rows of the table."""
        columns = ([r[k] for r in rows] for k in ("scaling_params", "bpb", "flops", "tokens"))
        x, y, flops, tokens = (np.array(column, float) for column in columns)
        line = np.polyfit(np.log(x), np.log(flops / tokens), 1) if len(x) > 1 else np.zeros(2)
        return cls(float(flops.mean()), np.log(x), y, line)

    def fit(self, y: Array) -> Array:
        """Return the coefficients of the parabola through y; NaN for fewer than three sizes."""
        return np.polyfit(self.x, y, 2) if len(self.x) > 2 else np.full(3, np.nan)

    def best(self, y: Array) -> Array:
        """Return (log parameters, log tokens, bits per byte) at the lowest point; NaN if it isn't between the runs."""
        a, b, c = self.fit(y)
        at = -b / (2 * a) if a > 0 else np.nan
        inside = self.x.min() <= at <= self.x.max()
        point = (at, np.log(self.flops) - np.polyval(self.per_token, at), c - b * b / 4 / a)
        return np.array(point) if inside else np.full(3, np.nan)

    def resampled(self, rng: np.random.Generator) -> Array:
        """Return the parabola with its own residuals, drawn anew and widened for the three numbers that were fitted."""
        smooth, n = np.polyval(self.fit(self.y), self.x), len(self.x)
        return smooth + rng.choice((self.y - smooth) * np.sqrt(n / (n - 3)), n)

    def drawn(self) -> list[list[float]]:
        """Return points and parabola: x, y, x, y."""
        line = np.linspace(self.x.min(), self.x.max(), 50)
        return [a.tolist() for a in (np.exp(self.x), self.y, np.exp(line), np.polyval(self.fit(self.y), line))]


def power_law(x: Array, y: Array) -> Array:
    """Fit y = exponent * x + log factor to logarithms, where both are known; NaN for fewer than two points."""
    known = np.isfinite(x) & np.isfinite(y)
    return np.polyfit(x[known], y[known], 1) if known.sum() > 1 else np.full(2, np.nan)


def laws(sweeps: Sequence[Sweep], rng: np.random.Generator) -> dict[str, Any]:
    """Return the best size of every budget and the laws through them; intervals need four sizes of every budget."""
    flops = np.log([s.flops for s in sweeps])
    points = np.array([s.best(s.y) for s in sweeps])
    n = DRAWS if all(len(s.x) > 3 for s in sweeps) else 0
    draws = np.array([[s.best(s.resampled(rng)) for s in sweeps] for _ in range(n)]).reshape(n, len(sweeps), 3)
    out: dict[str, Any] = {"optima": []}
    for i, (params, tokens, bpb) in enumerate(points):
        sizes = {"params": float(np.exp(params)), "tokens": float(np.exp(tokens)), "bpb": float(bpb)}
        known = sizes if np.isfinite(bpb) else dict.fromkeys(sizes)
        out["optima"].append({"flops": sweeps[i].flops, **known, "params_95": _interval(np.exp(draws[:, i, 0]))})
    for k, name in enumerate(("params", "tokens")):
        slopes = np.array([power_law(flops, d[:, k])[0] for d in draws])
        out[name] = _law(power_law(flops, points[:, k]), _interval(slopes))
    return out


def _interval(values: Array) -> list[float] | None:
    """Return the middle 95 % of the draws; None if most of them gave no number."""
    known = values[np.isfinite(values)]
    return np.percentile(known, (2.5, 97.5)).tolist() if len(known) > DRAWS / 2 else None


def _law(fit: Array, interval: list[float] | None) -> dict[str, Any] | None:
    """Return a law for JSON; None if there were too few points for one."""
    known = np.isfinite(fit).all()
    return {"exponent": float(fit[0]), "factor": float(np.exp(fit[1])), "exponent_95": interval} if known else None
