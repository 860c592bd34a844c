"""What reinforcement learning brings on held-out problems, per seed: python -m dev.bench_rl --model-tag cpu.

Every run is `scripts.chat_rl` in a process and an empty base directory of its own, which begins with the tokenizer and
the fine-tuned model of this one. Prints the curve of each run, and the gain in pass@1 from start to end.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanozhchat import cli, files, paths


@dataclass(frozen=True, kw_only=True)
class BenchArgs:
    model_tag: str = cli.opt("cpu", "fine-tuned model to start from")
    tasks: tuple[str, ...] = cli.opt(("builtin:arithmetic",), "what to learn")
    budget: str = cli.opt("15m", "wall clock of each run")
    seeds: tuple[int, ...] = cli.opt((1, 2, 3), "one run each")
    threads: int = cli.opt(1, "threads of each run")
    held_out: int = cli.opt(300, "held-out problems")
    rl_flags: str = cli.opt("", "more flags of chat_rl, separated by spaces")
    json: str | None = cli.opt(None, "write the curves to this file")


def one_run(args: BenchArgs, seed: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="bench-rl-") as folder:
        for part in ("tokenizer", "sft"):
            Path(folder, part).symlink_to(paths.base_dir() / part)
        flags = [f"--model-tag={args.model_tag}", f"--seed={seed}", "--tasks", *args.tasks, f"--budget={args.budget}",
                 f"--held-out={args.held_out}", *args.rl_flags.split()]  # fmt: skip
        env = {**os.environ, "NANOZHCHAT_BASE_DIR": folder, "OMP_NUM_THREADS": str(args.threads)}
        subprocess.run([sys.executable, "-m", "scripts.chat_rl", *flags], check=True, env=env)
        rows = files.read_jsonl(Path(folder, "rl", args.model_tag, "metrics.jsonl"))
    return [row for row in rows if "val/pass@1" in row]


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(BenchArgs, argv)
    curves, gains = {}, []
    for seed in args.seeds:
        rows = curves[seed] = one_run(args, seed)
        for r in rows:
            names = [name for name in r if name.startswith("val/pass@") and "/" not in name[4:]]
            figures = {name[4:]: r[name] for name in [*names, "val/greedy"]} | {"reward": r.get("train/reward", 0.0)}
            line = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
            print(f"seed {seed}  {r['time_s']:5.0f} s  step {r['step']:4d}  {line}", flush=True)
        gains.append(rows[-1]["val/pass@1"] - rows[0]["val/pass@1"])
    print(f"pass@1: {', '.join(f'{gain:+.3f}' for gain in gains)}; mean {statistics.mean(gains):+.3f}")
    cli.write_figures(args.json, {"curves": curves, "gains": gains})


if __name__ == "__main__":
    cli.run(main)
