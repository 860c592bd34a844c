"""Tokenizers from elsewhere: tokenizer.json files of byte-level BPEs, and tiktoken's ranks.

One whose merges follow from its ranks and whose text is cut by one pattern runs in `rustbpe`; any other keeps its file
and runs in the `tokenizers` library. Its special tokens and its normalizer are left out: ours are added, and text comes
back as it was.
"""

import base64
import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    from rustbpe import BPE
except ImportError as error:
    raise ImportError("the Rust extension `rustbpe` is not built; run `uv sync`") from error

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = {50256: GPT2_PATTERN}  # of the ranks that tiktoken publishes, by their number


def byte_alphabet() -> list[str]:
    """Return the character that stands for each byte in Hugging Face's byte-level vocabularies.

    Printable Latin-1 stands for itself; the rest, in order, for U+0100 upwards (the convention of GPT-2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def vocabulary(content: Mapping[str, Any]) -> list[bytes]:
    """Return the byte strings of a tokenizer.json by id; raises ValueError if ids have gaps or it is not byte-level."""
    to_byte = {char: byte for byte, char in enumerate(byte_alphabet())}
    vocab = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
    if [i for _, i in vocab] != list(range(len(vocab))):
        raise ValueError("the ids in tokenizer.json have gaps")
    return [bytes(to_byte[char] for char in name) for name, _ in vocab]


class HubBPE:
    """Runs a tokenizer.json in the `tokenizers` library, with the face of `rustbpe.BPE`; content: without specials."""

    pattern = "that of tokenizer.json"
    counts: Sequence[int] = ()

    def __init__(self, content: Mapping[str, Any]) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ValueError("this tokenizer needs the `tokenizers` library; run: uv sync --extra export") from error
        self.content = {**content, "added_tokens": []}
        self._ranks = vocabulary(content)
        self._ids = {token: i for i, token in enumerate(self._ranks)}
        self._inner = Tokenizer.from_str(json.dumps(self.content))
        self.vocab_size = len(self._ranks)

    def ranks(self) -> list[bytes]:
        """Return the byte strings of all tokens by id."""
        return self._ranks

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; half a surrogate pair is read as U+FFFD."""
        return self.encode_batch([text])[0]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return the ids of any bytes; those that are no UTF-8 one by one."""
        runs = re.findall("[\udc80-\udcff]+|[^\udc80-\udcff]+", data.decode("utf-8", "surrogateescape"))
        parts = [(run, run.encode("utf-8", "surrogateescape")) for run in runs]
        found = [[self._ids[bytes([b])] for b in raw] if run[0] >= "\udc80" and run[0] <= "\udcff" else self.encode(run)
                 for run, raw in parts]  # fmt: skip
        return [i for ids in found for i in ids]

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
        """Return the ids of each text."""
        whole = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
        return [found.ids for found in self._inner.encode_batch(whole, add_special_tokens=False)]

    def encode_batch_flat(self, texts: Sequence[str], threads: int = 0) -> tuple[bytes, bytes]:
        """Return all ids end to end as uint32, and the offsets between texts as uint64."""
        ids = self.encode_batch(texts)
        offsets = np.cumsum([0, *map(len, ids)])
        return np.array([i for part in ids for i in part], "<u4").tobytes(), offsets.astype("<u8").tobytes()

    def encode_joined(self, data: bytes, offsets: bytes, threads: int = 0) -> tuple[bytes, bytes]:
        """Do the same for texts end to end as UTF-8, with int64 offsets between them."""
        ends = np.frombuffer(offsets, "<i8").tolist()
        return self.encode_batch_flat([data[start:end].decode() for start, end in zip(ends, ends[1:], strict=False)])


def read(path: Path) -> BPE | HubBPE:
    """Read a tokenizer.json or a file of tiktoken's ranks; raises ValueError if it is neither or no byte-level BPE."""
    if path.suffix == ".json":
        try:
            content = _without_specials(json.loads(path.read_text(encoding="utf-8")))
            ranks = vocabulary(content)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no byte-level BPE in the tokenizer.json format ({error!r})") from error
        pattern = _pattern(content["pre_tokenizer"])
        if pattern is not None:
            bpe = BPE.from_ranks(ranks, pattern)
            names = {token: i for i, token in enumerate(content["model"]["vocab"])}
            merges = [(names[left], names[right]) for left, right in content["model"]["merges"]]
            with contextlib.suppress(ValueError):  # of a token that no merge makes
                if bpe.merges() == merges:
                    return bpe
        return HubBPE(content)
    try:
        pairs = [line.split() for line in path.read_text(encoding="ascii").splitlines() if line]
        ranks = [base64.b64decode(token) for token, _ in sorted(pairs, key=lambda pair: int(pair[1]))]
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is neither a tokenizer.json nor a file of tiktoken's ranks ({error})") from error
    if len(ranks) not in PATTERNS:
        known = ", ".join(map(str, PATTERNS))
        raise ValueError(f"{path} has {len(ranks)} ranks; the split pattern, which is not in such files, is known for "
                         f"{known} ranks only; give the tokenizer.json of the same model")  # fmt: skip
    return BPE.from_ranks(ranks, PATTERNS[len(ranks)])


def _without_specials(content: Mapping[str, Any]) -> dict[str, Any]:
    """Take special tokens, normalizer and post-processor out of a tokenizer.json; ids close up, merges are pairs."""
    model = content["model"]
    if model["type"] != "BPE" or "ByteLevel" not in json.dumps(content["pre_tokenizer"]):
        raise ValueError(f"a {model['type']} model that is not byte-level")
    special = {token["content"] for token in content.get("added_tokens") or []}
    vocab = [name for name, _ in sorted(model["vocab"].items(), key=lambda item: item[1]) if name not in special]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    kept = {"truncation": None, "padding": None, "normalizer": None, "post_processor": None, "added_tokens": []}
    model = {**model, "vocab": {name: i for i, name in enumerate(vocab)}, "merges": merges, "unk_token": None}
    return {**content, **kept, "model": model}


def _pattern(pre: Mapping[str, Any]) -> str | None:
    """Return the one pattern that a pre-tokenizer cuts text by, None if it does more than that."""
    parts = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    *cuts, last = parts
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not cuts:
        return GPT2_PATTERN if last.get("use_regex", True) else None
    first = cuts[0]
    plain = first["type"] == "Split" and first["behavior"] == "Isolated" and not first.get("invert")
    if len(cuts) > 1 or not plain or last.get("use_regex", True) or "Regex" not in first["pattern"]:
        return None
    return first["pattern"]["Regex"]
