"""Fixtures for all tests: an own base directory, one thread, and models small enough to train in milliseconds."""

import contextlib
import gzip
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zstandard
from hypothesis import settings

from nanozhchat.cli import RunFlags
from nanozhchat.compute import Compute
from nanozhchat.gpt import GPT, GPTConfig
from nanozhchat.optim import Optimizer, param_groups
from nanozhchat.recipe import Overrides, resolve
from nanozhchat.run import gpt_config, open_run
from nanozhchat.tokenizer import Tokenizer

settings.register_profile("ours", deadline=None, max_examples=60)
settings.load_profile("ours")
CPU = Compute(torch.device("cpu"))
ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DATA_PATH", "NANOZHCHAT_")  # how names of settings begin
PLAIN = {"plain": True, "value_embeddings": False, "window_pattern": "L"}  # for make_config: without our additions


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    """Give every test an empty base directory, and no settings from the shell that runs it."""
    folder = tmp_path / "base"
    for name in [name for name in os.environ if name.startswith(OUTSIDE)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NANOZHCHAT_BASE_DIR", str(folder))
    return folder


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Keep torch on one thread: small tensors gain nothing from more, and sums keep their order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bytes_tokenizer():
    """Bytes and control tokens only, so that every Chinese character takes three tokens."""
    return Tokenizer.train(["只有字节"], 263)


def make_config(**changes):
    """Four layers with everything in it: grouped and offset heads, windows, value embeddings, padded vocabulary."""
    sizes = {"sequence_len": 32, "vocab_size": 100, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    usual = {**sizes, "window_pattern": "SSSL", "offset_heads": 0 if changes.get("plain") else 1}
    return GPTConfig(**{**usual, **changes})


def make_model(config=None, *, seed=0, perturb=False, **options):
    """Initialise a model. perturb: add noise to every weight, so that what starts at zero takes part."""
    model = GPT(config or make_config(), **options)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    if perturb:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def make_recipe(**changes):
    """A run of 20 steps on a two-layer model: 4 rows of 16 tokens a step, two rows at a time."""
    over = Overrides(max_seq_len=16, total_batch_size=64, device_batch_size=2, num_steps=20)
    shape = {"n_layer": 2, "value_embeddings": True}
    return replace(resolve(1, vocab_size=100, overrides=over), **{**shape, **changes})


@contextlib.contextmanager
def opened(stage, tag, recipe, identity, compute=CPU, *, flags=None, **how):
    """Do what the scripts do: open a run, build or restore its model (how: see make_model) and optimizer."""
    with open_run(stage, tag, identity, compute, flags=RunFlags(**(flags or {}))) as run:
        recipe = run.recipe(lambda: recipe)
        model = make_model(gpt_config(recipe), dtype=compute.dtype, **how)
        optimizer = Optimizer(param_groups(model, recipe), compute)
        if run.saved is not None:
            run.saved.restore(model, optimizer)
        yield run, recipe, model, optimizer


def start_ranks(work, nproc, log=os.devnull):
    """Fork processes that do `work(rank)` as ranks, spared the imports; returns their ids. log: for their stderr."""
    import torch._dynamo  # noqa: F401 - seconds of imports, else in every fork: torch.optim wants it late

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pids = []
    for rank in range(nproc):
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 1
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(nproc))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            work(rank)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pids


def end_ranks(pids, seconds=100.0):
    """Exit codes of forked processes (negative: the signal that ended it), None for those that still run by then."""
    codes, end = dict.fromkeys(pids), time.monotonic() + seconds
    while None in codes.values() and time.monotonic() < end:
        for pid in [pid for pid in pids if codes[pid] is None]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            codes[pid] = os.waitstatus_to_exitcode(status) if ended else None
        time.sleep(0.005)
    return list(codes.values())


def write_jsonl(path, rows):
    """Write rows, or texts as rows with a `text`, one a line, packed as the name says; returns the path."""
    rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    return pack(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def pack(path, data):
    """Write text or bytes, packed as the name says; returns the path."""
    data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes({".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(data))
    return path


def flip(path):
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut(path, n):
    """Take the last n bytes off a file."""
    path.write_bytes(path.read_bytes()[:-n])


def program(command, cwd=ROOT, **options):
    """Run a program to its end; what it writes comes back as text."""
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, **options)


def refused(message, call, *args, error=ValueError, **options):
    """Call, and return the error that says this."""
    with pytest.raises(error, match=message) as caught:
        call(*args, **options)
    return caught.value
