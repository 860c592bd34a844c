"""The scripts themselves, killed, stopped and started again on one rank and on several: they end as if undisturbed."""

import os
import shutil
import signal
import time
from itertools import product

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from nanozhchat import checkpoint, cli, compute, files, paths
from nanozhchat.prepare import main_first
from scripts import base_train, chat_rl, chat_sft
from tests.conftest import end_ranks, start_ranks, write_jsonl

COMMON = ["--model-tag=m", "--device-type=cpu", "--dtype=float32", "--save-every=3", "--eval-every=6", "--num-steps=14"]
BASE = ["--depth=1", "--vocab-size=300", "--max-seq-len=128", "--total-batch-size=512", "--device-batch-size=1",
        "--sample-every=0", "--eval-tokens=256", *COMMON]  # fmt: skip
SFT = ["--max-conversations=64", *COMMON]
RL = ["--source=base", "--tasks", "builtin:antonyms", "--num-problems=40", "--held-out=4", "--prompts=2", "--group=2",
      "--max-tokens=4", "--eval-samples=1", *COMMON]  # fmt: skip
KILL_AT = (2, 4, 7, 8, 11, 14)  # before anything is saved, while a save is written, in between, in the last step


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base directory with text, to which the first run adds tokenizer and shards."""
    folder = tmp_path_factory.mktemp("resume")
    text = "小猫在花园里追蝴蝶，追了很久也没有追到。它坐下来想：明天再来。"
    write_jsonl(folder / "data.jsonl", [f"第{i}天，{text[i % 9 :]}" for i in range(300)])
    return folder


@pytest.fixture
def start(home, monkeypatch):
    """Start a stage on forked ranks: start(stage, ranks, *flags, faults=...) -> process ids; they write to home/log."""
    monkeypatch.setenv("NANOZHCHAT_BASE_DIR", str(home))
    monkeypatch.setattr(compute, "PROBE_SHAPE", (8, 8, 8))

    def start(stage, ranks, *flags, faults="", before=lambda rank: None):
        base = (base_train, [*BASE, f"--data={home / 'data.jsonl'}"])
        script, given = {"base": base, "sft": (chat_sft, SFT), "rl": (chat_rl, RL)}[stage]

        def work(rank):
            os.environ["NANOZHCHAT_FAULTS"] = faults
            before(rank)
            cli.run(lambda: script.main([*given, *flags]))

        (home / "log").unlink(missing_ok=True)
        return start_ranks(work, ranks, home / "log")

    yield start
    for stage in ("base", "sft", "rl"):
        shutil.rmtree(paths.run_dir(stage, "m"), ignore_errors=True)


def result(stage):
    """Take what a run ended with, and the run away: weights and optimizer state, losses and norms, events."""
    folder = paths.run_dir(stage, "m")
    saved = checkpoint.find(folder)
    assert saved.state()["finished"]
    tensors = {**checkpoint.read_tensors(saved.folder / "model.safetensors"), **saved.optimizer_tensors()}
    rows = [(r["step"], r["train/loss"], r["grad_norm"]) for r in files.read_jsonl(folder / "metrics.jsonl")[1:]]
    events = [e["event"] for e in files.read_jsonl(folder / "events.jsonl")]
    shutil.rmtree(folder)
    return tensors, rows, events


def undisturbed(start, stage, ranks, known={}):  # noqa: B006 - meant to be kept between tests
    if stage != "base":
        assert end_ranks(start("base", 1)) == [0]
    if (stage, ranks) not in known:
        assert end_ranks(start(stage, ranks)) == [0] * ranks
        known[stage, ranks] = result(stage)
    return known[stage, ranks]


def assert_same(one, other):
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    assert [name for name in one[0] if not torch.equal(one[0][name], other[0][name])] == []


@pytest.mark.parametrize(("stage", "ranks"), [*product(("base", "sft", "rl"), (1, 2)), ("base", 4)])
def test_a_run_killed_at_any_step_ends_with_the_same_weights_state_and_losses_bit_for_bit(start, home, stage, ranks):
    calm = undisturbed(start, stage, ranks)
    for i, step in enumerate(KILL_AT if ranks < 4 else KILL_AT[1::3]):
        codes = end_ranks(start(stage, ranks, faults=f"kill@step={step},rank={i % ranks}"))
        assert sorted(codes) == [-signal.SIGKILL, *[1] * (ranks - 1)], (home / "log").read_text()
        lines = [line for line in (home / "log").read_text().splitlines() if line.startswith("error")]
        assert [("another rank died" in line) for line in lines] == [True] * (ranks - 1)
    assert end_ranks(start(stage, ranks)) == [0] * ranks
    assert_same(result(stage), calm)
    one = undisturbed(start, stage, 1)  # as many rows a step, in more turns
    assert [loss for _, loss, _ in calm[1]] == pytest.approx([loss for _, loss, _ in one[1]], abs=1e-4)


def test_a_run_in_fp8_differs_from_one_without_and_killed_ends_as_if_undisturbed(start):
    plain = undisturbed(start, "base", 1)
    assert end_ranks(start("base", 1, "--fp8")) == [0]
    calm = result("base")
    assert end_ranks(start("base", 1, "--fp8", faults="kill@step=8")) == [-signal.SIGKILL]
    assert end_ranks(start("base", 1, "--fp8")) == [0]
    assert_same(result("base"), calm)
    assert plain[0].keys() == calm[0].keys()  # the weights under the same names, so anything loads them
    assert plain[1] != calm[1]
    assert plain[1][-1][1] == pytest.approx(calm[1][-1][1], rel=0.02)


def test_torchrun_starts_killed_ranks_again_and_they_end_as_if_undisturbed(start, home, monkeypatch):
    calm = undisturbed(start, "base", 2)
    monkeypatch.setenv("NANOZHCHAT_FAULTS", "kill@step=8,rank=1,restart=0")

    def agent(_rank):  # what torchrun calls, with forks in place of programs to start
        options = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "max_restarts": 1, "monitor_interval": 0.1}
        config = LaunchConfig(**options, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork")
        elastic_launch(config, base_train.main)([*BASE, f"--data={home / 'data.jsonl'}"])

    assert end_ranks(start_ranks(agent, 1, home / "log")) == [0], (home / "log").read_text()
    disturbed = result("base")
    assert disturbed[2].count("resume") == 1
    assert_same(disturbed, calm)


def test_a_stopped_rank_is_an_error_in_one_line_once_the_timeout_is_over(start, home, monkeypatch):
    monkeypatch.setenv("NANOZHCHAT_TIMEOUT_S", "5")
    pids = start("base", 2, faults="stop@step=5,rank=1")
    try:
        assert end_ranks(pids[:1], 60) == [1]
        log = (home / "log").read_text()
        assert "error: another rank died or did not answer for 5 s" in log
        assert "Traceback" not in log
    finally:
        os.kill(pids[1], signal.SIGKILL)
        end_ranks(pids[1:])


@pytest.mark.parametrize("stopped", [None, 0, 1])
def test_work_of_rank_0_may_outlast_the_timeout_but_a_stopped_rank_ends_the_other(stopped, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOZHCHAT_TIMEOUT_S", "2")

    def run(rank):
        with compute.start("cpu", "float32") as comp:
            if rank == stopped == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            main_first(lambda: os.kill(os.getpid(), signal.SIGSTOP) if rank == stopped else time.sleep(3), comp)

    pids = start_ranks(lambda rank: cli.run(lambda: run(rank)), 2, tmp_path / "log")
    try:
        alive = [pid for rank, pid in enumerate(pids) if rank != stopped]
        assert end_ranks(alive, 30) == ([0, 0] if stopped is None else [1]), (tmp_path / "log").read_text()
    finally:
        if stopped is not None:
            os.kill(pids[stopped], signal.SIGKILL)
            end_ranks(pids[stopped : stopped + 1])


@pytest.mark.parametrize(("flags", "code"), [((), 0), (("--save-every=0",), 6)], ids=["on the way", "the last"])
def test_a_save_that_fails_on_rank_0_fails_on_all_and_training_goes_on_unless_it_was_the_last(start, home, flags, code):
    def before(rank):
        real, failures = shutil.rmtree, []

        def fail(path, *args, **options):
            if ".tmp-" in str(path) and not failures:
                raise failures.append(path) or OSError(28, "No space left on device")
            real(path, *args, **options)

        if rank == 0:
            shutil.rmtree = fail

    assert end_ranks(start("base", 2, *flags, before=before), 60) == [code, code]  # nobody waits for ten minutes
    if code:
        assert (home / "log").read_text().count("error: cannot write") == 2
    else:
        assert "save_failed" in result("base")[2]
