"""The training loop: resuming changes nothing, ranks change nothing, bad batches do no harm, clocks are kept."""

import json
import math
import os
import signal
import time

import pytest
import torch
import torch.nn.functional as F

from nanozhchat import checkpoint, files, trainer, watch
from nanozhchat import compute as compute_module
from nanozhchat.compute import Compute
from nanozhchat.dataloader import Batch
from nanozhchat.errors import DiskError, DivergedError, OutOfMemoryError, StoppedError
from nanozhchat.objectives import Loss, next_token
from nanozhchat.optim import Optimizer
from nanozhchat.recipe import Recipe
from nanozhchat.run import for_world, gpt_config
from nanozhchat.trainer import Hook, fit
from tests.conftest import CPU, end_ranks, make_model, make_recipe, opened, refused, start_ranks

TOKEN_BYTES = torch.arange(100) % 4
IDENTITY = {"data_hash": "abc", "tasks": ("one", "two")}  # what a script passes; saved as JSON, which has no tuples


class Killed(BaseException):
    """Stands for the process being killed: nothing catches it."""


def row(index):
    """Row `index` of an endless, learnable data set; the share of scored targets differs from row to row."""
    g = torch.Generator().manual_seed(index)
    start, length = torch.randint(0, 50, (1,), generator=g), int(torch.randint(2, 17, (1,), generator=g))
    ids = (start + torch.arange(17) * 3) % 100
    return ids[:-1], torch.where(torch.arange(16) < length, ids[1:], -1)


class Loader:
    """The next rows in order, shared by the ranks, as the real loader does; `before(row)` runs at each micro-batch."""

    def __init__(self, compute, position, rows, before):
        self.compute, self.position, self.rows, self.before = compute, position, rows, before

    def __iter__(self):
        return self

    def __next__(self):
        self.before(self.position)
        first = self.position + self.compute.rank * self.rows
        documents = tuple(range(first, first + self.rows))
        inputs, targets = (torch.stack(part) for part in zip(*map(row, documents), strict=True))
        self.position += self.compute.world_size * self.rows
        return Batch(inputs, targets, 0, self.state_dict(), documents)

    def state_dict(self):
        return {"rows": self.position}

    def seek(self, state, batch_rows):
        self.position, self.rows = state["rows"], batch_rows


def train(
    tag="d2", *, compute=CPU, recipe=None, hooks=(), before=lambda row: None, objective=next_token, save_every=3,
    started=None, **flags,
):  # fmt: skip
    made = recipe or for_world(make_recipe(), compute.world_size)
    with opened("base", tag, made, IDENTITY, compute, flags=flags) as (run, made, model, optimizer):
        loader = Loader(compute, run.state.loader.get("rows", 0), made.device_batch_size, before)
        clock = {"started": time.monotonic() if started is None else started, "save_every": save_every}
        plan = run.plan(model, optimizer, made, TOKEN_BYTES, **clock)
        state = fit(model, optimizer, loader, objective, plan, list(hooks), run.state, compute, run.metrics)
        return state, model, run.folder


def metrics(folder):
    return files.read_jsonl(folder / "metrics.jsonl")


def events(folder, kind=None):
    """Names of the events, or those of one kind as they were written."""
    found = files.read_jsonl(folder / "events.jsonl")
    return [e for e in found if e["event"] == kind] if kind else [e["event"] for e in found]


def losses(folder):
    return [(r["step"], r["train/loss"], r["grad_norm"]) for r in metrics(folder)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of 20 steps that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOZHCHAT_BASE_DIR", str(tmp_path_factory.mktemp("undisturbed")))
        state, model, folder = train()
        return state, model, losses(folder), metrics(folder)


def assert_undisturbed(undisturbed, model, folder):
    assert losses(folder) == undisturbed[2]
    assert all(map(torch.equal, model.parameters(), undisturbed[1].parameters()))


def test_an_undisturbed_run_learns_and_is_saved_as_finished(undisturbed):
    state, _, rows, _ = undisturbed
    assert (state.step, state.finished, state.skipped) == (20, True, 0)
    assert (state.tokens, state.loader) == (20 * 64, {"rows": 80})
    assert [step for step, _, _ in rows] == list(range(1, 21))
    assert rows[-1][1] < 0.6 * rows[0][1]


def test_a_run_killed_while_saving_continues_bit_for_bit_from_the_checkpoint_before(undisturbed, monkeypatch):
    real = files.backend.replace

    def die(source, target):
        if target.name == "step_00000006":
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.backend, "replace", die, raising=False)
        refused(None, train, error=Killed)
    state, model, folder = train()
    assert_undisturbed(undisturbed, model, folder)
    assert all(getattr(state, name) == getattr(undisturbed[0], name) for name in ("tokens", "bytes", "loader"))
    assert (events(folder).count("resume"), list(folder.glob("*.tmp*"))) == (1, [])


def test_a_finished_run_does_nothing_more_and_without_resume_is_kept_aside(undisturbed, base_dir):
    train()
    state, model, folder = train(before=lambda row: pytest.fail("asked for data"))
    assert state.finished
    assert_undisturbed(undisturbed, model, folder)
    _, model, folder = train(resume=False)
    assert_undisturbed(undisturbed, model, folder)
    [aside] = (base_dir / "base").glob("d2.old-*")
    assert losses(aside) == undisturbed[2]


def test_a_run_with_other_settings_is_refused_with_the_difference():
    train()
    other = opened("base", "d2", make_recipe(), {**IDENTITY, "data_hash": "xyz"})
    refused("data_hash: saved 'abc', now 'xyz'.*--no-resume", other.__enter__)


def test_the_loss_is_the_mean_over_all_scored_tokens_of_the_step(undisturbed):
    model = make_model(gpt_config(make_recipe()))
    inputs, targets = (torch.stack(x) for x in zip(*(row(i) for i in range(4)), strict=True))
    assert len({int((t >= 0).sum()) for t in targets.split(2)}) == 2  # micro-batches differ in what is scored
    mean = F.cross_entropy(model.logits(model.hidden(inputs)).flatten(0, 1), targets.flatten(), ignore_index=-1)
    mean.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    first, scored, mean = undisturbed[3][0], targets[targets >= 0], float(mean.detach())
    n_bytes = int(TOKEN_BYTES[scored].sum())
    assert first["train/loss"] == pytest.approx(mean, rel=1e-5)
    assert first["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert first["bytes"] == n_bytes
    assert first["train/bpb"] == pytest.approx(mean * len(scored) / math.log(2) / n_bytes, rel=1e-5)


def assert_close(undisturbed, folder):
    assert [step for step, _, _ in losses(folder)] == list(range(1, 21))
    for got, want in zip(losses(folder), undisturbed[2], strict=True):
        assert got == pytest.approx(want, rel=1e-4)
    named = checkpoint.read_tensors(folder / "step_00000020" / "model.safetensors")
    for name, p in undisturbed[1].named_parameters():  # AdamW makes much of the last digit of a tiny gradient
        assert (named[name] - p).norm() <= 3e-3 * p.norm(), name


def test_how_a_batch_is_cut_into_micro_batches_changes_nothing(undisturbed):
    assert_close(undisturbed, train(recipe=make_recipe(device_batch_size=4, grad_accum_steps=1))[2])


def test_two_ranks_train_as_one_and_a_run_may_move_between_them(undisturbed, base_dir):
    def work(rank):
        def interrupt(row):
            if row == 16 and rank == 1:  # a signal to one rank stops both at the same step
                os.kill(os.getpid(), signal.SIGTERM)

        with compute_module.start("cpu", "float32") as compute:
            train("two", compute=compute)
            refused(None, train, "moved", compute=compute, before=interrupt, save_every=0, error=StoppedError)

    assert end_ranks(start_ranks(work, 2)) == [0, 0]
    assert_close(undisturbed, base_dir / "base" / "two")
    refused(r"saved by 2 rank\(s\), now there are 1; use as many, or --change-ranks", train, "moved")
    _, _, folder = train("moved", change_ranks=True)  # the run that two ranks left in the middle is finished by one
    assert events(folder) == ["start", "save", "stop", "resume", *["save"] * 6, "done"]
    assert_close(undisturbed, folder)


def poisoned(bad_steps):
    """The usual objective, but not finite in one micro-batch of some steps (counted from 0)."""

    def objective(model, batch):
        loss = next_token(model, batch)
        step, rest = divmod(batch.state["rows"] - 1, 4)
        bad = step in bad_steps and rest == 3  # in the second micro-batch
        return Loss(loss.total * math.nan, loss.count) if bad else loss

    return objective


def test_a_step_that_is_not_finite_changes_no_weight_is_counted_and_leaves_metrics_valid_json():
    seen, models = [], []

    def objective(model, batch):
        models.append(model)
        return poisoned({4})(model, batch)

    def snapshot(_state):
        seen.append([p.detach().clone() for p in models[-1].parameters()] if models else [])
        return {}

    state, model, folder = train(objective=objective, hooks=[Hook(1, snapshot)])
    unchanged = [all(map(torch.equal, seen[i], seen[i + 1])) for i in (3, 4, 5)]
    assert unchanged == [False, True, False]  # the step after step 4 is the bad one
    assert (state.skipped, state.finished, "skip" in events(folder)) == (1, True, True)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    for line in [line for name in ("metrics", "events") for line in (folder / f"{name}.jsonl").open()]:
        json.loads(line, parse_constant=pytest.fail)


def test_a_stretch_of_bad_data_is_rolled_back_and_stepped_over_whatever_the_run_meets_later(monkeypatch):
    monkeypatch.setenv("NANOZHCHAT_FAULTS", "nan@row>40,row<70")  # steps 11 to 17 as first seen
    rows = []
    state, model, folder = train(before=rows.append)
    [rollback] = events(folder, "rollback")
    assert (rollback["step"], rollback["trouble_since"], rollback["rows"]) == (9, 11, [40, 64])
    assert rows[:32] == list(range(0, 64, 2))
    assert rows[32:] == [36, 38, 64, 66, 68, 70, *range(72, 104, 2)]  # step 10 again, then past it
    assert (state.finished, state.rollbacks, [r["step"] for r in metrics(folder)]) == (True, 1, list(range(1, 21)))
    skip = events(folder, "skip")[0]
    assert (skip["step"], skip["documents"]) == (11, [40, 41, 42, 43])
    assert skip["gradient_norms"].keys() >= {"wte", "h.0", "h.1", "lm_head"}
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_loss_that_leaps_and_stays_goes_back_to_before_the_leap(monkeypatch):
    for name, value in {"WARMUP": 5, "SPIKE_STEPS": 3, "SIGMA_FLOOR": 0.5}.items():
        monkeypatch.setattr(watch, name, value)

    def objective(model, batch):
        loss = next_token(model, batch)
        return Loss(loss.total * (50.0 if 40 < batch.state["rows"] <= 60 else 1.0), loss.count)

    state, _, folder = train(objective=objective)
    [rollback] = events(folder, "rollback")
    assert (rollback["step"], rollback["rows"], state.finished) == (9, [40, 52], True)
    assert "the loss leapt from" in rollback["reason"]


def test_when_going_back_does_not_help_the_run_ends_as_diverged_with_its_last_good_checkpoint(monkeypatch):
    monkeypatch.setenv("NANOZHCHAT_FAULTS", "nan@step>8")
    assert refused("3 rollbacks; lower the learning rate", train, save_every=4, error=DivergedError).exit_code == 3
    monkeypatch.delenv("NANOZHCHAT_FAULTS")
    assert train()[0].finished  # with good data, the same run goes on


def test_scattered_bad_steps_do_not_stop_the_run():
    state, _, _ = train(objective=poisoned({1, 5, 9, 13, 17}))
    assert (state.skipped, state.finished) == (5, True)


def test_out_of_memory_halves_the_device_batch_and_keeps_batch_and_loss(undisturbed, monkeypatch):
    monkeypatch.setenv("NANOZHCHAT_FAULTS", "oom@device_batch>1")
    state, _, folder = train(recipe=make_recipe(device_batch_size=4, grad_accum_steps=1))
    assert_close(undisturbed, folder)
    assert losses(folder)[0] == pytest.approx(undisturbed[2][0], rel=1e-6)
    assert events(folder)[:3] == ["start", "out_of_memory", "out_of_memory"]
    assert (state.tokens, state.loader) == (20 * 64, {"rows": 80})
    assert files.read_json(folder / "step_00000020" / "state.json")["recipe"]["device_batch_size"] == 1


def test_out_of_memory_with_a_single_row_is_an_error_with_advice(monkeypatch):
    monkeypatch.setenv("NANOZHCHAT_FAULTS", "oom@device_batch>0")
    assert refused("one row of 16 tokens fits.*--grad-checkpoint", train, error=OutOfMemoryError).exit_code == 4


def test_a_full_disk_during_training_is_survived_and_at_the_end_an_error(undisturbed, monkeypatch):
    monkeypatch.setenv("NANOZHCHAT_FAULTS", "io:write#6=ENOSPC")  # a tensor file of a checkpoint in the middle
    _, model, folder = train(save_every=5)
    assert_undisturbed(undisturbed, model, folder)
    assert "save_failed" in events(folder)
    monkeypatch.setenv("NANOZHCHAT_FAULTS", "io:write#4=ENOSPC")
    refused("No space left", train, "other", save_every=0, error=DiskError)


def test_half_precision_scales_the_loss_and_adapts_the_scale(monkeypatch):
    monkeypatch.setattr(trainer, "SCALE_GROWS_AFTER", 4)
    state, _, folder = train(compute=Compute(torch.device("cpu"), torch.float16), objective=poisoned({6}))
    assert (state.loss_scale, state.skipped) == (2.0 ** (8 + 1 - 1 + 3), 1)  # up at step 4, down at 7, up at 11, 15, 19
    assert losses(folder)[-1][1] < 0.6 * losses(folder)[0][1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_saves_and_stops_and_the_run_continues_as_if_nothing_had_been(undisturbed, number):
    if number is signal.SIGHUP:  # which nohup may have ignored
        signal.signal(number, signal.SIG_DFL)
    handler = signal.getsignal(number)
    options = {"before": lambda row: row == 28 and os.kill(os.getpid(), number), "save_every": 0}
    assert refused(r"stopped at step \d+, everything is saved", train, **options, error=StoppedError).exit_code == 143
    assert signal.getsignal(number) is handler
    _, model, folder = train()
    assert_undisturbed(undisturbed, model, folder)
    assert events(folder) == ["start", "save", "stop", "resume", *["save"] * 5, "done"]


class FakeTime:
    """A clock that moves only when told to, in place of the `time` module."""

    now = 1000.0

    def monotonic(self):
        return self.now

    def spend(self, seconds):
        return lambda _: setattr(self, "now", self.now + seconds) or {}


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(trainer, "time", fake := FakeTime())
    return fake


@pytest.mark.parametrize(("setup_s", "hook_s", "step_s"), [(0.0, 0.0, 1.0), (30.0, 8.0, 1.0), (0.0, 8.0, 2.0)])
def test_a_budget_ends_on_time_with_the_learning_rate_fully_down(clock, setup_s, hook_s, step_s):
    recipe, started = make_recipe(budget_s=100.0, warmup_frac=0.2), clock.now
    clock.now += setup_s  # reading data, building the model
    options = {"hooks": [Hook(40, clock.spend(hook_s))], "before": clock.spend(step_s / 2), "save_every": 0}
    state, _, folder = train(recipe=recipe, started=started, **options)
    assert (state.finished, 95.0 <= clock.now - started <= 105.0) == (True, True)
    rates = [r["lr"] for r in metrics(folder)]
    assert rates[0] < 0.1 * recipe.matrix_lr  # preparing, however long, is not warming up
    assert rates[-1] <= recipe.matrix_lr * 1.5 * (recipe.final_lr_frac + step_s / 30)
    assert max(rates) <= recipe.matrix_lr


def test_a_budget_counts_the_time_before_an_interruption(clock, monkeypatch):
    # The clock of this test does not wait for the disk, so step 40 waits to be committed.
    monkeypatch.setattr(checkpoint.Checkpoints, "ready", property(lambda self: self.pending is not None))

    def kill(row):
        clock.now += 0.5
        if row == 170:
            raise Killed

    begun = clock.now
    options = {"recipe": make_recipe(budget_s=100.0), "hooks": [Hook(1000, clock.spend(8.0))], "save_every": 20}
    refused(None, train, before=kill, started=begun, **options, error=Killed)
    clock.now += 5000.0  # the machine was off for a while
    state, _, _ = train(before=clock.spend(0.5), started=clock.now - 30.0, **options)  # preparing is not paid twice
    assert (state.finished, 95.0 <= clock.now - begun - 5000.0 <= 105.0) == (True, True)


def test_every_step_follows_the_schedules_of_the_recipe(monkeypatch):
    real, given = Optimizer.apply, []

    def apply(self, scale, **schedules):
        given.append(schedules)
        real(self, scale, **schedules)

    monkeypatch.setattr(Optimizer, "apply", apply)
    recipe = make_recipe(warmup_frac=0.1, warmdown_frac=0.5, momentum_ramp_steps=10)
    _, _, folder = train(recipe=recipe)
    lr = [1e-3, 0.5, *[1.0] * 9, *[1 - 0.95 * i / 10 for i in range(1, 10)]]  # up in 2 steps, down to 5 % in 10
    assert [s["lr_multiplier"] for s in given] == pytest.approx(lr)
    assert [s["momentum"] for s in given] == pytest.approx([0.85 + 0.01 * min(step, 10) for step in range(20)])
    assert [s["decay_multiplier"] for s in given] == pytest.approx([1 - step / 20 for step in range(20)])
    assert [r["lr"] for r in metrics(folder)] == pytest.approx([recipe.matrix_lr * m for m in lr])


STABLE = "step time_s tokens bytes flops train/loss train/bpb lr grad_norm tok_per_sec mfu mem_bytes eta_s"


def test_metrics_have_the_stable_keys_in_every_row_and_grow_as_they_should():
    scores, ran, recipe = {"val/loss": 1.0, "val/bpb": 0.5}, {7: [], 0: []}, make_recipe()
    hooks = [Hook(n, lambda state, n=n: ran[n].append(state.step) or {}) for n in ran]
    _, _, folder = train(hooks=[Hook(5, lambda state: scores), *hooks])
    assert ran == {7: [0, 7, 14, 20], 0: []}
    rows = metrics(folder)
    assert all(r.keys() >= {*STABLE.split()} for r in rows[1:])  # row 0: before training
    assert [r["step"] for r in rows if r.items() >= scores.items()] == [0, 5, 10, 15, 20]
    for name in ("step", "time_s", "tokens", "bytes", "flops"):
        values = [r[name] for r in rows]
        assert values == sorted(values), name
    assert (rows[-1]["tokens"], rows[-1]["eta_s"]) == (recipe.train_tokens, 0.0)
    assert rows[-1]["flops"] == pytest.approx(recipe.flops_per_token * recipe.train_tokens)
    assert Recipe.from_dict(files.read_json(folder / "step_00000020" / "state.json")["recipe"]) == recipe


def test_the_share_of_a_cpus_peak_is_never_above_one_though_the_peak_was_measured_while_it_was_busy(base_dir):
    _, _, folder = train(compute=Compute(torch.device("cpu"), peak_flops=1.0))
    shares = [row["mfu"] for row in metrics(folder) if "mfu" in row]
    assert (min(shares) > 0, max(shares)) == (True, 1.0)
