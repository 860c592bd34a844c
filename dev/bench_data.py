"""Text of C4's layout through fetch, clean, tokenizer and token shards: rates, peak memory, kill -9 at random moments.

    python -m dev.bench_data --gb=0.3 --kills=20 --text '../shared/data/zh_web/*.gz'

Documents are drawn anew from the sentences of `--text`, one in twenty nearly and one in fifty exactly repeated. Every
stage is a process of its own; its rate is MB of text per second of processor time, so per core.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from nanozhchat import sources

FILE_BYTES = 100_000_000  # of text, in one file
TOKENIZE = (
    "import sys; from nanozhchat import corpus, paths, token_store; from nanozhchat.tokenizer import Tokenizer;"
    "token_store.tokenize(corpus.load('clean'), Tokenizer.load(paths.tokenizer_dir('t')))"
)


def generate(folder: Path, n_bytes: int, specs: list[str]) -> int:
    """Write json.gz files; returns the bytes of text."""
    rng, total, number, recent = random.Random(0), 0, 0, [""]
    texts = sources.documents(specs, "train", max_bytes=40_000_000)
    pool = [s for text in texts for s in re.findall(r"[^。！？\n]{6,80}[。！？]", text)]
    folder.mkdir(parents=True)
    while total < n_bytes:
        with gzip.open(folder / f"c4-zh.tfrecord-{number:05d}.json.gz", "wt", compresslevel=1, encoding="utf-8") as out:
            size = 0
            while size < FILE_BYTES and total < n_bytes:
                chance = rng.random()
                if chance < 0.02:
                    text = rng.choice(recent)
                elif chance < 0.07:
                    text = "（转载）" + rng.choice(recent)[2:]
                else:
                    text = "\n".join("".join(rng.choices(pool, k=rng.randint(2, 6))) for _ in range(rng.randint(2, 12)))
                    recent = [*recent[-2000:], text]
                row = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"https://example.cn/{total}"}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                size += len(text.encode())
                total += len(text.encode())
        number += 1
    return total


def run(base: Path, command: list[str], kill_after_s: float | None = None) -> tuple[float, float, float, bool]:
    """Run a command; returns wall and processor seconds, peak MiB, and whether it ended by itself."""
    begin = time.monotonic()
    environment = {**os.environ, "NANOZHCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL)
    if kill_after_s is not None:
        try:
            process.wait(kill_after_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return time.monotonic() - begin, 0.0, 0.0, False
        return time.monotonic() - begin, 0.0, 0.0, process.returncode == 0
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0, command
    return time.monotonic() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--text", nargs="+", default=["builtin"])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench_data"))
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    begin = time.monotonic()
    mb = generate(args.folder / "c4", int(args.gb * 1e9), args.text) / 1e6
    packed = sum(p.stat().st_size for p in (args.folder / "c4").iterdir()) / 1e6
    print(f"generated {mb:,.0f} MB of text, {packed:,.0f} MB packed, in {time.monotonic() - begin:.0f} s", flush=True)
    data, one, two = ["--data", str(args.folder / "c4")], args.folder / "one", args.folder / "two"
    clean = ["-m", "scripts.data_fetch", *data, "--clean=default", "--name=clean"]
    stages = {
        "fetch": ["-m", "scripts.data_fetch", *data, "--name=raw"], "fetch and clean": clean,
        "tokenizer": ["-m", "scripts.tok_train", *data, "--vocab-size=32768", "--name=t", "--memory-limit=1g"],
        "token shards": ["-c", TOKENIZE],
    }  # fmt: skip
    took = {}
    for name, command in stages.items():
        wall, cpu, peak, _ = run(one, command)
        took[name] = wall
        print(f"{name:<16} {wall:7.1f} s, {mb / wall:6.1f} MB/s, {mb / cpu:6.1f} MB/s per core, peak {peak:,.0f} MiB",
              flush=True)  # fmt: skip
    rng, killed = random.Random(1), 0
    shutil.copytree(one / "tokenizer", two / "tokenizer")
    for name, share in (("fetch and clean", 0.7), ("token shards", 0.3)):
        left = round(args.kills * share)
        while not run(two, stages[name], rng.uniform(0.05, 0.6) * took[name] if left > 0 else None)[3]:
            killed, left = killed + 1, left - 1
    found = sorted(
        p.relative_to(one) for p in one.glob("*/clean*/*") if p.suffix in (".json", ".parquet", ".bin", ".idx")
    )
    differ = [str(p) for p in found if (one / p).read_bytes() != (two / p).read_bytes()]
    print(f"killed {killed} times and started again: {len(found)} files, {len(differ)} differ {differ}")


if __name__ == "__main__":
    main()
