"""The only training loop: pretraining, SFT and RL differ in their batches, objective and hooks."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanozhchat.compute import Compute
from nanozhchat.dataloader import Batch
from nanozhchat.errors import DivergedError, OutOfMemoryError, StoppedError
from nanozhchat.gpt import GPT
from nanozhchat.log import Metrics, clock
from nanozhchat.objectives import Loss
from nanozhchat.optim import Optimizer
from nanozhchat.recipe import Recipe
from nanozhchat.schedule import decay_multiplier, lr_multiplier, muon_momentum

log = logging.getLogger(__name__)

LINE_EVERY_S = 2.0  # seconds between console lines
SKIP_WINDOW, MAX_SKIPS = 50, 5  # more bad steps than this among so many means that training has diverged
SPEED_SMOOTHING = 0.9


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
    reserve_s: float = 0.0  # of a wall-clock budget, kept for the work after the last step
    finished: bool = False
    loader: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


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
    """How long, at what pace, and what to do on saving.

    started: `time.monotonic()` when the command began: a wall-clock budget counts from there.
    save: commits a checkpoint of the given state; collective.
    """

    recipe: Recipe
    token_bytes: Tensor
    save: Callable[[TrainState], None]
    save_every: int
    started: float


class _Clock:
    """Time spent on this run, earlier processes included, and the progress that schedules follow."""

    def __init__(self, plan: Plan, state: TrainState, compute: Compute) -> None:
        self.plan, self.state, self.compute = plan, state, compute
        self.origin = plan.started - state.time_s

    def elapsed(self) -> float:
        return time.monotonic() - self.origin

    def progress(self, step: int) -> float:
        """Share of the run done, the same on all ranks: of the budget by rank 0's clock, else of the steps."""
        recipe = self.plan.recipe
        if recipe.budget_s is None:
            return step / recipe.num_steps
        left = self.elapsed() / max(1e-3, recipe.budget_s - self.state.reserve_s)
        return min(1.0, self.compute.broadcast([left])[0])


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM, SIGINT and SIGUSR1 instead of dying; a second SIGINT ends the process at once."""
    received: list[int] = []

    def handle(number: int, _frame: object) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            sys.stderr.write("stopped at once; the last checkpoint is untouched\n")
            os._exit(130)
        received.append(number)

    names = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    old = {name: signal.signal(name, handle) for name in names}
    try:
        yield received
    finally:
        for name, handler in old.items():
            signal.signal(name, handler)


def fit(
    model: GPT,
    optimizer: Optimizer,
    batches: Iterator[Batch],
    objective: Callable[[GPT, Batch], Loss],
    plan: Plan,
    hooks: list[Hook],
    state: TrainState,
    compute: Compute,
    metrics: Metrics,
) -> TrainState:
    """Train until the recipe's horizon; returns the final state, saved.

    Raises StoppedError after a signal (saved first), DivergedError when too many steps are not finite,
    OutOfMemoryError with advice when a micro-batch does not fit.
    """
    timer = _Clock(plan, state, compute)
    if state.step == 0:
        before = time.monotonic()
        _run_hooks(hooks, state, timer, metrics, last=True)
        state.reserve_s = 1.5 * (time.monotonic() - before)
    skips: deque[int] = deque(maxlen=MAX_SKIPS + 1)
    line = _Line(plan, compute)
    model.train()
    with stop_signals() as signals:
        while not state.finished:
            progress = timer.progress(state.step)
            begun = time.monotonic()
            row = _step(model, optimizer, batches, objective, plan, state, compute, progress, len(signals))
            compute.synchronize()
            stopping = row.pop("stopping")
            if row.pop("skipped"):
                skips.append(state.step)
                metrics.event("skip", step=state.step, loss=str(row["train/loss"]))
                log.warning("step %d skipped: loss or gradient is not finite", state.step)
                if len(skips) > MAX_SKIPS and state.step - skips[0] < SKIP_WINDOW:
                    raise DivergedError(f"{len(skips)} of the last {SKIP_WINDOW} steps were not finite; lower the "
                                        "learning rate or look at the data of these steps in events.jsonl")  # fmt: skip
            state.time_s = timer.elapsed()
            state.finished = timer.progress(state.step) >= 1.0
            done = state.finished or stopping
            if done or (plan.save_every and state.step % plan.save_every == 0):
                plan.save(state)
                metrics.event("save", step=state.step)
            row |= line.speed(state, time.monotonic() - begun, timer)
            if not stopping:
                row |= _hook_values(hooks, state, last=state.finished)
            metrics.write(row)
            line.show(row, state, force=done)
            if stopping and not state.finished:
                metrics.event("stop", step=state.step)
                raise StoppedError(f"stopped at step {state.step}, everything is saved; the same command continues")
    metrics.event("done", step=state.step, time_s=timer.elapsed())
    return state


def _accumulate(
    model: GPT, batches: Iterator[Batch], objective: Callable[[GPT, Batch], Loss], plan: Plan, state: TrainState
) -> list[float]:
    """Add up the gradients of this rank's micro-batches; returns summed nats, scored tokens and their bytes."""
    recipe, device = plan.recipe, plan.token_bytes.device
    nats = torch.zeros((), device=device)
    counts = torch.zeros(2, dtype=torch.long, device=device)
    try:
        for _ in range(recipe.grad_accum_steps):
            batch = next(batches)
            loss = objective(model, batch)
            loss.total.backward()
            nats += loss.total.detach()
            scored = batch.targets >= 0
            counts[0] += loss.count
            counts[1] += (plan.token_bytes[batch.targets.clamp(min=0)] * scored).sum()
            state.loader = batch.state
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"a micro-batch of {recipe.device_batch_size} x {recipe.sequence_len} tokens does not fit; pass "
            f"--device-batch-size={max(1, recipe.device_batch_size // 2)} (same result, less memory)"
        ) from error
    return [float(nats), float(counts[0]), float(counts[1])]


def _step(
    model: GPT,
    optimizer: Optimizer,
    batches: Iterator[Batch],
    objective: Callable[[GPT, Batch], Loss],
    plan: Plan,
    state: TrainState,
    compute: Compute,
    progress: float,
    signals: int,
) -> dict[str, Any]:
    """Do one optimizer step over `grad_accum_steps` micro-batches on every rank; returns the numbers of the step."""
    recipe = plan.recipe
    sums = _accumulate(model, batches, objective, plan, state)
    total, count, n_bytes, stopping = compute.sum([*sums, float(signals)])
    scale = 1.0 / max(1.0, count)
    norm = optimizer.reduce(scale)
    lr = lr_multiplier(progress, recipe.warmup_frac, recipe.warmdown_frac, recipe.final_lr_frac)
    skipped = not (math.isfinite(total) and math.isfinite(norm))
    if skipped:
        optimizer.discard()
        state.skipped += 1
    else:
        momentum = muon_momentum(state.step, recipe.momentum_start, recipe.momentum_peak, recipe.momentum_ramp_steps)
        decay = decay_multiplier(progress)
        optimizer.apply(scale, lr_multiplier=lr, momentum=momentum, decay_multiplier=decay)
    state.step += 1
    state.tokens += recipe.total_batch_size
    state.bytes += int(n_bytes)
    state.flops += float(recipe.flops_per_token) * recipe.total_batch_size
    return {
        "step": state.step,
        "time_s": 0.0,
        "tokens": state.tokens,
        "bytes": state.bytes,
        "flops": state.flops,
        "train/loss": total * scale,
        "train/bpb": total / math.log(2) / n_bytes if n_bytes else float("nan"),
        "lr": recipe.matrix_lr * lr,
        "grad_norm": norm,
        "progress": progress,
        "skipped": skipped,
        "stopping": stopping > 0,
    }


def _hook_values(hooks: list[Hook], state: TrainState, *, last: bool) -> dict[str, float]:
    values: dict[str, float] = {}
    for hook in hooks:
        if hook.due(state.step, last):
            values |= hook.action(state)
    return values


def _run_hooks(hooks: list[Hook], state: TrainState, timer: _Clock, metrics: Metrics, *, last: bool) -> None:
    values = _hook_values(hooks, state, last=last)
    if values:
        metrics.write({"step": state.step, "time_s": timer.elapsed(), "tokens": 0, "bytes": 0, "flops": 0.0, **values})
        log.info("step %05d | %s", state.step, _format_values(values))


def _format_values(row: dict[str, float]) -> str:
    shown = {"val/loss": "val loss {:.4f}", "val/bpb": "val bpb {:.4f}", "val/ppl": "val ppl {:.1f}"}
    return " | ".join(text.format(row[key]) for key, text in shown.items() if key in row)


class _Line:
    """Speed, time left, and the console line that people read."""

    def __init__(self, plan: Plan, compute: Compute) -> None:
        self.plan, self.compute = plan, compute
        self.rate = 0.0
        self.shown = 0.0

    def speed(self, state: TrainState, seconds: float, timer: _Clock) -> dict[str, float]:
        recipe, compute = self.plan.recipe, self.compute
        now = recipe.total_batch_size / max(seconds, 1e-9)
        self.rate = now if self.rate == 0 else SPEED_SMOOTHING * self.rate + (1 - SPEED_SMOOTHING) * now
        peak = compute.peak_flops * compute.world_size
        if recipe.budget_s is not None:
            eta = recipe.budget_s - state.time_s
        else:
            eta = (recipe.num_steps - state.step) * recipe.total_batch_size / self.rate
        return {
            "time_s": state.time_s,
            "tok_per_sec": self.rate,
            "mfu": recipe.flops_per_token * self.rate / peak if peak else 0.0,
            "mem_bytes": compute.memory_bytes(),
            "eta_s": max(0.0, eta),
        }

    def show(self, row: dict[str, float], state: TrainState, *, force: bool) -> None:
        evaluated = "val/bpb" in row
        if not (force or evaluated or time.monotonic() - self.shown > LINE_EVERY_S):
            return
        self.shown = time.monotonic()
        recipe = self.plan.recipe
        end = f"{recipe.num_steps:05d}" if recipe.budget_s is None else f"{100 * row['progress']:.0f} %"
        parts = [
            f"step {state.step:05d}/{end}",
            f"loss {row['train/loss']:.4f}",
            f"ppl {math.exp(min(50.0, row['train/loss'])):.1f}",
            f"bpb {row['train/bpb']:.4f}",
            f"tok/s {row['tok_per_sec']:,.0f}",
            *([f"mfu {100 * row['mfu']:.0f} %"] if row["mfu"] else []),
            f"eta {clock(row['eta_s'])}",
            *([_format_values(row)] if evaluated else []),
        ]
        log.info(" | ".join(parts))
