"""The training loop: resuming changes nothing, ranks change nothing, bad batches do no harm, clocks are kept."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanozhchat import compute as compute_module
from nanozhchat import files, trainer
from nanozhchat.compute import Compute
from nanozhchat.dataloader import Batch
from nanozhchat.errors import DivergedError, OutOfMemoryError, StoppedError
from nanozhchat.gpt import GPT
from nanozhchat.objectives import Loss, next_token
from nanozhchat.optim import Optimizer, param_groups
from nanozhchat.recipe import Recipe
from nanozhchat.run import for_world, gpt_config, open_run
from nanozhchat.trainer import Hook, Plan, TrainState, fit
from tests.conftest import make_model, make_recipe, run_ranks

CPU = Compute(torch.device("cpu"))
IDENTITY = {"data_hash": "abc"}
TOKEN_BYTES = torch.arange(100) % 4


class Killed(BaseException):
    """Stands for the process being killed: nothing catches it."""


def row(index: int) -> tuple[Tensor, Tensor]:
    """Row `index` of an endless, learnable data set; the share of scored targets differs from row to row."""
    g = torch.Generator().manual_seed(index)
    start, length = torch.randint(0, 50, (1,), generator=g), int(torch.randint(2, 17, (1,), generator=g))
    ids = (start + torch.arange(17) * 3) % 100
    return ids[:-1], torch.where(torch.arange(16) < length, ids[1:], -1)


class Loader:
    """The next rows in order, shared by the ranks, as the real loader does; `before(row)` runs at each micro-batch."""

    def __init__(self, compute: Compute, position: int, rows: int, before: Callable[[int], Any]) -> None:
        self.compute, self.position, self.rows, self.before = compute, position, rows, before

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.before(self.position)
        first = self.position + self.compute.rank * self.rows
        inputs, targets = zip(*(row(first + i) for i in range(self.rows)), strict=True)
        self.position += self.compute.world_size * self.rows
        return Batch(torch.stack(inputs), torch.stack(targets), 0, {"position": self.position})


def train(
    tag: str,
    *,
    compute: Compute = CPU,
    recipe: Recipe | None = None,
    hooks: list[Hook] | None = None,
    before: Callable[[int], Any] = lambda row: None,
    objective: Callable[[GPT, Batch], Loss] = next_token,
    save_every: int = 3,
    started: float | None = None,
    resume: bool = True,
) -> tuple[TrainState, GPT, Path]:
    """Do what the scripts do: open the run, build or restore, fit."""
    made = recipe or for_world(make_recipe(), compute.world_size)
    with open_run("base", tag, IDENTITY, compute, resume=resume) as run:
        made = run.recipe(lambda: made)
        model = make_model(gpt_config(made))
        optimizer = Optimizer(param_groups(model, made), compute)
        if run.saved is not None:
            run.restore(model, optimizer)
        loader = Loader(compute, run.state.loader.get("position", 0), made.device_batch_size, before)
        plan = Plan(
            recipe=made,
            token_bytes=TOKEN_BYTES,
            save=run.saver(model, optimizer, made),
            save_every=save_every,
            started=time.monotonic() if started is None else started,
        )
        state = fit(model, optimizer, loader, objective, plan, hooks or [], run.state, compute, run.metrics)
        return state, model, run.folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    return files.read_jsonl(folder / "metrics.jsonl")


def events(folder: Path) -> list[str]:
    return [e["event"] for e in files.read_jsonl(folder / "events.jsonl")]


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["train/loss"], r["grad_norm"]) for r in metrics(folder)]


def same_weights(a: GPT, b: GPT) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, GPT, list[tuple[int, float, float]]]:
    """A run of 20 steps that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOZHCHAT_BASE_DIR", str(tmp_path_factory.mktemp("undisturbed")))
        state, model, folder = train("d2")
        return state, model, losses(folder)


def test_an_undisturbed_run_learns_and_is_saved_as_finished(undisturbed: Any) -> None:
    state, _, rows = undisturbed
    assert (state.step, state.finished, state.skipped) == (20, True, 0)
    assert (state.tokens, state.loader) == (20 * 64, {"position": 80})
    assert [step for step, _, _ in rows] == list(range(1, 21))
    assert rows[-1][1] < 0.6 * rows[0][1]


@pytest.mark.parametrize("kill_at", [0, 10, 14, 24, 78])
def test_a_killed_run_continues_with_the_same_losses_and_weights_bit_for_bit(undisturbed: Any, kill_at: int) -> None:
    def kill(row: int) -> None:
        if row == kill_at:
            raise Killed

    with pytest.raises(Killed):
        train("d2", before=kill)
    state, model, folder = train("d2")
    assert losses(folder) == undisturbed[2]
    assert same_weights(model, undisturbed[1])
    assert (state.tokens, state.bytes, state.loader) == (
        undisturbed[0].tokens,
        undisturbed[0].bytes,
        undisturbed[0].loader,
    )
    assert events(folder)[-1] == "done"
    assert ("resume" in events(folder)) == (kill_at >= 12)


def test_a_run_killed_while_saving_continues_from_the_checkpoint_before(
    undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = files.backend.fsync_dir, []

    def die(path: Path) -> None:
        calls.append(path)
        if path.name.startswith("step_00000006.tmp"):
            raise Killed
        real(path)

    monkeypatch.setattr(files.backend, "fsync_dir", die, raising=False)
    with pytest.raises(Killed):
        train("d2")
    monkeypatch.undo()
    monkeypatch.setenv("NANOZHCHAT_BASE_DIR", str(calls[0].parents[1 if calls[0].parent.name == "base" else 2]))
    _, model, folder = train("d2")
    assert losses(folder) == undisturbed[2]
    assert same_weights(model, undisturbed[1])
    assert not list(folder.glob("*.tmp*"))


def test_a_finished_run_does_nothing_more(undisturbed: Any) -> None:
    train("d2")
    state, model, folder = train("d2", before=lambda row: pytest.fail("asked for data"))
    assert state.finished
    assert same_weights(model, undisturbed[1])
    assert losses(folder) == undisturbed[2]


def test_without_resume_an_earlier_run_is_kept_aside(undisturbed: Any, base_dir: Path) -> None:
    train("d2")
    _, model, folder = train("d2", resume=False)
    assert losses(folder) == undisturbed[2]
    assert same_weights(model, undisturbed[1])
    aside = list((base_dir / "base").glob("d2.old-*"))
    assert len(aside) == 1
    assert losses(aside[0]) == undisturbed[2]


def test_a_run_with_other_settings_is_refused_with_the_difference() -> None:
    train("d2")
    with (
        pytest.raises(ValueError, match="data_hash: saved 'abc', now 'xyz'.*--no-resume"),
        open_run("base", "d2", {"data_hash": "xyz"}, CPU, resume=True),
    ):
        pass


def test_the_loss_is_the_mean_over_all_scored_tokens_of_the_step() -> None:
    _, _, folder = train("d2")
    model = make_model(gpt_config(make_recipe()))
    inputs, targets = (torch.stack(x) for x in zip(*(row(i) for i in range(4)), strict=True))
    assert len({int((t >= 0).sum()) for t in targets.split(2)}) == 2  # micro-batches differ in what is scored
    logits = model.logits(model.hidden(inputs)).flatten(0, 1)
    mean = F.cross_entropy(logits, targets.flatten(), ignore_index=-1)
    mean.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    first = metrics(folder)[0]
    assert first["train/loss"] == pytest.approx(float(mean.detach()), rel=1e-5)
    assert first["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    scored = targets[targets >= 0]
    n_bytes = int(TOKEN_BYTES[scored].sum())
    assert first["bytes"] == n_bytes
    assert first["train/bpb"] == pytest.approx(float(mean.detach()) * len(scored) / math.log(2) / n_bytes, rel=1e-5)


def test_how_a_batch_is_cut_into_micro_batches_changes_nothing(undisturbed: Any) -> None:
    recipe = make_recipe(device_batch_size=4, grad_accum_steps=1)
    _, model, folder = train("d2", recipe=recipe)
    for got, want in zip(losses(folder), undisturbed[2], strict=True):
        assert got == pytest.approx(want, rel=1e-4)
    for p, q in zip(model.parameters(), undisturbed[1].parameters(), strict=True):
        assert (p - q).norm() <= 3e-3 * q.norm()  # AdamW makes much of the last digit of a tiny gradient


def test_two_ranks_train_as_one_and_a_run_may_move_between_them(undisturbed: Any, base_dir: Path) -> None:
    run_ranks("tests.test_trainer", str(base_dir), nproc=2)
    two = json.loads((base_dir / "losses.json").read_text())
    assert [step for step, _, _ in two] == list(range(1, 21))
    for got, want in zip(two, undisturbed[2], strict=True):
        assert got[1] == pytest.approx(want[1], abs=1e-5)
    weights = load_file(base_dir / "weights.safetensors")
    for name, p in undisturbed[1].named_parameters():
        assert (weights[name] - p).norm() <= 3e-3 * p.norm(), name
    _, _, folder = train("moved")  # the run that two ranks left in the middle is finished by one
    assert events(folder) == ["start", "save", "stop", "resume", *["save"] * 5, "done"]
    for got, want in zip(losses(folder), undisturbed[2], strict=True):
        assert got[1] == pytest.approx(want[1], abs=1e-5)


def poisoned(bad_steps: set[int]) -> Callable[[GPT, Batch], Loss]:
    """The usual objective, but not finite in one micro-batch of some steps (counted from 0)."""

    def objective(model: GPT, batch: Batch) -> Loss:
        loss = next_token(model, batch)
        step, rest = divmod(batch.state["position"] - 1, 4)
        bad = step in bad_steps and rest == 3  # in the second micro-batch
        return Loss(loss.total * math.nan, loss.count) if bad else loss

    return objective


def test_a_step_that_is_not_finite_changes_no_weight_and_is_counted() -> None:
    seen: list[dict[str, Tensor]] = []
    hook = Hook(1, lambda state: seen.append(snapshot()) or {})  # type: ignore[func-returns-value]
    models: list[GPT] = []

    def objective(model: GPT, batch: Batch) -> Loss:
        models.append(model)
        return poisoned({4})(model, batch)

    def snapshot() -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in models[-1].named_parameters()} if models else {}

    state, model, folder = train("d2", objective=objective, hooks=[hook])
    assert state.skipped == 1
    assert "skip" in events(folder)
    assert all(torch.equal(seen[4][n], seen[5][n]) for n in seen[4])  # after step 4 and after step 5, the bad one
    assert not all(torch.equal(seen[5][n], seen[6][n]) for n in seen[5])
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert state.finished


def test_metrics_stay_valid_json_when_a_step_is_not_finite() -> None:
    _, _, folder = train("d2", objective=poisoned({4}))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    for name in ("metrics.jsonl", "events.jsonl"):
        for line in (folder / name).read_text().splitlines():
            json.loads(line, parse_constant=refuse)
    assert [r["step"] for r in metrics(folder)] == list(range(1, 21))


def test_too_many_bad_steps_stop_the_run_as_diverged_and_keep_the_last_good_checkpoint() -> None:
    with pytest.raises(DivergedError, match="lower the learning rate") as error:
        train("d2", objective=poisoned(set(range(8, 20))), save_every=4)
    assert error.value.exit_code == 3
    state, _, _ = train("d2", objective=next_token)  # with good data, the same run goes on
    assert state.finished


def test_scattered_bad_steps_do_not_stop_the_run() -> None:
    state, _, _ = train("d2", objective=poisoned({1, 5, 9, 13, 17}))
    assert (state.skipped, state.finished) == (5, True)


def test_out_of_memory_is_an_error_with_a_smaller_batch_as_remedy() -> None:
    def objective(model: GPT, batch: Batch) -> Loss:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemoryError, match="2 x 16 tokens does not fit; pass --device-batch-size=1") as error:
        train("d2", objective=objective)
    assert error.value.exit_code == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_stops_and_the_run_continues_as_if_nothing_had_been(
    undisturbed: Any, number: signal.Signals
) -> None:
    before = signal.getsignal(number)

    def send(row: int) -> None:
        if row == 28:
            os.kill(os.getpid(), number)

    with pytest.raises(StoppedError, match=r"stopped at step \d+, everything is saved") as error:
        train("d2", before=send, save_every=0)
    assert error.value.exit_code == 143
    assert signal.getsignal(number) is before
    _, model, folder = train("d2")
    assert losses(folder) == undisturbed[2]
    assert same_weights(model, undisturbed[1])
    assert events(folder) == ["start", "save", "stop", "resume", *["save"] * 4, "done"]


class FakeTime:
    """A clock that moves only when told to, in place of the `time` module."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def spend(self, seconds: float) -> Callable[[Any], dict[str, float]]:
        def work(_: Any) -> dict[str, float]:
            self.now += seconds
            return {}

        return work


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=fake.monotonic))
    return fake


@pytest.mark.parametrize(("setup_s", "hook_s", "step_s"), [(0.0, 0.0, 1.0), (30.0, 8.0, 1.0), (0.0, 8.0, 2.0)])
def test_a_budget_ends_on_time_with_the_learning_rate_fully_down(
    clock: FakeTime, setup_s: float, hook_s: float, step_s: float
) -> None:
    recipe = make_recipe(budget_s=100.0)
    started = clock.now
    clock.now += setup_s  # reading data, building the model
    hooks = [Hook(40, clock.spend(hook_s))]
    state, _, folder = train(
        "d2", recipe=recipe, hooks=hooks, before=clock.spend(step_s / 2), started=started, save_every=0
    )
    assert state.finished
    assert 95.0 <= clock.now - started <= 105.0
    rows = metrics(folder)
    assert rows[-1]["lr"] <= recipe.matrix_lr * 1.5 * (recipe.final_lr_frac + step_s / 30)
    assert max(r["lr"] for r in rows) <= recipe.matrix_lr


def test_a_budget_counts_the_time_before_an_interruption(clock: FakeTime) -> None:
    recipe = make_recipe(budget_s=100.0)
    hooks = [Hook(1000, clock.spend(8.0))]
    spent = 0.0

    def kill(row: int) -> None:
        clock.now += 0.5
        if row == 160:
            raise Killed

    started = clock.now
    with pytest.raises(Killed):
        train("d2", recipe=recipe, hooks=hooks, before=kill, started=started, save_every=20)
    spent += clock.now - started
    started = clock.now = clock.now + 5000.0  # the machine was off for a while
    state, _, _ = train("d2", recipe=recipe, hooks=hooks, before=clock.spend(0.5), started=started, save_every=20)
    spent += clock.now - started
    assert state.finished
    assert 95.0 <= spent <= 105.0


def test_every_step_follows_the_schedules_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    real, given = Optimizer.apply, []

    def apply(self: Optimizer, scale: float, **schedules: float) -> None:
        given.append(schedules)
        real(self, scale, **schedules)

    monkeypatch.setattr(Optimizer, "apply", apply)
    recipe = make_recipe(warmup_frac=0.1, warmdown_frac=0.5, momentum_ramp_steps=10)
    _, _, folder = train("d2", recipe=recipe)
    lr = [1e-3, 0.5, *[1.0] * 9, *[1 - 0.95 * i / 10 for i in range(1, 10)]]  # up in 2 steps, down to 5 % in 10
    assert [s["lr_multiplier"] for s in given] == pytest.approx(lr)
    assert [s["momentum"] for s in given] == pytest.approx([0.85 + 0.01 * min(step, 10) for step in range(20)])
    assert [s["decay_multiplier"] for s in given] == pytest.approx([1 - step / 20 for step in range(20)])
    assert [r["lr"] for r in metrics(folder)] == pytest.approx([recipe.matrix_lr * m for m in lr])


STABLE = {
    "step", "time_s", "tokens", "bytes", "flops", "train/loss", "train/bpb", "lr", "grad_norm", "tok_per_sec", "mfu",
    "mem_bytes", "eta_s",
}  # fmt: skip


def test_metrics_have_the_stable_keys_in_every_row_and_grow_as_they_should() -> None:
    scores = {"val/loss": 1.0, "val/bpb": 0.5, "val/ppl": 2.7}
    _, _, folder = train("d2", hooks=[Hook(5, lambda state: scores)])
    rows = metrics(folder)
    assert rows[0]["step"] == 0  # before training
    assert all(r.keys() >= STABLE for r in rows[1:])
    assert [r["step"] for r in rows if "val/bpb" in r] == [0, 5, 10, 15, 20]
    assert all({k: r[k] for k in scores} == scores for r in rows if "val/bpb" in r)
    for name in ("step", "time_s", "tokens", "bytes", "flops"):
        values = [r[name] for r in rows]
        assert values == sorted(values), name
    recipe = make_recipe()
    assert rows[-1]["tokens"] == recipe.train_tokens
    assert rows[-1]["flops"] == pytest.approx(recipe.flops_per_token * recipe.train_tokens)
    assert rows[-1]["eta_s"] == 0.0


def test_hooks_run_before_the_first_step_when_due_and_at_the_end() -> None:
    ran: dict[int, list[int]] = {7: [], 0: []}
    train("d2", hooks=[Hook(n, lambda state, n=n: ran[n].append(state.step) or {}) for n in ran])
    assert ran == {7: [0, 7, 14, 20], 0: []}


def test_the_saved_state_is_complete_without_the_process_that_wrote_it() -> None:
    _, _, folder = train("d2")
    state = files.read_json(folder / "step_00000020" / "state.json")
    assert {"step", "time_s", "tokens", "bytes", "flops", "skipped", "finished", "loader", "recipe"} <= state.keys()
    assert Recipe.from_dict(state["recipe"]) == make_recipe()


if __name__ == "__main__":
    torch.set_num_threads(1)
    base = Path(sys.argv[1])
    with compute_module.start("cpu", "float32") as started_compute:
        _, trained, where = train("d2", compute=started_compute)
        if started_compute.is_main:
            (base / "losses.json").write_text(json.dumps(losses(where)))
            save_file({n: p.detach() for n, p in trained.named_parameters()}, base / "weights.safetensors")

        def interrupt(row: int) -> None:
            if row == 16 and started_compute.rank == 1:  # a signal to one rank stops both at the same step
                os.kill(os.getpid(), signal.SIGTERM)

        with contextlib.suppress(StoppedError):
            train("moved", compute=started_compute, before=interrupt, save_every=0)
