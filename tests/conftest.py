"""Fixtures for all tests: an own base directory, one thread, and models small enough to train in milliseconds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from nanozhchat.gpt import GPT, GPTConfig
    from nanozhchat.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "DATA_PATH", "NANOZHCHAT_DTYPE", "NANOZHCHAT_FAULTS", "NANOZHCHAT_CHECK_FLAGS",
)  # fmt: skip


@pytest.fixture(autouse=True)
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test an empty base directory, and no settings from the shell that runs it."""
    folder = tmp_path / "base"
    monkeypatch.setenv("NANOZHCHAT_BASE_DIR", str(folder))
    for name in OUTSIDE:
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Keep torch on one thread: small tensors gain nothing from more, and sums keep their order."""
    import torch

    torch.set_num_threads(1)


def make_config(**changes: Any) -> GPTConfig:
    """A model of four layers with everything in it: grouped heads, windows, value embeddings, padded vocabulary."""
    from nanozhchat.gpt import GPTConfig

    sizes = {"sequence_len": 32, "vocab_size": 100, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    return GPTConfig(**{**sizes, "window_pattern": "SSSL", **changes})


def make_model(config: GPTConfig | None = None, *, seed: int = 0, perturb: bool = False, **options: Any) -> GPT:
    """Initialise a model. perturb: add noise to every weight, so that what starts at zero takes part."""
    import torch

    from nanozhchat.gpt import GPT

    model = GPT(config or make_config(), **options)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    if perturb:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def make_recipe(**changes: Any) -> Recipe:
    """A run of 20 steps on a two-layer model: 4 rows of 16 tokens a step, two rows at a time."""
    from nanozhchat.recipe import Overrides, resolve

    over = Overrides(max_seq_len=16, total_batch_size=64, device_batch_size=2, num_steps=20)
    shape = {"n_layer": 2, "value_embeddings": True}
    return replace(resolve(1, vocab_size=100, overrides=over), **{**shape, **changes})


def run_ranks(module: str, *args: str, nproc: int, timeout_s: float = 120) -> str:
    """Run `python -m module args` on several ranks under torchrun; returns what they printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    done = subprocess.run(
        [*launcher, "-m", module, *args],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *_python_path()])},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _python_path() -> list[str]:
    return [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]


@pytest.fixture
def tiny_config() -> Callable[..., GPTConfig]:
    """Factory of tiny model configurations."""
    return make_config


@pytest.fixture
def tiny_model() -> Callable[..., GPT]:
    """Factory of tiny initialised models."""
    return make_model


@pytest.fixture
def tiny_recipe() -> Callable[..., Recipe]:
    """Factory of tiny recipes."""
    return make_recipe
