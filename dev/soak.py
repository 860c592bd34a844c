"""Storms of kill -9, SIGTERM, SIGSTOP, full disks and flipped bits against a tiny run, until N of them are survived.

    OMP_NUM_THREADS=1 python -m dev.soak --blows=200

Every run that ends must have the weights, optimizer state and losses of the undisturbed one bit for bit, and every
rerun must start at the newest whole checkpoint. Runs are forked from one process, so that starting costs little.
"""

from __future__ import annotations

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
from scripts import base_train

FLAGS = (
    "--depth=1 --vocab-size=300 --max-seq-len=32 --total-batch-size=64 --device-batch-size=1 --num-steps=150 "
    "--save-every=5 --eval-every=50 --eval-tokens=256 --sample-every=0 --device-type=cpu --dtype=float32"
)
BLOWS = ("kill", "term", "stop", "stop_kill", "disk_full", "kill_in_write", "flip")


def launch(tag: str, faulty: str) -> int:
    """Fork a training run; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.environ[faults.VARIABLE] = faulty
    sys.argv = ["base_train", *FLAGS.split(), f"--model-tag={tag}"]
    os.dup2(os.open(paths.base_dir() / "soak.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    try:
        cli.run(base_train.main)
    except SystemExit as end:
        os._exit(int(end.code or 0))
    os._exit(0)


def wait(pid: int, seconds: float) -> int | None:
    """Exit code (negative: the signal that ended it), None if it still runs after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


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


def strike(tag: str, blow: str, rng: random.Random) -> int:
    """Run until the blow ends it, or the run ends by itself; returns the exit code."""
    faulty = {
        "disk_full": f"io:write#{rng.randint(1, 40)}=ENOSPC",
        "kill_in_write": f"io:{rng.choice(faults.OPERATIONS)}#{rng.randint(1, 60)}=kill",
    }.get(blow, "")
    pid = launch(tag, faulty)
    code = wait(pid, rng.uniform(0.3, 4.0) if not faulty else 30)
    if code is None and blow in ("stop", "stop_kill"):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.2)
        os.kill(pid, signal.SIGCONT if blow == "stop" else signal.SIGKILL)
        code = wait(pid, rng.uniform(0.1, 0.5))
    if code is None:
        os.kill(pid, signal.SIGTERM if blow == "term" else signal.SIGKILL)
        code = wait(pid, 30)
    if code not in {0, 6, 143, -signal.SIGKILL, -signal.SIGTERM}:  # the last: before there was anything to save
        raise SystemExit(f"{blow}: exit code {code}; see {paths.base_dir() / 'soak.log'}")
    return code


def result(folder: Path) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    """Tensors of the last checkpoint, and the losses of every step."""
    saved = checkpoint.find(folder)
    assert saved is not None
    tensors = {**checkpoint.read_tensors(saved.folder / "model.safetensors"), **saved.optimizer_tensors()}
    rows = files.read_jsonl(folder / "metrics.jsonl")
    return tensors, [[r["step"], r["train/loss"]] for r in rows if "train/loss" in r]


def main() -> None:
    """Strike until enough blows were survived; print what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, counts, runs, begun = random.Random(options.seed), collections.Counter[str](), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as base:
        sys.stderr.write(f"log: {base}/soak.log\n")
        os.environ["NANOZHCHAT_BASE_DIR"] = base
        if wait(launch("calm", ""), 600) != 0:
            raise SystemExit("the undisturbed run failed")
        tensors, losses = result(paths.run_dir("base", "calm"))
        folder = paths.run_dir("base", "storm")
        while counts.total() < options.blows:
            whole = checkpoint.find(folder)
            blow = rng.choice(BLOWS)
            counts[blow] += (struck := strike(folder.name, blow, rng) != 0 or blow == "stop")
            events = files.read_jsonl(folder / "events.jsonl")
            starts = [e["step"] for e in events if e["event"] in ("start", "resume")]
            if counts.total() % 10 == 0:
                sys.stderr.write(f"{counts.total()} blows, {runs} runs, {time.monotonic() - begun:.0f} s\n")
            if whole is not None and starts and starts[-1] < whole.step and events[-1]["event"] != "done":
                raise SystemExit(f"{blow}: lost step {whole.step}, started at {starts[-1]}")
            if events and events[-1]["event"] == "done":
                got, rows = result(folder)
                same = got.keys() == tensors.keys() and all(torch.equal(got[k], tensors[k]) for k in tensors)
                if not same or rows != losses:
                    raise SystemExit(
                        f"run {runs} differs from the undisturbed one: weights {same}, losses {rows == losses}"
                    )
                runs += 1
                shutil.rmtree(folder)
            elif blow == "flip" and struck:
                flip_a_bit(folder, rng)
        minutes = (time.monotonic() - begun) / 60
        print(f"{counts.total()} blows {dict(counts)}, {runs} runs ended bit-equal, 0 losses, {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
