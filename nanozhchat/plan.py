"""What a training run is given and what it carries along: plan, hooks, state, signals."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from nanozhchat.checkpoint import Checkpoints
from nanozhchat.recipe import Recipe
from nanozhchat.watch import LossWatch


@dataclass
class TrainState:
    """Everything that a resumed run needs besides weights and optimizer; plain JSON types."""

    step: int = 0
    time_s: float = 0.0
    tokens: int = 0
    bytes: int = 0
    flops: float = 0.0
    skipped: int = 0
    best_val: float | None = None
    best_step: int | None = None
    reserve_s: float = 0.0  # of a wall-clock budget, kept for the work after the last step
    lead_s: float = 0.0  # of it, spent before the first step: schedules begin there
    finished: bool = False
    loss_scale: float = 0.0  # of float16; 0 = not decided yet
    scaled_steps: int = 0  # good ones since the scale changed
    rollbacks: int = 0
    detours: list[dict[str, Any]] = field(default_factory=list)  # bad stretches of data: loader states from, to
    watch: LossWatch = field(default_factory=LossWatch)
    loader: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        """Read back what `to_dict` gave; keys of others are ignored."""
        known: dict[str, Any] = {k: v for k, v in values.items() if k in cls.__dataclass_fields__}
        known["watch"] = LossWatch(**known.get("watch", {}))
        return cls(**known)


@dataclass(frozen=True)
class Hook:
    """Work between steps: `action` runs before the first step, every `every` steps (0 = never) and at the end.

    It returns numbers to record with the step (may be empty). All ranks run it together.
    """

    every: int
    action: Callable[[TrainState], dict[str, float]]

    def due(self, step: int, last: bool) -> bool:
        """Whether to run after `step` optimizer steps."""
        return self.every > 0 and (last or step % self.every == 0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long, at what pace, and where to save.

    started: `time.monotonic()` when the command began: a wall-clock budget counts from there, once.
    stop: signals received so far; it grows while the loop runs.
    """

    recipe: Recipe
    token_bytes: Tensor
    checkpoints: Checkpoints
    save_every: int
    started: float
    stop: Sequence[int] = ()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM, SIGINT, SIGUSR1 and SIGHUP (a closed terminal) instead of dying; a second SIGINT ends at once.

    Under nohup, which ignores SIGHUP, it stays ignored.
    """
    received: list[int] = []

    def handle(number: int, _frame: object) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            os.write(2, b"stopped at once; the last checkpoint is untouched\n")
            os._exit(130)
        received.append(number)

    hang_up = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, *hang_up)
    old = {name: signal.signal(name, handle) for name in names}
    try:
        yield received
    finally:
        for name, handler in old.items():
            signal.signal(name, handler)


def for_world(recipe: Recipe, world_size: int, device_batch_size: int | None = None) -> Recipe:
    """Spread the same total batch over a number of ranks, with at most so many rows a micro-batch.

    Raises ValueError if it does not divide.
    """
    rows = recipe.total_batch_size // recipe.sequence_len
    if rows % world_size:
        raise ValueError(f"total_batch_size={recipe.total_batch_size} is {rows} rows, which {world_size} ranks cannot "
                         "share evenly; resume with a number of ranks that divides it")  # fmt: skip
    each, most = rows // world_size, device_batch_size or recipe.device_batch_size
    device = max(size for size in range(1, each + 1) if each % size == 0 and size <= most)
    return replace(recipe, world_size=world_size, device_batch_size=device, grad_accum_steps=each // device)
