"""What this machine can do in a given time: a short measurement of real training steps."""

import logging
import time

import torch

from nanozhchat.compute import Compute, all_reduce
from nanozhchat.gpt import GPT, GPTConfig
from nanozhchat.recipe import FEW_STEPS, Overrides, Recipe, flops_per_token, model_sizes, resolve

log = logging.getLogger(__name__)

PROBE = GPTConfig(sequence_len=512, vocab_size=4096, n_layer=4, n_head=4, n_kv_head=4, n_embd=256)
PROBE_FLOPS_PER_TOKEN = 31_457_280  # of that model; recipe.flops_per_token(4) with 4,096 tokens (tested equal)
PROBE_SECONDS = 3.0
PROBE_ROWS = 8  # a step on each GPU
CPU_PROBE_ROWS = 4  # a step on all ranks of a CPU: its batches are small, so ranks wait for each other often
OPTIMIZER_SHARE = 0.85  # of the step that forward and backward take, the rest is optimizer and communication
CPU_MICRO_TOKENS = 4096
GPU_MEMORY_SHARE = 0.6  # for activations; the rest is weights, optimizer, fragmentation
BYTES_PER_ACTIVATION = 80  # per token, layer and channel in bfloat16, about ACTIVATION_FACTOR * 2


def measure_flops(compute: Compute) -> float:
    """Train a small model for about PROBE_SECONDS and return the FLOP/s of all ranks together."""
    model = GPT(PROBE, dtype=compute.dtype).to(compute.device)
    model.init_weights(torch.Generator().manual_seed(0))
    rows = max(1, CPU_PROBE_ROWS // compute.world_size) if compute.device.type == "cpu" else PROBE_ROWS
    idx = torch.arange(rows * 512, device=compute.device).view(rows, 512) % PROBE.vocab_size
    rates = []
    compute.barrier()  # all ranks measure together, as they will train
    start = time.monotonic()
    while len(rates) < 2 or time.monotonic() - start < PROBE_SECONDS:
        before = time.monotonic()
        model(idx, idx).backward()
        for p in model.parameters():
            if compute.world_size > 1 and p.grad is not None:
                all_reduce(p.grad, compute)  # what ranks cost each other belongs to their speed
        model.zero_grad()
        compute.synchronize()
        rates.append(idx.numel() / (time.monotonic() - before))
    rates = sorted(rates[1:])
    return compute.sum([rates[len(rates) // 2] * PROBE_FLOPS_PER_TOKEN * OPTIMIZER_SHARE])[0]


def micro_batch_tokens(compute: Compute, n_layer: int, n_embd: int) -> int:
    """Tokens that one rank takes at a time: fixed on a CPU, by memory on a GPU."""
    if compute.device.type != "cuda":
        return CPU_MICRO_TOKENS
    total = torch.cuda.get_device_properties(compute.device).total_memory
    return max(512, int(total * GPU_MEMORY_SHARE / (BYTES_PER_ACTIVATION * n_layer * n_embd)))


def plan(
    depth: int, vocab_size: int, overrides: Overrides, compute: Compute, *, seconds: float | None, speed: float,
    corpus_tokens: int,
) -> Recipe:  # fmt: skip
    """Resolve a recipe for this machine.

    seconds, speed: wall-clock budget and measured FLOP/s, if there is one. corpus_tokens: as for `recipe.resolve`.
    """
    sizes = model_sizes(depth, vocab_size, overrides)
    recipe = resolve(depth, vocab_size=vocab_size, world_size=compute.world_size, overrides=overrides, budget_s=seconds,
                   micro_batch_tokens=micro_batch_tokens(compute, depth, sizes["n_embd"]), corpus_tokens=corpus_tokens,
                   budget_tokens=seconds * speed / flops_per_token(sizes) if seconds else None)  # fmt: skip
    if seconds and recipe.num_steps < 2 * FEW_STEPS and compute.is_main:
        log.warning("%.0f s are about %d steps of depth %d, which learn little: give more time, or a smaller --depth",
                    seconds, recipe.num_steps, depth)  # fmt: skip
    return recipe
