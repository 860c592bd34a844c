"""Storms of kill -9, SIGTERM, SIGSTOP, full disks and flipped bits against a tiny run, until N of them are survived.

    OMP_NUM_THREADS=1 python -m dev.soak --blows=200 --minutes=30 [--ranks=2] [--stage=sft|rl]

Every run that ends must have the weights, optimizer state and losses of the undisturbed one bit for bit, every rerun
must start at the newest whole checkpoint, and no rank may wait for a dead one for longer than the timeout. Runs are
forked from one process, so that starting costs little.
"""

import argparse
import collections
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from nanozhchat import checkpoint, cli, faults, files, paths
from scripts import base_train, chat_rl, chat_sft
from tests.conftest import end_ranks, start_ranks

COMMON = "--num-steps=150 --save-every=5 --eval-every=50 --device-type=cpu --dtype=float32 --model-tag=soak"
FLAGS = {"base": "--depth=1 --vocab-size=300 --max-seq-len=128 --total-batch-size=512 --device-batch-size=2 "
         "--eval-tokens=256 --sample-every=0 " + COMMON, "sft": "--max-conversations=400 " + COMMON,
         "rl": "--source=base --tasks builtin:antonyms --num-problems=40 --held-out=4 --prompts=2 --group=2 "
         "--max-tokens=4 --eval-samples=1 " + COMMON}  # fmt: skip
SCRIPTS = {"base": base_train, "sft": chat_sft, "rl": chat_rl}
BLOWS = ("kill", "term", "stop", "stop_kill", "disk_full", "kill_in_write", "flip")
ENDS = {0, 6, 143, -signal.SIGKILL, -signal.SIGTERM}  # the last: before there was anything to save
TIMEOUT_S, HANG_S = 5, 60  # of the process group; ranks that still run after this hang


def launch(stage: str, ranks: int, faulty: str = "", victim: int = 0) -> list[int]:
    """Fork a training run, one of whose ranks has faults; returns its process ids."""

    def work(rank: int) -> None:
        os.environ[faults.VARIABLE] = faulty if rank == victim else ""
        cli.run(lambda: SCRIPTS[stage].main(FLAGS[stage].split()))

    return start_ranks(work, ranks, paths.base_dir() / "soak.log")


def flip_a_bit(folder: Path, rng: random.Random) -> bool:
    """Damage the newest checkpoint, if it and another one are whole."""
    whole = [s for s in checkpoint.list_steps(folder) if not checkpoint.problems(folder / f"step_{s:08d}")]
    if len(whole) < 2 or whole[-1] != checkpoint.list_steps(folder)[-1]:
        return False
    path = rng.choice(sorted((folder / f"step_{whole[-1]:08d}").iterdir()))
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))
    return True


def strike(stage: str, ranks: int, blow: str, rng: random.Random) -> bool:
    """Run until the blow ends it, or the run ends by itself; returns whether the blow was felt."""
    faulty = {
        "disk_full": f"io:write#{rng.randint(1, 40)}=ENOSPC",
        "kill_in_write": f"io:{rng.choice(faults.OPERATIONS)}#{rng.randint(1, 60)}=kill",
    }.get(blow, "")
    victim = rng.randrange(ranks)
    pids = launch(stage, ranks, faulty, victim)
    codes = dict(zip(pids, end_ranks(pids, HANG_S if faulty else rng.uniform(0.3, 4.0)), strict=True))
    running = [pid for pid in pids if codes[pid] is None]
    if pids[victim] in running and not faulty:
        if blow in ("stop", "stop_kill"):
            os.kill(pids[victim], signal.SIGSTOP)
            time.sleep(0.2 if ranks == 1 or blow == "stop" else 1.5 * TIMEOUT_S)
            os.kill(pids[victim], signal.SIGCONT)
        if blow == "stop":
            time.sleep(rng.uniform(0.1, 0.5))
        os.kill(pids[victim], signal.SIGTERM if blow == "term" else signal.SIGKILL)
    codes |= dict(zip(running, end_ranks(running, HANG_S), strict=True))
    for pid in (hanging := [pid for pid in pids if codes[pid] is None]):
        os.kill(pid, signal.SIGKILL)
    if hanging or not set(codes.values()) <= ENDS | ({1} if ranks > 1 else set()):
        last = (paths.base_dir() / "soak.log").read_text(errors="replace").splitlines()[-3:]
        raise SystemExit("\n".join([f"{blow}: exit codes {list(codes.values())}; the log ends with", *last]))
    return bool(running or any(codes.values()))


def result(folder: Path) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    saved = checkpoint.find(folder)
    assert saved is not None
    tensors = {**checkpoint.read_tensors(saved.folder / "model.safetensors"), **saved.optimizer_tensors()}
    rows = files.read_jsonl(folder / "metrics.jsonl")
    return tensors, [[r["step"], r["train/loss"]] for r in rows if "train/loss" in r]


def storm(options: argparse.Namespace, folder: Path) -> str:
    """Strike until enough blows were survived or the time is over; returns what happened."""
    rng, counts, runs, begun = random.Random(options.seed), collections.Counter[str](), 0, time.monotonic()
    tensors, losses = result(folder)
    shutil.rmtree(folder)
    while counts.total() < options.blows and time.monotonic() - begun < 60 * options.minutes:
        whole, n_events = checkpoint.find(folder), len(files.read_jsonl(folder / "events.jsonl"))
        blow = rng.choice(BLOWS)
        counts[blow] += (struck := strike(options.stage, options.ranks, blow, rng))
        events = files.read_jsonl(folder / "events.jsonl")
        starts = [e["step"] for e in events[n_events:] if e["event"] in ("start", "resume")]
        if counts.total() % 10 == 0:
            sys.stderr.write(f"{counts.total()} blows, {runs} runs, {time.monotonic() - begun:.0f} s\n")
        if whole is not None and starts and starts[0] < whole.step:
            raise SystemExit(f"{blow}: lost step {whole.step}, started at {starts[0]}")
        if events and events[-1]["event"] == "done":
            got, rows = result(folder)
            same = got.keys() == tensors.keys() and all(torch.equal(got[k], tensors[k]) for k in tensors)
            if not same or rows != losses:
                raise SystemExit(f"run {runs} differs from the calm one: weights {same}, losses {rows == losses}")
            runs += 1
            shutil.rmtree(folder)
        elif blow == "flip" and struck:
            flip_a_bit(folder, rng)
    minutes = (time.monotonic() - begun) / 60
    return f"{counts.total()} blows {dict(counts)}, {runs} runs ended bit-equal, 0 losses, {minutes:.1f} minutes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blows", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=1e9, help="end after so long, whatever has been survived")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--stage", choices=FLAGS, default="base")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        sys.stderr.write(f"log: {base}/soak.log\n")
        os.environ.update(NANOZHCHAT_BASE_DIR=base, NANOZHCHAT_TIMEOUT_S=str(TIMEOUT_S))
        for stage, ranks in {"base": 1, options.stage: options.ranks}.items():
            if any(end_ranks(launch(stage, ranks), 600)):
                raise SystemExit(f"the undisturbed run failed; see {base}/soak.log")
        print(f"{options.stage}, {options.ranks} rank(s): {storm(options, paths.run_dir(options.stage, 'soak'))}")


if __name__ == "__main__":
    main()
