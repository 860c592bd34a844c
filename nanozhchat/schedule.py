"""Schedules: pure functions of progress through training, in [0, 1], or of the step."""


def lr_multiplier(progress: float, warmup: float, warmdown: float, final: float) -> float:
    """Trapezoid: linear warmup, flat, linear warmdown to `final`; all lengths are fractions of the run."""
    if warmup > 0 and progress < warmup:
        return max(progress / warmup, 1e-3)
    if warmdown > 0 and progress > 1 - warmdown:
        left = max(0.0, (1 - progress) / warmdown)
        return left + (1 - left) * final
    return 1.0


def muon_momentum(step: int, start: float, peak: float, ramp_steps: int) -> float:
    """Muon's momentum rises linearly from `start` to `peak` over `ramp_steps` optimizer steps."""
    fraction = min(1.0, step / ramp_steps) if ramp_steps > 0 else 1.0
    return start + (peak - start) * fraction


def decay_multiplier(progress: float) -> float:
    """Weight decay falls linearly to zero over the run."""
    return max(0.0, 1.0 - progress)


def ngram_trust(progress: float) -> float:
    """Share of n-gram counts in what the network is taught: all at the start, nothing at the end (dev/LOG.md)."""
    return max(0.0, 1.0 - progress)


def parse_duration(text: str) -> float:
    """Read "90s", "10m", "1.5h" or "2d" as seconds; raises ValueError on anything else."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    number, unit = text[:-1], text[-1:]
    try:
        seconds = float(number) * units[unit]
    except (KeyError, ValueError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{text!r} is not a duration; write 90s, 10m, 1.5h or 2d")
    return seconds
