"""The training loop: resuming changes nothing, ranks change nothing, bad batches do no harm, clocks are kept."""

import contextlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from nanozhchat import compute as compute_module
from nanozhchat import files, trainer
from nanozhchat.compute import Compute
from nanozhchat.dataloader import Batch
from nanozhchat.errors import DivergedError, OutOfMemoryError, StoppedError
from nanozhchat.objectives import Loss, next_token
from nanozhchat.optim import Optimizer, param_groups
from nanozhchat.recipe import Recipe
from nanozhchat.run import for_world, gpt_config, open_run
from nanozhchat.trainer import Hook, Plan, fit
from tests.conftest import make_model, make_recipe, run_ranks

CPU = Compute(torch.device("cpu"))
TOKEN_BYTES = torch.arange(100) % 4


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
        inputs, targets = zip(*(row(first + i) for i in range(self.rows)), strict=True)
        self.position += self.compute.world_size * self.rows
        return Batch(torch.stack(inputs), torch.stack(targets), 0, {"position": self.position})


def train(
    tag="d2", *, compute=CPU, recipe=None, hooks=(), before=lambda row: None, objective=next_token, save_every=3,
    started=None, resume=True,
):  # fmt: skip
    """Do what the scripts do: open the run, build or restore, fit."""
    made = recipe or for_world(make_recipe(), compute.world_size)
    with open_run("base", tag, {"data_hash": "abc"}, compute, resume=resume) as run:
        made = run.recipe(lambda: made)
        model = make_model(gpt_config(made))
        optimizer = Optimizer(param_groups(model, made), compute)
        if run.saved is not None:
            run.restore(model, optimizer)
        loader = Loader(compute, run.state.loader.get("position", 0), made.device_batch_size, before)
        started = time.monotonic() if started is None else started
        save = run.saver(model, optimizer, made)
        plan = Plan(recipe=made, token_bytes=TOKEN_BYTES, save=save, save_every=save_every, started=started)
        state = fit(model, optimizer, loader, objective, plan, list(hooks), run.state, compute, run.metrics)
        return state, model, run.folder


def metrics(folder):
    return files.read_jsonl(folder / "metrics.jsonl")


def events(folder):
    return [e["event"] for e in files.read_jsonl(folder / "events.jsonl")]


def losses(folder):
    return [(r["step"], r["train/loss"], r["grad_norm"]) for r in metrics(folder)]


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of 20 steps that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOZHCHAT_BASE_DIR", str(tmp_path_factory.mktemp("undisturbed")))
        state, model, folder = train()
        return state, model, losses(folder)


def assert_undisturbed(undisturbed, model, folder):
    assert losses(folder) == undisturbed[2]
    assert same_weights(model, undisturbed[1])


def test_an_undisturbed_run_learns_and_is_saved_as_finished(undisturbed):
    state, _, rows = undisturbed
    assert (state.step, state.finished, state.skipped) == (20, True, 0)
    assert (state.tokens, state.loader) == (20 * 64, {"position": 80})
    assert [step for step, _, _ in rows] == list(range(1, 21))
    assert rows[-1][1] < 0.6 * rows[0][1]


def raise_at(place, error=Killed):
    """What to do before a micro-batch so that the run ends at that row."""

    def act(row):
        if row == place:
            raise error

    return act


@pytest.mark.parametrize("kill_at", [0, 10, 14, 24, 78])
def test_a_killed_run_continues_with_the_same_losses_and_weights_bit_for_bit(undisturbed, kill_at):
    with pytest.raises(Killed):
        train(before=raise_at(kill_at))
    state, model, folder = train()
    assert_undisturbed(undisturbed, model, folder)
    assert all(getattr(state, name) == getattr(undisturbed[0], name) for name in ("tokens", "bytes", "loader"))
    assert (events(folder)[-1], "resume" in events(folder)) == ("done", kill_at >= 12)


def test_a_run_killed_while_saving_continues_from_the_checkpoint_before(undisturbed):
    real = files.backend.fsync_dir

    def die(path):
        if path.name.startswith("step_00000006.tmp"):
            raise Killed
        real(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.backend, "fsync_dir", die, raising=False)
        with pytest.raises(Killed):
            train()
    _, model, folder = train()
    assert_undisturbed(undisturbed, model, folder)
    assert not list(folder.glob("*.tmp*"))


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
    with (
        pytest.raises(ValueError, match="data_hash: saved 'abc', now 'xyz'.*--no-resume"),
        open_run("base", "d2", {"data_hash": "xyz"}, CPU, resume=True),
    ):
        pass


def test_the_loss_is_the_mean_over_all_scored_tokens_of_the_step():
    _, _, folder = train()
    model = make_model(gpt_config(make_recipe()))
    inputs, targets = (torch.stack(x) for x in zip(*(row(i) for i in range(4)), strict=True))
    assert len({int((t >= 0).sum()) for t in targets.split(2)}) == 2  # micro-batches differ in what is scored
    logits = model.logits(model.hidden(inputs)).flatten(0, 1)
    mean = F.cross_entropy(logits, targets.flatten(), ignore_index=-1)
    mean.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    first, scored, mean = metrics(folder)[0], targets[targets >= 0], float(mean.detach())
    n_bytes = int(TOKEN_BYTES[scored].sum())
    assert first["train/loss"] == pytest.approx(mean, rel=1e-5)
    assert first["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert first["bytes"] == n_bytes
    assert first["train/bpb"] == pytest.approx(mean * len(scored) / math.log(2) / n_bytes, rel=1e-5)


def assert_close(undisturbed, rows, named_weights):
    assert [step for step, _, _ in rows] == list(range(1, 21))
    for got, want in zip(rows, undisturbed[2], strict=True):
        assert got == pytest.approx(want, rel=1e-4)
    for name, p in undisturbed[1].named_parameters():  # AdamW makes much of the last digit of a tiny gradient
        assert (named_weights[name] - p).norm() <= 3e-3 * p.norm(), name


def test_how_a_batch_is_cut_into_micro_batches_changes_nothing(undisturbed):
    _, model, folder = train(recipe=make_recipe(device_batch_size=4, grad_accum_steps=1))
    assert_close(undisturbed, losses(folder), dict(model.named_parameters()))


def test_two_ranks_train_as_one_and_a_run_may_move_between_them(undisturbed, base_dir):
    run_ranks("tests.test_trainer", str(base_dir), nproc=2)
    two, weights = json.loads((base_dir / "losses.json").read_text()), load_file(base_dir / "weights.safetensors")
    assert_close(undisturbed, two, weights)
    _, model, folder = train("moved")  # the run that two ranks left in the middle is finished by one
    assert events(folder) == ["start", "save", "stop", "resume", *["save"] * 5, "done"]
    assert_close(undisturbed, losses(folder), dict(model.named_parameters()))


def poisoned(bad_steps):
    """The usual objective, but not finite in one micro-batch of some steps (counted from 0)."""

    def objective(model, batch):
        loss = next_token(model, batch)
        step, rest = divmod(batch.state["position"] - 1, 4)
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


def test_too_many_bad_steps_stop_the_run_as_diverged_and_keep_the_last_good_checkpoint():
    with pytest.raises(DivergedError, match="lower the learning rate") as error:
        train(objective=poisoned(set(range(8, 20))), save_every=4)
    assert error.value.exit_code == 3
    assert train()[0].finished  # with good data, the same run goes on


def test_scattered_bad_steps_do_not_stop_the_run():
    state, _, _ = train(objective=poisoned({1, 5, 9, 13, 17}))
    assert (state.skipped, state.finished) == (5, True)


def test_out_of_memory_is_an_error_with_a_smaller_batch_as_remedy():
    remedy = "2 x 16 tokens does not fit; pass --device-batch-size=1"
    with pytest.raises(OutOfMemoryError, match=remedy) as error:
        train(before=raise_at(0, torch.OutOfMemoryError("CUDA out of memory")))
    assert error.value.exit_code == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_stops_and_the_run_continues_as_if_nothing_had_been(undisturbed, number):
    handler = signal.getsignal(number)
    with pytest.raises(StoppedError, match=r"stopped at step \d+, everything is saved") as error:
        train(before=lambda row: row == 28 and os.kill(os.getpid(), number), save_every=0)
    assert error.value.exit_code == 143
    assert signal.getsignal(number) is handler
    _, model, folder = train()
    assert_undisturbed(undisturbed, model, folder)
    assert events(folder) == ["start", "save", "stop", "resume", *["save"] * 4, "done"]


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
    recipe, started = make_recipe(budget_s=100.0), clock.now
    clock.now += setup_s  # reading data, building the model
    options = {"hooks": [Hook(40, clock.spend(hook_s))], "before": clock.spend(step_s / 2)}
    state, _, folder = train(recipe=recipe, started=started, save_every=0, **options)
    assert state.finished
    assert 95.0 <= clock.now - started <= 105.0
    rates = [r["lr"] for r in metrics(folder)]
    assert rates[-1] <= recipe.matrix_lr * 1.5 * (recipe.final_lr_frac + step_s / 30)
    assert max(rates) <= recipe.matrix_lr


def test_a_budget_counts_the_time_before_an_interruption(clock):
    begun = clock.now

    def kill(row):
        clock.now += 0.5
        if row == 160:
            raise Killed

    options = {"recipe": make_recipe(budget_s=100.0), "hooks": [Hook(1000, clock.spend(8.0))], "save_every": 20}
    with pytest.raises(Killed):
        train(before=kill, started=clock.now, **options)
    clock.now += 5000.0  # the machine was off for a while
    state, _, _ = train(before=clock.spend(0.5), started=clock.now, **options)
    assert state.finished
    assert 95.0 <= clock.now - begun - 5000.0 <= 105.0


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


STABLE = {
    "step", "time_s", "tokens", "bytes", "flops", "train/loss", "train/bpb", "lr", "grad_norm", "tok_per_sec", "mfu",
    "mem_bytes", "eta_s",
}  # fmt: skip


def test_metrics_have_the_stable_keys_in_every_row_and_grow_as_they_should():
    scores, ran, recipe = {"val/loss": 1.0, "val/bpb": 0.5}, {7: [], 0: []}, make_recipe()
    hooks = [Hook(n, lambda state, n=n: ran[n].append(state.step) or {}) for n in ran]
    _, _, folder = train(hooks=[Hook(5, lambda state: scores), *hooks])
    assert ran == {7: [0, 7, 14, 20], 0: []}
    rows = metrics(folder)
    assert all(r.keys() >= STABLE for r in rows[1:])  # row 0: before training
    assert [r["step"] for r in rows if r.items() >= scores.items()] == [0, 5, 10, 15, 20]
    for name in ("step", "time_s", "tokens", "bytes", "flops"):
        values = [r[name] for r in rows]
        assert values == sorted(values), name
    assert (rows[-1]["tokens"], rows[-1]["eta_s"]) == (recipe.train_tokens, 0.0)
    assert rows[-1]["flops"] == pytest.approx(recipe.flops_per_token * recipe.train_tokens)
    assert Recipe.from_dict(files.read_json(folder / "step_00000020" / "state.json")["recipe"]) == recipe


if __name__ == "__main__":
    torch.set_num_threads(1)
    base = Path(sys.argv[1])
    with compute_module.start("cpu", "float32") as started_compute:
        _, trained, where = train(compute=started_compute)
        if started_compute.is_main:
            (base / "losses.json").write_text(json.dumps(losses(where)))
            save_file({n: p.detach() for n, p in trained.named_parameters()}, base / "weights.safetensors")

        def interrupt(row):
            if row == 16 and started_compute.rank == 1:  # a signal to one rank stops both at the same step
                os.kill(os.getpid(), signal.SIGTERM)

        with contextlib.suppress(StoppedError):
            train("moved", compute=started_compute, before=interrupt, save_every=0)
