"""Proofs: strings of every kind, and kill -9 with the same command again. Needs `regex`, `tiktoken`, `tokenizers`.

python -m dev.prove_tokenizer 'zh_web/*.jsonl.gz' STRINGS=100000 KILLS=20 MEGABYTES=120
"""

import glob
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from shutil import rmtree

import regex
import tokenizers

from dev.bench_tokenizer import read, splice
from nanozhchat.tokenizer import Tokenizer
from rustbpe import BPE_PATTERN

SPECIALS = ("👨\u200d👩\u200d👧", "❤️", "🇨🇳", "e\u0301", "\u200d", "\ufeff", "\r\n", "<|end|>", "'ll", "'S")
PLANES = ((0, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000))


def piece(source: str, rng: random.Random) -> str:
    start, n = rng.randrange(len(source)), rng.randrange(1, 9)
    return rng.choice((source[start : start + 5 * n], rng.choice(SPECIALS), rng.choice(" \n\t\r　。，“") * n,
        chr(rng.randrange(0xA1)) * n, rng.randbytes(n).decode("utf-8", "replace"),
        "".join(chr(rng.randrange(*rng.choice(PLANES))) for _ in "1234")))  # fmt: skip


def compare(tokenizer: Tokenizer, source: str, strings: int, folder: str, rng: random.Random) -> list[int]:
    tokenizer.save(Path(folder))
    encoding, peer = tokenizer.to_tiktoken(), tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    peer.encode_special_tokens, wrong = True, [0] * 4  # text that looks like a special token is text
    for _ in range(strings):
        text = "".join(piece(source, rng) for _ in range(rng.randrange(1, 12)))
        ids, chunks = tokenizer.encode(text), [match[0] for match in regex.finditer(BPE_PATTERN, text)]
        peer_ids = peer.encode(text, add_special_tokens=False).ids
        got = (tokenizer.decode(ids), tokenizer._bpe.split(text), encoding.encode_ordinary(text), peer_ids)
        wrong = [n + (a != b) for n, a, b in zip(wrong, got, (text, chunks, ids, ids), strict=True)]
    return wrong


def kill(folder: str, kills: int) -> bool:
    def start(name: str, *flags: str) -> subprocess.Popen[bytes]:
        call = [sys.executable, "-m", "scripts.tok_train", f"--data={folder}/*.jsonl", "--name=t", "--vocab-size=32768"]
        env = {**os.environ, "NANOZHCHAT_BASE_DIR": f"{folder}/{name}"}
        return subprocess.Popen([*call, "--max-bytes=1000000000000", *flags], stdout=subprocess.DEVNULL, env=env)

    little, began = ("--memory-limit=32m", "--chunk-files=1", "--threads=2"), time.monotonic()
    assert start("alone").wait() == 0  # all in memory
    whole = time.monotonic() - began
    while kills >= 0:
        process = start("killed", *little)
        try:
            assert process.wait(random.uniform(0.2, whole) if kills else None) == 0
            kills -= kills == 0
            if kills > 0:
                rmtree(f"{folder}/killed/tokenizer")  # it got to the end: once more from the start
        except subprocess.TimeoutExpired:
            process.kill()
            kills -= process.wait() < 0
    alone, killed = (Path(folder, name, "tokenizer/t/tokenizer.json") for name in ("alone", "killed"))
    return alone.read_bytes() == killed.read_bytes()


if __name__ == "__main__":
    numbers, rng = [int(arg.split("=")[-1]) for arg in sys.argv[2:]], random.Random(1)
    documents = read(sorted(glob.glob(sys.argv[1])))
    with tempfile.TemporaryDirectory() as folder:
        wrong = compare(Tokenizer.train(documents, 8192), "".join(documents), numbers[0], folder, rng)
        print("strings that differ in round trip, regex, tiktoken, tokenizers:", wrong, flush=True)
        splice("".join(documents), rng, folder, numbers[2], 7)
        print("after all kills the tokenizer of a run in memory:", kill(folder, numbers[1]))
