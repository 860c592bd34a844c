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
from functools import partial
from pathlib import Path

Seconds = tuple[float, float]  # wall clock, processor time

# Runs in the other interpreter, so it may use nothing of ours.
PEER = """
import json, sys, time
import rustbpe
docs, pattern, size, repeat = json.load(open(sys.argv[1], encoding="utf-8"))
peer = rustbpe.Tokenizer()
def best_of(run):
    times = []
    for _ in range(repeat):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return min(w for w, _ in times), min(c for _, c in times)
train = best_of(lambda: peer.train_from_iterator(iter(docs), size, pattern=pattern))
print(json.dumps({"train": train, "encode": best_of(lambda: [peer.encode(doc) for doc in docs])}))
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


def best_of(repeat: int, run: Callable[[], object]) -> Seconds:
    """Return the shortest wall clock of several runs, and the least processor time of all threads."""
    times = []
    for _ in range(repeat):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return min(w for w, _ in times), min(c for _, c in times)


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


def peer_times(python: str, docs: list[str], pattern: str, vocab_size: int, repeat: int) -> dict[str, Seconds]:
    """Time PyPI's rustbpe in its own interpreter: training and encoding."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "docs.json"
        path.write_text(json.dumps([docs, pattern, vocab_size, repeat]), encoding="utf-8")
        command = [python, "-c", PEER, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return {what: (wall, cpu) for what, (wall, cpu) in json.loads(done.stdout).items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="JSON lines with key text, plain or .gz")
    parser.add_argument("--peer-python", help="interpreter that has PyPI's rustbpe")
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--max-bytes", type=int, default=50_000_000)
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    docs = read(args.files, args.max_bytes)
    n_bytes = sum(len(doc.encode()) for doc in docs)
    print(f"{len(docs)} documents, {n_bytes / 1e6:.1f} MB, {os.cpu_count()} cores", flush=True)
    for size in args.vocab_size:
        compare(docs, n_bytes, size, args.repeat, args.peer_python)


def compare(docs: list[str], n_bytes: int, vocab_size: int, repeat: int, peer_python: str | None) -> None:
    """Print the figures for one vocabulary size."""
    from nanozhchat.tokenizer import SPECIAL_TOKENS, Tokenizer

    full_size = vocab_size + len(SPECIAL_TOKENS)
    tokenizer = Tokenizer.train(docs, full_size)
    report(f"train {vocab_size}", "ours", best_of(repeat, lambda: Tokenizer.train(docs, full_size)))
    peer: dict[str, Seconds] = {}
    if peer_python:
        peer = peer_times(peer_python, docs, tokenizer.pattern, vocab_size, repeat)
        report(f"train {vocab_size}", "PyPI rustbpe", peer["train"])
    if run := hugging_face_trainer(docs, tokenizer.pattern, vocab_size):
        report(f"train {vocab_size}", "tokenizers", best_of(repeat, run))
    encoding, threads = tokenizer.to_tiktoken(), os.cpu_count() or 1
    one, all_cores = "encode, one thread, lists", "encode, all cores"
    report(one, "ours", best_of(repeat, lambda: [tokenizer.encode(doc) for doc in docs]), n_bytes)
    report(one, "tiktoken", best_of(repeat, lambda: [encoding.encode_ordinary(doc) for doc in docs]), n_bytes)
    if peer:
        report(one, "PyPI rustbpe", peer["encode"], n_bytes)
    report(all_cores, "ours", best_of(repeat, lambda: tokenizer.encode_batch_flat(docs)), n_bytes)
    run = partial(encoding.encode_ordinary_batch, docs, num_threads=threads)
    report(all_cores, "tiktoken", best_of(repeat, run), n_bytes)


def report(what: str, who: str, seconds: Seconds, n_bytes: int | None = None) -> None:
    """Print one line. The ratio is to the last line of ours; processor time counts on a busy machine."""
    if who == "ours":
        report.ours = seconds  # type: ignore[attr-defined]
    wall, cpu = (theirs / ours for theirs, ours in zip(seconds, report.ours, strict=True))  # type: ignore[attr-defined]
    speed = f"{n_bytes / 1e6 / seconds[0]:8.1f} MB/s" if n_bytes else ""
    print(
        f"{what:<26} {who:<14} {seconds[0]:8.2f} s ({cpu_text(seconds)}){speed}  {wall:.1f} x ({cpu:.1f} x)", flush=True
    )


def cpu_text(seconds: Seconds) -> str:
    """Show the processor time."""
    return f"{seconds[1]:.2f} s of processors"


if __name__ == "__main__":
    main()
