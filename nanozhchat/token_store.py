"""Tokenized shards: token ids of a corpus, memory-mapped, with an index of where each document lies.

`tokens/<corpus>-<tokenizer hash>/{train,val}-00000.bin` hold ids (little endian, uint16 if the vocabulary allows,
else uint32), documents back to back without special tokens: loaders add those. `.idx` beside each is a NumPy array
of n + 1 uint64 offsets. The manifest is written last.
"""

import io
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from nanozhchat import files, paths
from nanozhchat.corpus import Corpus
from nanozhchat.errors import DamagedError
from nanozhchat.sources import SPLITS
from nanozhchat.tokenizer import Tokenizer

FORMAT_VERSION = 1
SHARD_TOKENS = 1 << 27
REPORT_S = 5.0  # between two lines of progress
MANIFEST = "manifest.json"
STATE = "building.json"  # the finished shards of a run that goes on

Array = npt.NDArray[Any]


class TokenStore:
    """Read access to a tokenized corpus. Documents are numbered from 0 in the order of the corpus."""

    def __init__(self, directory: Path) -> None:
        """Open a finished store; raises ValueError if there is none, DamagedError if files don't fit the manifest."""
        path = directory / MANIFEST
        if not path.exists():
            raise ValueError(f"no tokenized corpus in {directory}; tokenize it first")
        manifest = files.read_json(path)
        if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
            raise DamagedError(f"{path} is no manifest of version {FORMAT_VERSION}; {_remedy(directory)}")
        self.directory, self.manifest = directory, manifest
        self._shards: dict[str, list[tuple[Array, Array]]] = {split: [] for split in SPLITS}  # (tokens, offsets)
        for shard in manifest["shards"]:
            self._shards[shard["split"]].append(_map_shard(directory, shard, np.dtype(manifest["dtype"])))
        self._first_doc = {s: np.cumsum([0, *(len(ends) - 1 for _, ends in self._shards[s])]) for s in SPLITS}

    @property
    def hash(self) -> str:
        """SHA-256 identity of the corpus this was made from."""
        return self.manifest["corpus_hash"]

    def n_docs(self, split: str) -> int:
        """Documents in a split."""
        return self.manifest["totals"][split]["docs"]

    def n_tokens(self, split: str) -> int:
        """Tokens in a split."""
        return self.manifest["totals"][split]["tokens"]

    def n_bytes(self, split: str) -> int:
        """UTF-8 bytes of text that the tokens of a split stand for."""
        return self.manifest["totals"][split]["bytes"]

    def lengths(self, split: str) -> Array:
        """(n_docs,) int64: tokens of each document."""
        parts = (np.diff(offsets).astype(np.int64) for _, offsets in self._shards[split])
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def doc(self, split: str, index: int) -> Array:
        """Token ids of document `index`: a read-only view into the mapped file."""
        if not 0 <= index < self.n_docs(split):
            raise IndexError(f"document {index} of {self.n_docs(split)} in {split}")
        shard = int(np.searchsorted(self._first_doc[split], index, side="right")) - 1
        tokens, offsets = self._shards[split][shard]
        i = index - int(self._first_doc[split][shard])
        return tokens[int(offsets[i]) : int(offsets[i + 1])]


def _remedy(directory: Path) -> str:
    return f"delete {directory} and run the command again"


def _map_shard(directory: Path, shard: dict[str, Any], dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Map one shard and its index after checking that both have the length the manifest says."""
    path, index_path = directory / shard["name"], directory / shard["index"]
    try:
        size, wanted = path.stat().st_size, shard["tokens"] * dtype.itemsize
        if size != wanted:
            raise DamagedError(f"{path} has {size:,} bytes instead of {wanted:,}; {_remedy(directory)}")
        # plain arrays over the mapping: slicing np.memmap itself is several times slower
        tokens = np.asarray(np.memmap(path, dtype, mode="r")) if size else np.zeros(0, dtype)
        offsets = np.asarray(np.load(index_path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise DamagedError(f"{index_path if path.exists() else path}: {error}; {_remedy(directory)}") from error
    if offsets.shape != (shard["docs"] + 1,) or offsets.dtype != np.uint64 or int(offsets[-1]) != shard["tokens"]:
        raise DamagedError(f"{index_path} does not fit {shard['name']}; {_remedy(directory)}")
    return tokens, offsets


def tokenize(corpus: Corpus, tokenizer: Tokenizer, *, progress: Callable[[str], None] = print) -> TokenStore:
    """Tokenize both splits of a corpus, or reuse what stands there for the same corpus and tokenizer."""
    directory = paths.tokens_dir(corpus.name, tokenizer.hash)
    key = {"format_version": FORMAT_VERSION, "corpus_hash": corpus.hash, "tokenizer_hash": tokenizer.hash}
    store = _reusable(directory, key)
    if store is not None:  # without the lock: many processes may read at once
        progress(f"tokens {corpus.name}: reused, {store.n_tokens('train'):,} to train on")
        return store
    with files.lock(directory):
        (directory / MANIFEST).unlink(missing_ok=True)
        files.remove_temporaries(directory)
        dtype = np.dtype("<u2" if tokenizer.vocab_size < 2**16 else "<u4")
        shards = _unfinished(directory, key, dtype)
        for split in SPLITS:
            done = [shard["docs"] for shard in shards if shard["split"] == split]
            batches = _encoded(corpus, split, tokenizer, progress, sum(done))
            for number, first in enumerate(batches, len(done)):  # each turn takes a shard's worth of batches
                path = directory / f"{split}-{number:05d}.bin"
                shards.append({"split": split, **_write_shard(path, itertools.chain([first], batches), dtype)})
                files.write_json(directory / STATE, {"key": key, "shards": shards})
        totals = {split: {field: sum(s[field] for s in shards if s["split"] == split) for field in ("docs", "tokens")}
                  | {"bytes": corpus.n_bytes(split)} for split in SPLITS}  # fmt: skip
        manifest = {**key, "vocab_size": tokenizer.vocab_size, "dtype": dtype.str, "totals": totals, "shards": shards}
        files.write_json(directory / MANIFEST, manifest)
        (directory / STATE).unlink(missing_ok=True)
        return TokenStore(directory)


def _unfinished(directory: Path, key: dict[str, Any], dtype: np.dtype[Any]) -> list[dict[str, Any]]:
    """Return the shards of a run with this key that was cut off, and remove all other files."""
    state = files.read_json(directory / STATE) if (directory / STATE).exists() else {}
    shards: list[dict[str, Any]] = state["shards"] if state.get("key") == key else []
    try:
        for shard in shards:
            _map_shard(directory, shard, dtype)
    except DamagedError:
        shards = []
    kept = {shard[name] for shard in shards for name in ("name", "index")}
    for path in (path for pattern in ("*.bin", "*.idx") for path in directory.glob(pattern)):
        if path.name not in kept:
            path.unlink()
    return shards


def _reusable(directory: Path, key: dict[str, Any]) -> TokenStore | None:
    try:
        store = TokenStore(directory)
    except (ValueError, DamagedError):
        return None
    return store if all(store.manifest.get(name) == value for name, value in key.items()) else None


def _write_shard(path: Path, batches: Iterator[tuple[Array, Array]], dtype: np.dtype[Any]) -> dict[str, Any]:
    """Write batches until the shard is full, then its index."""
    ends: list[Array] = [np.zeros(1, np.uint64)]
    total = 0

    def fill(handle: BinaryIO) -> None:
        nonlocal total
        for ids, offsets in batches:
            handle.write(ids.astype(dtype).tobytes())
            ends.append(offsets[1:].astype(np.uint64) + np.uint64(total))
            total += len(ids)
            if total >= SHARD_TOKENS:
                return

    files.atomic_write(path, fill)
    index = path.with_suffix(".idx")
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate(ends).astype("<u8"), allow_pickle=False)
    files.atomic_write(index, buffer.getvalue())
    return {"name": path.name, "index": index.name, "docs": sum(map(len, ends)) - 1, "tokens": total,
            "sha256": files.sha256(path), "index_sha256": files.sha256(index)}  # fmt: skip


def _encoded(
    corpus: Corpus, split: str, tokenizer: Tokenizer, progress: Callable[[str], None], skip: int
) -> Iterator[tuple[Array, Array]]:
    """Yield (ids of a batch of documents end to end, offsets between the documents); reports now and then."""
    what, n_bytes, docs, tokens = f"tokens {corpus.name} {split}", corpus.n_bytes(split), 0, 0
    start = last = time.monotonic()
    for data, between in corpus.joined(split, skip):
        ids, offsets = tokenizer.encode_joined(data, between)
        if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
            raise ValueError(f"the tokenizer made id {int(ids.max())}, but its vocab_size is {tokenizer.vocab_size}")
        docs, tokens = docs + len(offsets) - 1, tokens + len(ids)
        if time.monotonic() - last >= REPORT_S:
            last = time.monotonic()
            progress(f"  {what}: {docs:,} documents, {tokens:,} tokens so far")
        yield ids, offsets
    rate = n_bytes / max(time.monotonic() - start, 1e-9) / 1e6
    per_token = n_bytes / max(1, tokens)
    progress(f"{what}: {docs:,} documents, {tokens:,} tokens, {per_token:.2f} bytes per token, {rate:.1f} MB/s")
