"""Our tokenizer beside others on the same documents: seconds, MB/s, peak memory beyond the text, medians of --repeat.

    python dev/bench_tokenizer.py train encode memory TEXT.jsonl.gz [...] --peer-python=/path/to/python

Each run is a process of its own, libraries in turns; with one thread, seconds are those of the processor. encode: the
same vocabulary for all. memory: `scripts.tok_train` on --megabytes made of the text, with a limit of a twentieth of
it, and on half. From files to token shards, and kill -9: `dev.bench_data`.

PyPI's rustbpe has the name of ours, so the others run in --peer-python, an environment with rustbpe, tokenizers,
sentencepiece, youtokentome, gigabpe, bpeasy, tiktoken as far as they are to be compared.
"""

import argparse
import ctypes
import glob
import gzip
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {"train": ("ours", "rustbpe", "tokenizers", "sentencepiece", "youtokentome", "gigabpe", "bpeasy"),
             "encode": ("ours", "tiktoken", "tokenizers", "rustbpe")}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="train, encode, memory; then JSON lines with key text, .gz or not")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the others")
    parser.add_argument("--others", nargs="*", help="only these (default: all that are installed)")
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[32768])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--megabytes", type=int, default=120)
    args = parser.parse_args()
    parts = (*LIBRARIES, "memory")
    docs = read([name for what in args.what if what not in parts for name in sorted(glob.glob(what))])
    for kind in (what for what in args.what if what in parts):
        for size in args.vocab_size:
            memory(docs, size, args) if kind == "memory" else side_by_side(kind, docs, size, args)


def read(names: list[str]) -> list[str]:
    docs: list[str] = []
    for name in names:
        with gzip.open(name, "rt", encoding="utf-8") if name.endswith(".gz") else open(name, encoding="utf-8") as lines:
            docs += [json.loads(line)["text"] for line in lines]
    return docs


def worker(kind: str, name: str, path: str, size: int, threads: int) -> None:
    """Train or encode with one library; runs in either interpreter, prints JSON. Nothing else is imported."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel notes the peak anew (Linux)
    before = memory_kb("VmRSS")
    run = {"train": trainer, "encode": encoder}[kind](name, job["docs"], job["pattern"], size, threads, path)
    # on one core, other processes must not count: on a shared machine they come and go
    clock = time.process_time if threads == 1 else time.perf_counter
    started = clock()
    result = run()
    seconds, peak = clock() - started, memory_kb("VmHWM") - before
    digest = hashlib.sha256(json.dumps(result).encode()).hexdigest() if result is not None else None
    print(json.dumps({"seconds": seconds, "peak_mb": peak / 1024, "digest": digest}))


def memory_kb(field: str) -> int:
    """Resident memory now, VmRSS, or its peak since that was last forgotten, VmHWM (Linux)."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def trainer(name: str, docs: list[str], pattern: str, size: int, threads: int, path: str) -> Callable[[], Any]:
    """Return a run that trains on docs and returns the tokens as hex, where the library tells them in order."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    text = path + ".txt"
    if name == "ours":
        from rustbpe import BPE

        return lambda: [token.hex() for token in BPE.train(docs, size, threads=threads).ranks()]
    if name == "rustbpe":
        import rustbpe

        def run() -> list[str]:
            peer = rustbpe.Tokenizer()
            peer.train_from_iterator(iter(docs), size, pattern=pattern)
            return [bytes(token).hex() for token, _ in sorted(peer.get_mergeable_ranks(), key=lambda item: item[1])]

        return run
    if name == "tokenizers":
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        options = {"vocab_size": size, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
        return lambda: tokenizer.train_from_iterator(docs, trainers.BpeTrainer(**options))
    if name == "bpeasy":
        import bpeasy

        return lambda: bpeasy.train_bpe(iter(docs), pattern, 128, size) and None
    if not os.path.exists(text):
        Path(text).write_text("\n".join(line for doc in docs for line in doc.split("\n") if line), encoding="utf-8")
    if name == "sentencepiece":
        import sentencepiece

        options = {"model_type": "bpe", "num_threads": threads, "character_coverage": 0.9995, "minloglevel": 2}
        options |= {"input": text, "model_prefix": path + ".sp", "vocab_size": size, "max_sentence_length": 1 << 20}
        return lambda: sentencepiece.SentencePieceTrainer.train(**options)
    if name == "youtokentome":
        import youtokentome

        options = {"data": text, "model": path + ".yttm", "vocab_size": size, "n_threads": threads}
        return lambda: youtokentome.BPE.train(**options) and None
    import gigabpe

    return lambda: gigabpe.train_bpe([text], size, threads=threads) and None


def encoder(name: str, docs: list[str], pattern: str, size: int, threads: int, path: str) -> Callable[[], Any]:
    """Return a run that encodes docs one after the other and returns the number of ids; the vocabulary is ours."""
    folder = path + f".{size}"
    with open(folder + "/ranks.json", encoding="utf-8") as file:
        ranks = [bytes.fromhex(token) for token in json.load(file)]
    if name == "ours":
        from rustbpe import BPE

        ours = BPE.from_ranks(ranks)
        return lambda: sum(len(ours.encode(doc)) for doc in docs)
    if name == "tiktoken":
        import tiktoken

        ranked = {token: i for i, token in enumerate(ranks)}
        encoding = tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=ranked, special_tokens={})
        return lambda: sum(len(encoding.encode_ordinary(doc)) for doc in docs)
    if name == "tokenizers":
        from tokenizers import Tokenizer

        peer = Tokenizer.from_file(folder + "/tokenizer.json")
        return lambda: sum(len(peer.encode(doc, add_special_tokens=False).ids) for doc in docs)
    import rustbpe

    trained = rustbpe.Tokenizer()
    trained.train_from_iterator(iter(docs), size, pattern=pattern)  # gives the same merges: see train
    return lambda: sum(len(trained.encode(doc)) for doc in docs)


def side_by_side(kind: str, docs: list[str], size: int, args: argparse.Namespace) -> None:
    """Run every library --repeat times, in turns, and print medians with their ratio to ours."""
    from nanozhchat.conversation import SPECIAL_TOKENS
    from nanozhchat.tokenizer import Tokenizer

    n_bytes = sum(len(doc.encode()) for doc in docs)
    print(f"{kind} {size}: {len(docs):,} documents, {n_bytes / 1e6:.1f} MB, {args.threads} thread(s)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        tokenizer = Tokenizer.train(docs, size + len(SPECIAL_TOKENS))
        tokenizer.save(Path(f"{path}.{size}"))
        ranks = [tokenizer.decode_bytes([i]).hex() for i in range(size)]
        Path(f"{path}.{size}/ranks.json").write_text(json.dumps(ranks))
        path.write_text(json.dumps({"docs": docs, "pattern": tokenizer.pattern}), encoding="utf-8")
        runs: dict[str, list[dict[str, Any]]] = {
            name: [] for name in LIBRARIES[kind] if name == "ours" or args.others is None or name in args.others
        }
        for name in [*runs] * args.repeat:
            if name not in runs:
                continue
            python = sys.executable if name == "ours" else args.peer_python
            call = [python, os.path.abspath(__file__), "--worker", kind, name, str(path), str(size), str(args.threads)]
            done = subprocess.run(call, capture_output=True, text=True, cwd=folder)
            if done.returncode:
                print(f"  {name}: left out ({(done.stderr.strip().splitlines() or ['?'])[-1][:100]})", flush=True)
                del runs[name]
            else:
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    ours = statistics.median(run["seconds"] for run in runs["ours"])
    for name, found in runs.items():
        seconds, peak = (statistics.median(run[key] for run in found) for key in ("seconds", "peak_mb"))
        same = {run["digest"] for run in found} == {run["digest"] for run in runs["ours"]}
        note = {"train": "same tokens", "encode": "same number of ids"}[kind] if same else ""
        print(f"  {name:<14}{seconds:8.2f} s {seconds / ours:6.1f} x {n_bytes / 1e6 / seconds:7.1f} MB/s "
              f"{peak:7.0f} MB peak ({peak / n_bytes * 1e6:5.2f} per MB)  {note}", flush=True)  # fmt: skip


def splice(source: str, rng: random.Random, folder: str, megabytes: float, n_files: int = 8) -> None:
    """Write files of text spliced from pieces of the source, so that new chunks never stop coming."""
    for number in range(n_files):
        with open(f"{folder}/{number}.jsonl", "w", encoding="utf-8") as out:
            while out.tell() < megabytes * 1e6 / n_files:
                starts = [rng.randrange(len(source)) for _ in range(60)]
                text = "".join(source[start : start + rng.randrange(5, 40)] for start in starts)
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def memory(docs: list[str], size: int, args: argparse.Namespace) -> None:
    """Train on spliced text within little memory."""
    source, rng, (half, whole) = "".join(docs), random.Random(0), (args.megabytes / 2, args.megabytes)
    for megabytes, limit in ((1, whole / 21), (half, whole / 21), (half, half / 21), (whole, whole / 21)):  # MB, MiB
        with tempfile.TemporaryDirectory() as folder:
            splice(source, rng, folder, megabytes)
            flags = [f"--data={folder}/*.jsonl", "--name=t", "--max-bytes=1000000000000", f"--threads={args.threads}",
                     f"--memory-limit={limit:.3f}m", f"--vocab-size={size if megabytes > 1 else 2048}"]  # fmt: skip
            command, env = [sys.executable, "-m", "scripts.tok_train"], {**os.environ, "NANOZHCHAT_BASE_DIR": folder}
            process = subprocess.Popen([*command, *flags], env=env, cwd=ROOT, stdout=subprocess.DEVNULL)
            _, process.returncode, usage = os.wait4(process.pid, 0)
            assert process.returncode == 0
            seconds = usage.ru_utime + usage.ru_stime
            print(f"  {megabytes:.0f} MB, limit {limit:.1f} MiB: {seconds:.1f} s = {megabytes / seconds:.2f} MB/s, "
                  f"peak {usage.ru_maxrss / 1024:.0f} MB", flush=True)  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
    else:
        main()
