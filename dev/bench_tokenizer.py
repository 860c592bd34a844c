"""Compare our tokenizer with others, side by side on one text: training time and encoding speed.

    python dev/bench_tokenizer.py TEXT.jsonl.gz [...] --peer-python=/path/to/python

Hugging Face `tokenizers` and tiktoken are compared where installed. PyPI's `rustbpe` has the name of ours, so it runs
in the interpreter given by --peer-python (for example: uv venv /tmp/peer && uv pip install --python /tmp/peer rustbpe).
All trainers get the same documents in memory and the same split pattern; each figure is the best of --repeat runs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Runs in the other interpreter, so it may use nothing of ours.
PEER = """
import json, sys, time
import rustbpe
docs, pattern, size, repeat = json.load(open(sys.argv[1], encoding="utf-8"))
best = 1e9
for _ in range(repeat):
    peer = rustbpe.Tokenizer()
    started = time.perf_counter()
    peer.train_from_iterator(iter(docs), size, pattern=pattern)
    best = min(best, time.perf_counter() - started)
started = time.perf_counter()
for doc in docs:
    peer.encode(doc)
print(json.dumps([best, time.perf_counter() - started]))
"""


def read(names: list[str], max_bytes: int) -> list[str]:
    """Read documents from JSON lines (key `text`), plain or gzipped."""
    docs: list[str] = []
    total = 0
    for name in names:
        with gzip.open(name, "rt", encoding="utf-8") if name.endswith(".gz") else open(name, encoding="utf-8") as lines:
            for line in lines:
                docs.append(json.loads(line)["text"])
                total += len(docs[-1].encode())
                if total >= max_bytes:
                    return docs
    return docs


def best_of(repeat: int, run: Callable[[], object]) -> float:
    """Return the shortest of several times, in seconds."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def hugging_face_trainer(docs: list[str], pattern: str, vocab_size: int) -> Callable[[], object] | None:
    """Return a run of the trainer of `tokenizers`, or None where it is not installed."""
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        return None

    def run() -> None:
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(docs, trainer)

    return run


def peer_times(python: str, docs: list[str], pattern: str, vocab_size: int, repeat: int) -> tuple[float, float]:
    """Time PyPI's rustbpe in its own interpreter: (training, encoding) seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "docs.json"
        path.write_text(json.dumps([docs, pattern, vocab_size, repeat]), encoding="utf-8")
        command = [python, "-c", PEER, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    train_s, encode_s = json.loads(done.stdout)
    return train_s, encode_s


def main() -> None:
    """Measure and print."""
    from nanozhchat.tokenizer import SPECIAL_TOKENS, Tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="JSON lines with key text, plain or .gz")
    parser.add_argument("--peer-python", help="interpreter that has PyPI's rustbpe")
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--max-bytes", type=int, default=50_000_000)
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    docs = read(args.files, args.max_bytes)
    n_bytes = sum(len(doc.encode()) for doc in docs)
    print(f"{len(docs)} documents, {n_bytes / 1e6:.1f} MB, {os.cpu_count()} cores")
    for size in args.vocab_size:
        ours_s = best_of(args.repeat, lambda size=size: Tokenizer.train(docs, size + len(SPECIAL_TOKENS)))
        print(f"train {size:>6}: ours {ours_s:.2f} s", end="")
        pattern = Tokenizer.train(docs[:50], 300).pattern
        if run := hugging_face_trainer(docs, pattern, size):
            other_s = best_of(args.repeat, run)
            print(f" | tokenizers {other_s:.2f} s = {other_s / ours_s:.1f} x", end="")
        peer_encode_s = None
        if args.peer_python:
            other_s, peer_encode_s = peer_times(args.peer_python, docs, pattern, size, args.repeat)
            print(f" | PyPI rustbpe {other_s:.2f} s = {other_s / ours_s:.1f} x", end="")
        print()
        tokenizer = Tokenizer.train(docs, size + len(SPECIAL_TOKENS))
        encoding = tokenizer.to_tiktoken()
        ours_s = best_of(args.repeat, lambda t=tokenizer: [t.encode(doc) for doc in docs])
        flat_s = best_of(args.repeat, lambda t=tokenizer: t.encode_batch_flat(docs))
        other_s = best_of(args.repeat, lambda e=encoding: [e.encode_ordinary(doc) for doc in docs])
        batch_s = best_of(
            args.repeat, lambda e=encoding: e.encode_ordinary_batch(docs, num_threads=os.cpu_count() or 1)
        )
        tokens = len(tokenizer.encode_batch_flat(docs)[0])
        print(f"encode {size:>5}: {n_bytes / tokens:.3f} bytes/token; one thread, lists: ours {n_bytes / ours_s / 1e6:.1f} "
              f"MB/s | tiktoken {n_bytes / other_s / 1e6:.1f} MB/s = {other_s / ours_s:.1f} x", end="")  # fmt: skip
        if peer_encode_s:
            print(f" | PyPI rustbpe {n_bytes / peer_encode_s / 1e6:.1f} MB/s = {peer_encode_s / ours_s:.1f} x", end="")
        print(f"; batch, all cores: ours {n_bytes / flat_s / 1e6:.1f} MB/s | tiktoken {n_bytes / batch_s / 1e6:.1f} MB/s "
              f"= {batch_s / flat_s:.1f} x")  # fmt: skip


if __name__ == "__main__":
    main()
