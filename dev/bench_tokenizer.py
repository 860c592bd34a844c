"""Our tokenizer beside others, and the proofs of its limits. Every part prints figures and ratios; see --help.

    python dev/bench_tokenizer.py train encode TEXT.jsonl.gz [...] --peer-python=/path/to/python
    python dev/bench_tokenizer.py files memory kills fuzz TEXT.jsonl.gz [...]

train: every trainer in a process of its own, in turns, medians of --repeat; peak memory beyond the text. With one
thread, here and below, seconds are those of the processor.
encode: ours, tiktoken, `tokenizers` and PyPI's rustbpe in one process each, same vocabulary, ids compared.
files: .jsonl.gz to tokenizer and to token shards through our scripts' code, on --megabytes of text made from the input.
memory: --megabytes of made text with a memory limit a twentieth of it, and half of the text: peak memory and time.
kills: kill -9 at --kills random moments, the same command again: the tokenizer must be that of an undisturbed run.
fuzz: 100,000 strings: round trip, chunks = regex, ids = tiktoken = `tokenizers`.

PyPI's rustbpe has the name of ours, so the others run in --peer-python, an environment with rustbpe, tokenizers,
sentencepiece, youtokentome, gigabpe, bpeasy, tiktoken as far as they are to be compared.
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRAINERS = ("ours", "rustbpe", "tokenizers", "sentencepiece", "youtokentome", "gigabpe", "bpeasy")
SPECIALS = ("👨\u200d👩\u200d👧", "❤️", "🇨🇳", "e\u0301", "\u200d", "\ufeff", "\r\n", "<|end|>", "'ll", "'S")
ENCODERS = ("ours", "tiktoken", "tokenizers", "rustbpe")


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"train": train, "encode": encode, "files": from_files, "memory": memory, "kills": kills, "fuzz": fuzz}
    parser.add_argument(
        "what", nargs="+", help=f"parts ({', '.join(parts)}), then JSON lines with key text, .gz or not"
    )
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the others")
    parser.add_argument("--others", nargs="*", help="only these (default: all that are installed)")
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[32768])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--megabytes", type=int, default=120)
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    args.files = [name for pattern in args.what if pattern not in parts for name in sorted(glob.glob(pattern))]
    for part in (part for part in args.what if part in parts):
        print(f"== {part}", flush=True)
        parts[part](args)


def read(names: list[str]) -> list[str]:
    """Read documents from JSON lines (key `text`), plain or gzipped, or whole paragraphs of .txt files."""
    docs: list[str] = []
    for name in names:
        with gzip.open(name, "rt", encoding="utf-8") if name.endswith(".gz") else open(name, encoding="utf-8") as lines:
            if ".txt" in name:
                docs += lines.read().split("\n\n")
            else:
                docs += [json.loads(line)["text"] for line in lines]
    return docs


# --- side by side, one process a run


def worker(kind: str, name: str, path: str, size: int, threads: int) -> None:
    """Train or encode with one library; runs in either interpreter, prints JSON. Nothing else is imported."""
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    docs, pattern = job["docs"], job["pattern"]
    before = forget_peak()
    run = {"train": trainer, "encode": encoder}[kind](name, docs, pattern, size, threads, path)
    # on one core, other processes must not count: on a shared machine they come and go
    clock = time.process_time if threads == 1 else time.perf_counter
    started = clock()
    result = run()
    seconds = clock() - started
    peak = memory_kb("VmHWM") - before
    digest = hashlib.sha256(json.dumps(result).encode()).hexdigest() if result is not None else None
    print(json.dumps({"seconds": seconds, "peak_mb": peak / 1024, "digest": digest}))


def memory_kb(field: str) -> int:
    """Return a figure of this process from the kernel, in KB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))


def forget_peak() -> int:
    """Have the kernel note the peak anew; returns the memory in use now, in KB. Linux only."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return memory_kb("VmRSS")


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


def side_by_side(kind: str, names: tuple[str, ...], docs: list[str], size: int, args: argparse.Namespace) -> None:
    """Run every library --repeat times, in turns, and print medians with their ratio to ours."""
    from nanozhchat.tokenizer import Tokenizer

    n_bytes = sum(len(doc.encode()) for doc in docs)
    print(f"{kind} {size}: {len(docs):,} documents, {n_bytes / 1e6:.1f} MB, {args.threads} thread(s)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        tokenizer = Tokenizer.train(docs, size + len(Tokenizer.train(docs[:9], 300)._special))
        tokenizer.save(Path(f"{path}.{size}"))
        ranks = [tokenizer.decode_bytes([i]).hex() for i in range(size)]
        Path(f"{path}.{size}/ranks.json").write_text(json.dumps(ranks))
        path.write_text(json.dumps({"docs": docs, "pattern": tokenizer.pattern}), encoding="utf-8")
        names = tuple(n for n in names if n == "ours" or args.others is None or n in args.others)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(args.repeat):
            for name in [n for n in names if n in runs]:
                python = sys.executable if name == "ours" else args.peer_python
                call = [
                    python,
                    os.path.abspath(__file__),
                    "--worker",
                    kind,
                    name,
                    str(path),
                    str(size),
                    str(args.threads),
                ]
                done = subprocess.run(call, capture_output=True, text=True, cwd=folder)
                if done.returncode:
                    print(f"  {name}: left out ({(done.stderr.strip().splitlines() or ['?'])[-1][:100]})", flush=True)
                    del runs[name]
                else:
                    runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    ours = statistics.median(run["seconds"] for run in runs["ours"])
    for name, found in runs.items():
        seconds = statistics.median(run["seconds"] for run in found)
        peak = statistics.median(run["peak_mb"] for run in found)
        same = {run["digest"] for run in found} == {run["digest"] for run in runs["ours"]}
        notes = ["same tokens" if kind == "train" else "same number of ids"] if same else []
        print(f"  {name:<14}{seconds:8.2f} s {seconds / ours:6.1f} x {n_bytes / 1e6 / seconds:7.1f} MB/s "
              f"{peak:7.0f} MB peak ({peak / n_bytes * 1e6:5.2f} per MB)  {' '.join(notes)}", flush=True)  # fmt: skip


def train(args: argparse.Namespace) -> None:
    """Compare trainers, and our own with one and two threads."""
    docs = read(args.files)
    for size in args.vocab_size:
        side_by_side("train", TRAINERS, docs, size, args)
        from rustbpe import BPE

        seconds: dict[int, list[float]] = {1: [], 2: []}
        for turn in range(4 * args.repeat):
            started = time.perf_counter()
            BPE.train(docs, size, threads=1 + turn % 2)
            seconds[1 + turn % 2].append(time.perf_counter() - started)
        one, two = statistics.median(seconds[1]), statistics.median(seconds[2])
        print(f"  ours, 1 and 2 threads: {one:.2f} s, {two:.2f} s = {one / two:.2f} x", flush=True)


def encode(args: argparse.Namespace) -> None:
    """Compare encoders."""
    for size in args.vocab_size:
        side_by_side("encode", ENCODERS, read(args.files), size, args)


# --- from files


def make_text(folder: Path, files: list[str], megabytes: float, *, packed: bool, n_files: int = 8) -> str:
    """Write C4-like files of documents spliced from pieces of the input: new chunks never stop coming."""
    source = "".join(read(files))
    rng = random.Random(megabytes)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n_files):
        name, written = folder / f"{number:03d}.jsonl{'.gz' if packed else ''}", 0
        with gzip.open(name, "wt", 1, encoding="utf-8") if packed else open(name, "w", encoding="utf-8") as out:
            while written < megabytes * 1e6 / n_files:
                starts = [rng.randrange(len(source)) for _ in range(60)]
                text = "".join(source[start : start + rng.randrange(5, 40)] for start in starts)
                out.write(json.dumps({"text": text, "url": ""}, ensure_ascii=False) + "\n")
                written += len(text.encode())
    return str(folder / f"*.jsonl{'.gz' if packed else ''}")


def from_files(args: argparse.Namespace) -> None:
    """Time .jsonl.gz -> counted chunks -> tokenizer, and -> token shards, on one core, in seconds of the processor."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NANOZHCHAT_BASE_DIR"] = folder
        from nanozhchat import corpus, sources, token_store
        from nanozhchat.tokenizer import Tokenizer

        spec = make_text(Path(folder) / "text", args.files, args.megabytes, packed=True)
        for _ in range(args.repeat):
            times: dict[str, float] = {}

            def note(stage: str, done: int, total: int, times: dict[str, float] = times) -> None:
                times.setdefault("counted" if stage == "count" and done == total else stage, time.process_time())

            started = time.process_time()
            tokenizer = Tokenizer.train(
                sources.documents([spec], "train"), args.vocab_size[0], threads=1, progress=note
            )
            megabytes = tokenizer.trained_on["bytes"] / 1e6
            reading, merging = times["counted"] - started, time.process_time() - times["counted"]
            print(f"  {megabytes:.0f} MB read and counted at {megabytes / reading:.1f} MB/s; "
                  f"merged in {merging:.2f} s = {40 * merging / megabytes:.2f} s per 40 MB", flush=True)  # fmt: skip
            started = time.process_time()
            made = corpus.build([spec], "bench", progress=lambda line: None)
            built = time.process_time() - started
            token_store.tokenize(made, tokenizer, progress=lambda line: None)
            seconds = time.process_time() - started
            rates = (megabytes / built, megabytes / (seconds - built), megabytes / seconds)
            print(
                "  files to text shards {:.1f} MB/s, these to token shards {:.1f} MB/s, both {:.1f} MB/s".format(*rates)
            )
            shutil.rmtree(folder + "/corpus")
            shutil.rmtree(folder + "/tokens")


# --- limits


def tok_train(folder: str, spec: str, *flags: str) -> subprocess.Popen[bytes]:
    """Start the script."""
    call = [sys.executable, "-m", "scripts.tok_train", "--data", spec, "--name=t", "--max-bytes=1000000000000", *flags]
    env = {**os.environ, "NANOZHCHAT_BASE_DIR": folder}
    return subprocess.Popen(call, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)


def finish(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Wait for success; returns peak memory in MB and seconds of the processor."""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"tok_train failed with status {status}")
    return usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


def memory(args: argparse.Namespace) -> None:
    """Train with a memory limit of a twentieth of the text: on next to none, on half of --megabytes, on all of it."""
    limit = args.megabytes // 21  # MiB
    for megabytes in (1, args.megabytes / 2, args.megabytes):
        with tempfile.TemporaryDirectory() as folder:
            spec = make_text(Path(folder) / "text", args.files, megabytes, packed=False)
            size = args.vocab_size[0] if megabytes > 1 else 2048  # what the script takes whatever the text
            flags = [f"--memory-limit={limit}m", f"--vocab-size={size}", f"--threads={args.threads}"]
            peak, seconds = finish(tok_train(folder, spec, *flags))
            print(f"  {megabytes:.0f} MB, limit {limit} MiB: {seconds:.1f} s = {megabytes / seconds:.2f} MB/s, "
                  f"peak {peak:.0f} MB", flush=True)  # fmt: skip


def kills(args: argparse.Namespace) -> None:
    """Kill the script again and again; compare with an undisturbed run."""
    rng = random.Random(0)
    flags = [f"--vocab-size={args.vocab_size[0]}", "--memory-limit=32m", "--chunk-files=1", "--threads=2"]
    with tempfile.TemporaryDirectory() as folder:
        spec = make_text(Path(folder) / "text", args.files, args.megabytes, packed=True, n_files=7)
        started = time.perf_counter()
        finish(tok_train(folder + "/a", spec, *flags))
        whole = time.perf_counter() - started
        finish(tok_train(folder + "/c", spec, flags[0]))
        done = 0
        while done < args.kills:
            process = tok_train(folder + "/b", spec, *flags)
            time.sleep(rng.uniform(0.2, whole / 2))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                done += 1
            elif process.returncode == 0:
                shutil.rmtree(folder + "/b/tokenizer")  # it got to the end: start over
            process.wait()
        finish(tok_train(folder + "/b", spec, *flags))
        hashes = [Path(f"{folder}/{run}/tokenizer/t/tokenizer.json").read_bytes() for run in "abc"]
        after, whole_text = ("same" if hashes[0] == other else "DIFFERENT" for other in hashes[1:])
        print(f"  {done} kills within {whole:.1f} s of work: {after} tokenizer; in memory, in one piece: {whole_text}")


def fuzz(args: argparse.Namespace) -> None:
    """Compare with regex, tiktoken and `tokenizers` on strings of all planes, controls, marks, emoji, random bytes."""
    import regex
    from tokenizers import Tokenizer as HuggingFace

    from nanozhchat.tokenizer import Tokenizer
    from rustbpe import BPE_PATTERN

    rng = random.Random(1)
    docs = read(args.files[:1])
    tokenizer = Tokenizer.train(docs, 8192)
    encoding, pattern = tokenizer.to_tiktoken(), regex.compile(BPE_PATTERN)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        peer = HuggingFace.from_file(folder + "/tokenizer.json")
    peer.encode_special_tokens = True  # text that looks like a special token is text, as it always is with ours
    wrong = {"round trip": 0, "regex": 0, "tiktoken": 0, "tokenizers": 0}
    for _ in range(100_000):
        text = fuzzed(rng, docs)
        ids = tokenizer.encode(text)
        wrong["round trip"] += tokenizer.decode(ids) != text
        wrong["regex"] += tokenizer._bpe.split(text) != [m[0] for m in pattern.finditer(text)]
        wrong["tiktoken"] += encoding.encode_ordinary(text) != ids
        wrong["tokenizers"] += peer.encode(text, add_special_tokens=False).ids != ids
    print(f"  100,000 strings, differences: {wrong}", flush=True)


def fuzzed(rng: random.Random, docs: list[str]) -> str:
    """Return a string of pieces of real text, characters of all planes, controls, emoji, decoded random bytes."""
    parts = []
    for _ in range(rng.randrange(1, 12)):
        kind = rng.randrange(6)
        if kind == 0:
            doc = rng.choice(docs)
            start = rng.randrange(len(doc))
            parts.append(doc[start : start + rng.randrange(40)])
        elif kind == 1:
            planes = [(0, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
            parts += [chr(rng.randrange(*rng.choice(planes))) for _ in "1234"]
        elif kind == 2:
            parts.append(chr(rng.randrange(0xA1)) * rng.randrange(1, 9))
        elif kind == 3:
            parts.append(rng.choice(SPECIALS))
        elif kind == 4:
            parts.append(rng.randbytes(rng.randrange(12)).decode("utf-8", "replace"))
        else:
            parts.append(rng.choice(" \n\t\r\u3000。，“") * rng.randrange(1, 5))
    return "".join(parts)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
    else:
        main()
