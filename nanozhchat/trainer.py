"""The only training loop: pretraining, SFT and RL differ in their batches, objective and hooks.

What goes wrong on one rank is agreed on by all: every step ends in one sum over the ranks that also carries the
signals received, micro-batches that did not fit, and whether the checkpoint in flight is on the disk.
"""

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanozhchat import faults
from nanozhchat.compute import Compute
from nanozhchat.dataloader import Batch, Batches
from nanozhchat.errors import DiskError, DivergedError, OutOfMemoryError, StoppedError
from nanozhchat.gpt import GPT
from nanozhchat.log import Metrics, clock
from nanozhchat.objectives import Loss, next_token
from nanozhchat.optim import Optimizer
from nanozhchat.plan import Hook, Plan, TrainState, for_world
from nanozhchat.recipe import FEW_STEPS
from nanozhchat.schedule import decay_multiplier, lr_multiplier, muon_momentum, ngram_trust
from nanozhchat.watch import LossWatch

log = logging.getLogger(__name__)

LINE_EVERY_S = 2.0  # seconds between console lines
SPEED_SMOOTHING = 0.9
MAX_ROLLBACKS = 3
START_LOSS_SCALE, SCALE_GROWS_AFTER = 2.0**8, 500  # of float16; doubled after so many good steps


def fit(
    model: GPT, optimizer: Optimizer, batches: Batches, objective: Callable[[GPT, Any], Loss], plan: Plan,
    hooks: list[Hook], state: TrainState, compute: Compute, metrics: Metrics,
) -> TrainState:  # fmt: skip
    """Train until the recipe's horizon; returns the final state, saved.

    Raises StoppedError after a signal (saved first), DivergedError when going back does not help, OutOfMemoryError
    when not even single rows fit, DiskError when the last checkpoint cannot be written.
    """
    training = _Training(model, optimizer, batches, objective, plan, hooks, state, compute, metrics)
    try:
        training.run()
    except StoppedError:
        raise training.stop() from None
    if state.step < FEW_STEPS and compute.is_main:
        more = "give it more time" if plan.recipe.budget_s else "take more steps or epochs"
        log.warning("only %d step(s), from which little may be learnt; %s", state.step, more)
    return state


@dataclass
class _Sums:
    """What a step adds up over its micro-batches on this rank, and over ranks in `total`."""

    batches: list[tuple[Batch, Tensor]] = field(default_factory=list)  # and the summed nats of each
    counts: Tensor | None = None  # scored tokens, their bytes
    fed: int = 0  # tokens that went through the network
    waited_s: float = 0.0
    does_not_fit: bool = False

    def total(self, compute: Compute, *flags: float) -> list[float]:
        """Nats, scored tokens, bytes, tokens fed, micro-batches that do not fit and the flags, over all ranks."""
        nats = float(sum(total for _, total in self.batches))
        counts = self.counts.tolist() if self.counts is not None else [0, 0]
        return compute.sum([nats, *map(float, counts), float(self.fed), float(self.does_not_fit), *flags])


@dataclass
class _Training:
    """The state of `fit`."""

    model: GPT
    optimizer: Optimizer
    batches: Batches
    objective: Callable[[GPT, Any], Loss]
    plan: Plan
    hooks: list[Hook]
    state: TrainState
    compute: Compute
    metrics: Metrics

    def __post_init__(self) -> None:
        state, self.recipe, self.checkpoints = self.state, self.plan.recipe, self.plan.checkpoints
        self.peak = self.compute.peak_flops * self.compute.world_size
        self.waited_s = self.rate = self.step_s = self.shown = 0.0  # rate: tokens a second; shown: last console line
        # What came before the first step belongs to the budget, but once: not again after each interruption.
        self.origin = (time.monotonic() if state.step else self.plan.started) - state.time_s
        state.loader = state.loader or self.batches.state_dict()
        state.loss_scale = state.loss_scale or (START_LOSS_SCALE if self.compute.dtype is torch.float16 else 1.0)

    def elapsed(self) -> float:
        """Seconds spent on this run, earlier processes included."""
        return time.monotonic() - self.origin

    def progress(self) -> float:
        """Share of the run done, the same on all ranks: of rank 0's time from the first step on, or of the steps."""
        recipe = self.plan.recipe
        if recipe.budget_s is None:
            return self.state.step / recipe.num_steps
        lead = self.state.lead_s
        done = (self.elapsed() - lead) / max(1e-3, recipe.budget_s - self.state.reserve_s - lead)
        return min(1.0, self.compute.broadcast([done])[0])

    def run(self) -> None:
        """Train to the end."""
        state = self.state
        if state.step == 0:
            before = time.monotonic()
            if values := self.hook_values(last=True):
                row = {"step": 0, "time_s": self.elapsed(), "tokens": 0, "bytes": 0, "flops": 0.0, **values}
                self.metrics.write(row)
                log.info(" | ".join([f"step {state.step:05d}", *_formatted(values)]))
            state.reserve_s = 1.5 * (time.monotonic() - before)
            state.lead_s = self.elapsed()
        self.model.train()
        first = time.monotonic()
        while not state.finished:
            begun, tokens = time.monotonic(), state.tokens
            row = self.step()
            if row is None:
                continue
            self.compute.synchronize()
            row |= self.speed(state.tokens - tokens, time.monotonic() - begun)
            row |= self.hook_values(last=state.finished)
            self.metrics.write(row)
            self.show(row)
        share = self.waited_s / max(1e-9, time.monotonic() - first)
        self.metrics.event("done", step=state.step, time_s=self.elapsed(), data_wait_frac=share)

    def step(self) -> dict[str, Any] | None:
        """Do one optimizer step on every rank; returns its numbers, None if it was not one."""
        state, optimizer = self.state, self.optimizer
        self.take_detour()
        progress = self.progress()
        self.model.ngram_trust = ngram_trust(progress)
        sums = self.accumulate()
        signals, ready = float(bool(self.plan.stop)), float(self.checkpoints.ready)
        total, count, n_bytes, fed, misfits, signals, ready = sums.total(self.compute, signals, ready)
        if signals:
            raise StoppedError("stopped in a step")
        if misfits:
            self.shrink()
            return None
        self.waited_s += sums.waited_s
        scale = 1.0 / max(1.0, count)
        norm = optimizer.reduce(scale / state.loss_scale)
        finite = math.isfinite(total) and math.isfinite(norm)
        recipe = self.recipe
        lr = lr_multiplier(progress, recipe.warmup_frac, recipe.warmdown_frac, recipe.final_lr_frac)
        loss, place = total * scale, state.loader
        state.loader = sums.batches[-1][0].state
        if finite:
            ramp = recipe.momentum_start, recipe.momentum_peak, recipe.momentum_ramp_steps
            optimizer.apply(scale / state.loss_scale, lr_multiplier=lr, momentum=muon_momentum(state.step, *ramp),
                            decay_multiplier=decay_multiplier(progress))  # fmt: skip
        else:
            self.skip(sums, loss, scale)
        state.step += 1
        state.tokens += int(fed)
        state.bytes += int(n_bytes)
        state.flops += float(recipe.flops_per_token) * fed
        state.time_s = self.elapsed()
        wrong = state.watch.see(state.step, loss, finite, place) if self.rescale(finite) else ""
        if wrong:
            self.go_back(wrong)
            return None
        state.finished = self.progress() >= 1.0
        self.save(ready == self.compute.world_size)
        return {
            "step": state.step, "tokens": state.tokens, "bytes": state.bytes, "flops": state.flops,
            "train/loss": loss, "train/bpb": total / math.log(2) / n_bytes if n_bytes else float("nan"),
            "lr": recipe.matrix_lr * lr, "grad_norm": norm, "progress": progress, "data_wait_s": sums.waited_s,
        }  # fmt: skip

    def accumulate(self) -> _Sums:
        """Add up the gradients of this rank's micro-batches, until a signal or one that does not fit."""
        recipe, rank, token_bytes = self.recipe, self.compute.rank, self.plan.token_bytes
        sums, asked = _Sums(), faults.current()
        counts = torch.zeros(2, dtype=torch.long, device=token_bytes.device)
        for _ in range(recipe.grad_accum_steps):
            if self.plan.stop:
                break
            before = time.monotonic()
            batch = next(self.batches)
            sums.waited_s += time.monotonic() - before
            facts = {"step": self.state.step + 1, "rank": rank, "row": int(batch.state.get("rows", 0))}
            facts["device_batch"] = recipe.device_batch_size
            for kind, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
                if asked.hit(kind, **facts):
                    faults.kill(number)
            try:
                if asked.hit("oom", **facts):
                    raise torch.OutOfMemoryError("a fault that was asked for")
                loss = self.objective(self.model, batch)
                scaled = loss.total * (math.nan if asked.hit("nan", **facts) else 1.0)
                (scaled * self.state.loss_scale).backward()
            except torch.OutOfMemoryError:
                sums.does_not_fit = True
                break
            sums.batches.append((batch, scaled.detach()))
            sums.fed += batch.inputs.numel()
            counts[0] += loss.count
            counts[1] += (token_bytes[batch.targets.clamp(min=0)] * (batch.targets >= 0)).sum()
        sums.counts = counts
        return sums

    def shrink(self) -> None:
        """Try the step again with half the rows a micro-batch: the same rows in all, the same loss."""
        old = self.recipe
        self.optimizer.discard()
        self.compute.free_cache()
        if old.device_batch_size == 1:
            raise OutOfMemoryError(f"not even one row of {old.sequence_len} tokens fits in memory; pass a smaller "
                                   "--max-seq-len or --depth, or --grad-checkpoint")  # fmt: skip
        self.recipe = for_world(old, old.world_size, device_batch_size=old.device_batch_size // 2)
        self.batches.seek(self.state.loader, self.recipe.device_batch_size)
        sizes = {"device_batch": self.recipe.device_batch_size, "grad_accum_steps": self.recipe.grad_accum_steps}
        self.metrics.event("out_of_memory", step=self.state.step, **sizes)
        log.warning("out of memory with %d rows; going on with %d rows x %d", old.device_batch_size, *sizes.values())

    def skip(self, sums: _Sums, loss: float, scale: float) -> None:
        """Leave the weights alone; write down the documents at hand and the norms of each layer."""
        norms = self.optimizer.layer_norms(scale / self.state.loss_scale)
        bad = [batch for batch, total in sums.batches if not math.isfinite(float(total))]
        documents = sorted({d for batch in bad or [b for b, _ in sums.batches] for d in batch.documents})
        everyone: list[Any] = self.compute.gather(documents)
        self.optimizer.discard()
        self.state.skipped += 1
        self.metrics.event(
            "skip", step=self.state.step + 1, loss=str(loss), documents=sorted({d for part in everyone for d in part}),
            gradient_norms={layer: norm if math.isfinite(norm) else str(norm) for layer, norm in norms.items()},
        )  # fmt: skip
        log.warning("step %d skipped: loss or gradient is not finite", self.state.step + 1)

    def rescale(self, finite: bool) -> bool:
        """Adapt the loss scale of float16; returns whether the step says something about the training itself."""
        state = self.state
        if self.compute.dtype is not torch.float16:
            return True
        state.scaled_steps = state.scaled_steps + 1 if finite else 0
        if finite and state.scaled_steps % SCALE_GROWS_AFTER == 0:
            state.loss_scale *= 2
        elif not finite and state.loss_scale > 1:
            state.loss_scale /= 2
            return False
        return True

    def take_detour(self) -> None:
        """Step over a stretch of data that made training go wrong before."""
        for detour in self.state.detours:
            if detour["from"] == self.state.loader:
                self.batches.seek(detour["to"], self.recipe.device_batch_size)
                self.state.loader = detour["to"]
                self.metrics.event("detour", step=self.state.step)

    def go_back(self, wrong: str) -> None:
        """Return to the last checkpoint before the trouble, and remember to step over the data since."""
        state = self.state
        with contextlib.suppress(DiskError):
            self.checkpoints.commit()
        if state.rollbacks >= MAX_ROLLBACKS:
            raise DivergedError(f"{wrong}, after {state.rollbacks} rollbacks; lower the learning rate or look at the "
                                "data of these steps in events.jsonl")  # fmt: skip
        since, place = state.watch.trouble()
        rows = [place.get("rows"), state.loader.get("rows")]
        detours = [*state.detours, {"from": place, "to": state.loader}]
        saved = self.checkpoints.go_back(since - 1)
        kept = {"rollbacks": state.rollbacks + 1, "detours": detours, "skipped": state.skipped}
        kept |= {"loss_scale": state.loss_scale, "reserve_s": state.reserve_s}
        if saved is None:  # nothing to go back to: the steps were skipped, so leave the data behind and go on
            kept |= {"watch": LossWatch()}
        state.__dict__.update({**vars(TrainState.from_dict(saved) if saved else state), **kept})
        self.batches.seek(state.loader, self.recipe.device_batch_size)
        self.checkpoints.remember(rollbacks=state.rollbacks, detours=detours)
        self.metrics.event("rollback", step=state.step, trouble_since=since, reason=wrong, rows=rows)
        log.warning("%s: back to step %d, rows %s to %s of the data will be stepped over", wrong, state.step, *rows)

    def save(self, ready: bool) -> None:
        """Commit the checkpoint in flight when all ranks have written it; start one if it is time."""
        state = self.state
        due = state.finished or (self.plan.save_every and state.step % self.plan.save_every == 0)
        try:
            if ready:
                self.checkpoints.commit()
            if due:
                self.begin_checkpoint()
            if state.finished:
                self.checkpoints.commit()
        except DiskError as error:
            self.metrics.event("save_failed", step=state.step, error=str(error))
            if state.finished:
                raise
            log.warning("%s; training goes on and saves again later", error)

    def begin_checkpoint(self) -> None:
        """Start writing what a resumed run needs."""
        self.checkpoints.begin({**self.state.to_dict(), "recipe": self.recipe.to_dict()})

    def stop(self) -> StoppedError:
        """Save where the last whole step left off."""
        state = self.state
        self.optimizer.discard()
        state.time_s = self.elapsed()
        if state.step == 0:
            return StoppedError("stopped before the first step; the same command starts again")
        self.begin_checkpoint()
        self.checkpoints.commit()
        self.metrics.event("stop", step=state.step)
        return StoppedError(f"stopped at step {state.step}, everything is saved; the same command continues")

    def hook_values(self, *, last: bool) -> dict[str, float]:
        """Run the hooks that are due."""
        values: dict[str, float] = {}
        for hook in self.hooks:
            if hook.due(self.state.step, last):
                values |= hook.action(self.state)
        return values

    def speed(self, tokens: int, seconds: float) -> dict[str, float]:
        """Return the figures of a step's pace, smoothed, and the time left."""
        state, recipe, compute = self.state, self.recipe, self.compute
        old = SPEED_SMOOTHING if self.step_s else 0.0
        self.rate = old * self.rate + (1 - old) * tokens / max(seconds, 1e-9)
        self.step_s = old * self.step_s + (1 - old) * seconds
        flops = recipe.flops_per_token * self.rate
        if self.peak and compute.device.type == "cpu":  # it was measured, and the machine may have been busy then
            self.peak = max(self.peak, flops)
        if recipe.budget_s is not None:
            eta = recipe.budget_s - state.time_s
        else:
            eta = (recipe.num_steps - state.step) * self.step_s
        mfu = flops / self.peak if self.peak else 0.0
        figures = {"time_s": state.time_s, "tok_per_sec": self.rate, "mfu": mfu, "mem_bytes": compute.memory_bytes()}
        return {**figures, "eta_s": max(0.0, eta)}

    def show(self, row: dict[str, float]) -> None:
        """Print the line that people read, now and then."""
        state, recipe, evaluated = self.state, self.plan.recipe, "val/bpb" in row or "val/pass@1" in row
        if not (state.finished or evaluated or time.monotonic() - self.shown > LINE_EVERY_S):
            return
        self.shown = time.monotonic()
        end = f"{recipe.num_steps:05d}" if recipe.budget_s is None else f"{100 * row['progress']:.0f} %"
        parts = [f"step {state.step:05d}/{end}", f"loss {row['train/loss']:.4f}",
                 f"ppl {math.exp(min(50.0, row['train/loss'])):.1f}", f"bpb {row['train/bpb']:.4f}",
                 f"tok/s {row['tok_per_sec']:,.0f}", *([f"mfu {100 * row['mfu']:.0f} %"] if row["mfu"] else []),
                 f"eta {clock(row['eta_s'])}", *_formatted(row)]  # fmt: skip
        del parts[2 : 4 if self.objective is not next_token else 2]  # of other objectives they mean nothing
        log.info(" | ".join(parts))


def _formatted(row: dict[str, float]) -> list[str]:
    shown = {"val/loss": "val loss {:.4f}", "val/bpb": "val bpb {:.4f}", "val/ppl": "val ppl {:.1f}",
             "train/reward": "reward {:.3f}", "val/pass@1": "held-out pass@1 {:.3f}"}  # fmt: skip
    return [text.format(row[key]) for key, text in shown.items() if key in row]
