"""Text of C4's layout through fetch, clean, tokenizer and token shards: rates, peak memory, kill -9 at random moments.

    python -m dev.bench_data --gb=0.3 --kills=20 --text '../shared/data/zh_web/*.gz'

Documents are drawn anew from the sentences of `--text`, one in twenty nearly and one in fifty exactly repeated, from
anywhere before; bad shards of every kind lie between. Rates are MB of the generated text per second, and per second of
processor time, so per core; memory is that of all processes of a stage together.
"""

import argparse
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanozhchat import files, sources

FILE_DOCUMENTS = 40_000  # about 100 MB
EXACT, NEAR = range(2), range(2, 7)  # which of a hundred documents repeat an earlier one
MARK = "（转载"  # what near duplicates begin with
BAD = {
    "line.json": b'{"text": "x"}\n{"text": "to\n', "gbk.json": '{"text": "中文"}\n'.encode("gbk"),
    "null.json": b'{"text": null}\n', "long.json": b'{"text": "%s"}\n' % (b"x" * 50_000_000), "empty.json.gz": b"",
    "cut.json.gz": gzip.compress(b'{"text": "x"}\n')[:-8], "key.json": b'{"story": "x"}\n', "html.parquet": b"<html>",
}  # fmt: skip
SKIPPED = {"broken line": 1, "not UTF-8": 1, "null": 1, "too long": 1, "empty file": 1, "damaged file": 2,
           "file without the field": 1}  # fmt: skip
TOKENIZE = ("from nanozhchat import corpus, paths, token_store; from nanozhchat.tokenizer import Tokenizer;"
            "token_store.tokenize(corpus.load('clean'), Tokenizer.load(paths.tokenizer_dir('t')))")  # fmt: skip


@cache
def sentences(specs: tuple[str, ...]) -> list[str]:
    texts = sources.documents(specs, "train", max_bytes=40_000_000)
    return [s for text in texts for s in re.findall(r"[^。！？\n{#…]{9,80}[。！？]", text)]


def document(pool: list[str], number: int) -> str:
    rng, place = random.Random(number), number % 100
    if number >= 100 and (place in EXACT or place in NEAR):
        original = document(pool, rng.randrange(number // 100) * 100 + rng.randrange(NEAR.stop, 100))
        return original if place in EXACT else f"{MARK}{number}）{original[2:]}"
    return "\n".join("".join(rng.choices(pool, k=rng.randint(2, 6))) for _ in range(rng.randint(3, 12)))


def generate_file(folder: Path, specs: tuple[str, ...], number: int) -> int:
    """Write one json.gz file; returns the bytes of text."""
    size = 0
    with gzip.open(folder / f"c4-zh.tfrecord-{number:05d}.json.gz", "wb", compresslevel=1) as out:
        for i in range(number * FILE_DOCUMENTS, (number + 1) * FILE_DOCUMENTS):
            text = document(sentences(specs), i)
            row = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"https://example.cn/{i}"}
            size += len(text.encode())
            out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return size


def generate(folder: Path, n_bytes: int, specs: tuple[str, ...]) -> tuple[float, int]:
    """Write files on all cores, the bad ones between them; returns MB of text, and the documents."""
    folder.mkdir(parents=True)
    for name, content in BAD.items():
        (folder / f"c4-zh.tfrecord-00001-{name}").write_bytes(content)
    size = generate_file(folder, specs, 0)
    n_files = max(2, round(n_bytes / size))
    with ProcessPoolExecutor() as pool:
        size += sum(pool.map(partial(generate_file, folder, specs), range(1, n_files)))
    return size / 1e6, n_files * FILE_DOCUMENTS


def family(pid: int) -> Iterator[int]:
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            yield from family(int(child))


def run(base: Path, command: list[str], kill_after_s: float = 1e9) -> tuple[bool, float, float, float]:
    """Run a command: whether it ended by itself, wall and processor seconds, peak MiB of all its processes."""
    begin, peak, pids = time.monotonic(), 0, set[int]()
    environment = {**os.environ, "NANOZHCHAT_BASE_DIR": str(base)}
    process = subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL)
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        if time.monotonic() - begin >= kill_after_s:
            process.kill()
        try:
            pids |= (now := {*family(process.pid)})
            peak = max(peak, sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in now))
        except (OSError, IndexError):  # one of them has just ended
            pass
        time.sleep(0.05)
    process.returncode, wall = ended[1], time.monotonic() - begin
    assert ended[1] in (0, signal.SIGKILL), command
    time.sleep(1)
    left = [pid for pid in pids if Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert not left, "helpers must notice that the process is gone"  # what is dead and not yet reaped has no command
    return not ended[1], wall, ended[2].ru_utime + ended[2].ru_stime, peak * os.sysconf("SC_PAGE_SIZE") / 2**20


def check(folder: Path, n_documents: int) -> None:
    """Print what was counted, and how many of the planted duplicates are still there."""
    manifest = json.loads((folder / "manifest.json").read_text())
    dropped = {name: sum(step["dropped"].values()) for name, step in manifest["cleaning"]["steps"].items()}
    columns = (pq.read_table(path).column(0) for path in folder.glob("*.parquet"))
    missed = sum(pc.sum(pc.starts_with(column, MARK)).as_py() for column in columns)
    planted, found = (n_documents // 100 - 1) * NEAR.stop, dropped["exact"] + dropped["near"]
    others = sum(dropped.values()) - found  # they never came to the search for duplicates
    bad = "as planted" if manifest["skipped"] == SKIPPED else f"{manifest['skipped']} instead of {SKIPPED}"
    print(f"bad shards counted: {bad}; dropped {dropped}")
    print(f"planted duplicates {planted:,}, left {missed:,}: recall {1 - missed / planted:.2%}, precision at least "
          f"{(planted - missed - others) / found:.2%}", flush=True)  # fmt: skip


def contents(base: Path) -> dict[str, str]:
    made = (path for name in ("corpus/clean", "tokenizer/t", "tokens") for path in (base / name).rglob("*.*"))
    return {str(path.relative_to(base)): files.sha256(path) for path in made if path.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--text", nargs="+", default=["builtin"])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench_data"))
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    begin, data, base = time.monotonic(), args.folder / "c4", args.folder / "base"
    mb, n_documents = generate(data, int(args.gb * 1e9), tuple(args.text))
    packed = sum(path.stat().st_size for path in data.iterdir()) / 1e6
    print(f"generated {mb:,.0f} MB of text, {n_documents:,} documents, {packed:,.0f} MB packed, in "
          f"{time.monotonic() - begin:.0f} s", flush=True)  # fmt: skip
    fetch = ["-m", "scripts.data_fetch", "--data", str(data), "--skip-bad"]
    shards = [str(base / "corpus/clean" / f"{split}-*.parquet") for split in ("val", "train")]  # val: what is held out
    chain = {
        "fetch and clean": [*fetch, "--clean=default", "--name=clean"],
        "tokenizer": ["-m", "scripts.tok_train", "--data", *shards, "--vocab-size=32768", "--name=t", "--chunk-files=8",
                      f"--memory-limit={max(200, round(mb / 20))}m", f"--max-bytes={round(mb * 1e6)}"],
        "token shards": ["-c", TOKENIZE],
    }  # fmt: skip
    total_s = 0.0
    for name, command in {"fetch": [*fetch, "--name=raw"], **chain}.items():
        _, wall, cpu, peak = run(base, command)
        total_s += wall if name in chain else 0
        print(f"{name:<16} {wall:7.1f} s, {mb / wall:6.1f} MB/s, {mb / cpu:6.1f} MB/s per core, peak {peak:,.0f} MiB; "
              f"67 GB: 67,000 MB / {mb / wall:.1f} MB/s = {67_000 / mb * wall:,.0f} s", flush=True)  # fmt: skip
    check(base / "corpus/clean", n_documents)
    want = contents(base)
    shutil.rmtree(base)
    begin, rng, killed = time.monotonic(), random.Random(1), 0
    moments = iter([rng.uniform(0.3, 1.6) * total_s / (args.kills + 1) for _ in range(args.kills)])
    left = next(moments, 1e9)
    for command in chain.values():
        while not (ended := run(base, command, left))[0]:
            killed, left = killed + 1, next(moments, 1e9)
        left = max(0.1, left - ended[1])
    found = contents(base)
    differ = [name for name in want.keys() | found.keys() if want.get(name) != found.get(name)]
    print(f"killed {killed} times and started again, {time.monotonic() - begin:.0f} s instead of {total_s:.0f}: "
          f"{len(want)} files, {len(differ)} differ {differ}")  # fmt: skip


if __name__ == "__main__":
    main()
