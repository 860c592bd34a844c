"""Time one training step of a small model on this machine, by number format: python dev/bench_step.py --depth=4."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nanozhchat import cli, compute, recipe
from nanozhchat.gpt import GPT
from nanozhchat.optim import Optimizer, param_groups
from nanozhchat.run import gpt_config


@dataclass(frozen=True, kw_only=True)
class BenchArgs:
    depth: int = cli.opt(4, "layers")
    vocab_size: int = cli.opt(4096, "tokens")
    rows: int = cli.opt(8, "sequences per step")
    steps: int = cli.opt(8, "steps timed; the median is printed")
    threads: int = cli.opt(1, "threads")


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(BenchArgs, argv, __doc__ or "")
    torch.set_num_threads(args.threads)
    for name in ("float32", "bfloat16"):
        with compute.start("cpu", name) as comp:
            plan = recipe.resolve(args.depth, vocab_size=args.vocab_size)
            model = GPT(gpt_config(plan), dtype=comp.dtype)
            model.init_weights(torch.Generator().manual_seed(0))
            optimizer = Optimizer(param_groups(model, plan), comp)
            idx = torch.arange(args.rows * plan.sequence_len).view(args.rows, -1) % args.vocab_size
            passes, updates = [], []
            for _ in range(args.steps + 2):
                start = time.perf_counter()
                model(idx, idx).backward()
                middle = time.perf_counter()
                optimizer.reduce(1 / idx.numel())
                optimizer.apply(1 / idx.numel(), lr_multiplier=0.1, momentum=0.9, decay_multiplier=0.0)
                passes.append(middle - start)
                updates.append(time.perf_counter() - middle)
            forward_backward, update = sorted(passes[2:])[args.steps // 2], sorted(updates[2:])[args.steps // 2]
            rate = idx.numel() / (forward_backward + update)
            print(
                f"{name}: {rate:,.0f} tokens/s, forward+backward {forward_backward * 1e3:.0f} ms, optimizer "
                f"{update * 1e3:.0f} ms, {plan.flops_per_token * rate / 1e9:.0f} of {comp.peak_flops / 1e9:.0f} GFLOP/s"
            )


if __name__ == "__main__":
    cli.run(main)
