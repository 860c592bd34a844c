"""When training goes wrong: too many steps that are not finite, or a loss that leaps and stays up."""

from dataclasses import dataclass, field
from typing import Any

SKIP_WINDOW, MAX_SKIPS = 50, 5  # more bad steps than this among so many steps are one too many
SPIKE_SIGMAS, SPIKE_STEPS = 5.0, 20  # a loss above the mean by so much, so many steps in a row
SMOOTHING, WARMUP = 0.98, 100  # of mean and variance; steps before they are trusted
SIGMA_FLOOR = 0.02  # nats


@dataclass
class LossWatch:
    """Running figures of the loss, plain JSON types; `place` is where in the data a step began."""

    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0
    skips: list[list[Any]] = field(default_factory=list)  # [step, place] of the bad steps in the window
    high: list[list[Any]] = field(default_factory=list)  # of the current leap

    def see(self, step: int, loss: float, finite: bool, place: dict[str, Any]) -> str:
        """Take in a step; returns what is wrong, or nothing."""
        self.skips = [entry for entry in self.skips if step - entry[0] < SKIP_WINDOW]
        if not finite:
            self.skips.append([step, place])
            many = len(self.skips) > MAX_SKIPS
            return f"{len(self.skips)} of the last {SKIP_WINDOW} steps were not finite" if many else ""
        sigma = max(SIGMA_FLOOR, self.variance**0.5)
        if self.seen >= WARMUP and loss > self.mean + SPIKE_SIGMAS * sigma:
            self.high.append([step, place if not self.high else {}])
            leapt = f"the loss leapt from {self.mean:.3f} to {loss:.3f} and stayed up for {SPIKE_STEPS} steps"
            return leapt if len(self.high) >= SPIKE_STEPS else ""
        self.high = []
        self.seen += 1
        weight = max(1 - SMOOTHING, 1 / self.seen)
        difference = loss - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference * difference)
        return ""

    def trouble(self) -> tuple[int, dict[str, Any]]:
        """Step at which the trouble at hand began, and its place in the data."""
        step, place = self.high[0] if len(self.high) >= SPIKE_STEPS else self.skips[0]
        return step, place
