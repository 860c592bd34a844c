"""Do the learning rates that are best at one depth suit the others? python -m dev.bench_rates --data DIR --depths 2 4 8

All rates of the recipe times each of --scales: same data, batch, steps and seed, no n-gram counts; DIR as in
`dev.bench_learning`. Prints held-out bits per byte and, per depth, the scale at the bottom of a parabola through the
best and its two neighbours (in the logarithm of the scale). What is done in --folder is not done again.
"""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dev.bench_learning import run_apart, shards_of
from nanozhchat import cli, recipe
from scripts import base_train

RATES = ("EMBEDDING_LR", "HEAD_LR", "MATRIX_LR", "SCALAR_LR")


@dataclass(frozen=True, kw_only=True)
class RatesArgs:
    data: str = cli.opt("", "folder of the shards; the last is held out")
    depths: tuple[int, ...] = cli.opt((2, 4, 6, 8), "models")
    scales: tuple[float, ...] = cli.opt((0.5, 0.71, 1.0, 1.41, 2.0), "factors of all rates, ascending")
    steps: int = cli.opt(100, "of 2,048 tokens")
    seed: int = cli.opt(1, "of weights and data order")
    folder: str = cli.opt("rates", "where runs are kept")
    json: str | None = cli.opt(None, "write the figures to this file")


def train(flags: list[str], scale: float) -> None:
    for name in RATES:
        setattr(recipe, name, getattr(recipe, name) * scale)
    sys.argv[1:] = flags
    base_train.main()


def loss(args: RatesArgs, shards: list[str], depth: int, scale: float) -> float:
    """Bits per byte at the end of a run, in a process of its own."""
    tag = f"d{depth}-x{scale}-{args.steps}-{args.seed}"
    flags = {"depth": depth, "num-steps": args.steps, "seed": args.seed, "model-tag": tag, "vocab-size": 4096,
             "max-seq-len": 512, "total-batch-size": 2048, "device-batch-size": 4, "device-type": "cpu",
             "sample-every": 0, "save-every": args.steps, "eval-every": args.steps, "eval-tokens": 131_072}  # fmt: skip
    call = [*(f"--{name}={value}" for name, value in flags.items()), "--no-ngrams"]
    call += ["--data", *shards[:-1], "--val-data", shards[-1]]
    return [row["val/bpb"] for row in run_apart(tag, train, call, scale) if row.get("val/bpb")][-1]


def bottom(scales: Sequence[float], losses: Sequence[float]) -> float:
    """The scale at the lowest point of a parabola around the best; the best itself if it is at an end."""
    best = int(np.argmin(losses))
    if best in (0, len(losses) - 1):
        return scales[best]
    a, b, _ = np.polyfit(np.log(scales[best - 1 : best + 2]), losses[best - 1 : best + 2], 2)
    return math.exp(-b / (2 * a))


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(RatesArgs, argv)
    shards = shards_of(args.data)
    os.environ["NANOZHCHAT_BASE_DIR"] = args.folder
    figures = {}
    for depth in args.depths:
        losses = [loss(args, shards, depth, scale) for scale in args.scales]
        figures[depth] = {"losses": losses, "best": bottom(args.scales, losses)}
        print(f"d{depth}: " + ", ".join(f"x {s:g} {bpb:.4f}" for s, bpb in zip(args.scales, losses, strict=True))
              + f"; best x {figures[depth]['best']:.2f}", flush=True)  # fmt: skip
    cli.write_figures(args.json, {"scales": args.scales, "depths": figures})


if __name__ == "__main__":
    cli.run(main)
