"""What a checkpoint every 50 steps costs, and how long the model waits for data.

    OMP_NUM_THREADS=1 python -m dev.bench_saving [--depth=4] [--steps=300] [more flags of base_train]

The cost is what the step of a save and the two after it, while files are written, take longer than the median step.
"""

import os
import statistics
import sys
import tempfile

from nanozhchat import files, paths
from scripts import base_train

EVERY = 50


def main() -> None:
    given = ["--depth=4", "--num-steps=300", f"--save-every={EVERY}", "--eval-every=0", "--sample-every=0"]
    given += ["--model-tag=saving", "--device-type=cpu", "--total-batch-size=4096", *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as base:
        os.environ["NANOZHCHAT_BASE_DIR"] = base
        base_train.main(given)
        folder = paths.run_dir("base", "saving")
        rows = [r for r in files.read_jsonl(folder / "metrics.jsonl") if "train/loss" in r]
        done = files.read_jsonl(folder / "events.jsonl")[-1]
        size = sum(p.stat().st_size for p in max(folder.glob("step_*")).iterdir()) / 2**20
    seconds = {b["step"]: b["time_s"] - a["time_s"] for a, b in zip(rows, rows[1:], strict=False)}
    usual = statistics.median(seconds.values())
    saves = [step for step in range(EVERY, rows[-1]["step"] - 3, EVERY)]
    cost = sum(seconds[s + i] - usual for s in saves for i in (1, 2, 3)) / len(saves)
    print(f"step {usual:.3f} s, checkpoint of {size:.1f} MiB every {EVERY} steps: {cost:.3f} s each, "
          f"{100 * cost / (EVERY * usual):.2f} %; waiting for data {100 * done['data_wait_frac']:.3f} %")  # fmt: skip


if __name__ == "__main__":
    main()
