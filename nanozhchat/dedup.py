"""Duplicate documents in one pass and bounded memory: exact ones by hash, near ones by MinHash (Broder 1997) and LSH.

A document is near another when about NEAR of their 5-character shingles are the same (letters and Han only, so marks
and blanks don't count). 96 minima in 16 bands of 6 find pairs, all 96 confirm them. The bands' tables have a fixed
size: a new entry takes the place of an old one, so memory stays, and what is found less is what lies far back.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nanozhchat.errors import DamagedError

Array = npt.NDArray[Any]

SHINGLE, BANDS, ROWS, NEAR = 5, 16, 6, 0.7
NEAR_BYTES = 256 << 20  # of tables: 2 million documents at full recall
MERGE_KEYS = 1 << 18
NOT_WORDS = re.compile(r"[\W_]+")
MIX, SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(29)
BINS = np.arange(BANDS * ROWS, dtype=np.uint64) * np.uint64(2**64 // (BANDS * ROWS))
BAND_MIX = np.random.default_rng(20_261_127).integers(1, 2**64, ROWS, np.uint64) | np.uint64(1)


def ngram_hashes(text: str, n: int) -> Array:
    """(max(0, len(text) - n + 1),) uint64: a hash of every run of n characters, made of those of runs half as long."""
    power = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)  # of 2^k characters
    size, done, hashed = max(0, len(power) - n + 1), 0, None
    for k in range(n.bit_length()):
        if n >> k & 1:
            part = power[done : done + size]
            hashed = part if hashed is None else hashed * MIX + part
            done += 1 << k
        power = power[: max(0, len(power) - (1 << k))] * MIX + power[1 << k :]
        power ^= power >> SHIFT
    assert hashed is not None
    return (hashed ^ (hashed >> SHIFT)) * MIX


def repeats(hashes: Array) -> tuple[int, int]:
    """Return how many of the hashes came before, and how often the most frequent one occurs."""
    ordered = np.sort(hashes)
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] + np.uint64(1), append=ordered[-1:] + np.uint64(1)))
    return len(hashes) - max(0, len(starts) - 1), int(np.diff(starts).max(initial=0))


def signature(text: str) -> Array | None:
    """(96,) uint32: one-permutation MinHash (Li, Owen, Zhang 2012) of a text's shingles; None if it has none.

    The hashes fall into 96 ranges; each keeps its smallest. An empty one borrows from the next (Shrivastava, Li 2014).
    """
    shingles = np.sort(ngram_hashes(NOT_WORDS.sub("", text.lower()), SHINGLE))
    if not len(shingles):
        return None
    first = np.searchsorted(shingles, BINS)
    full = np.flatnonzero(first < np.append(first[1:], len(shingles)))
    lender = full[np.searchsorted(full, np.arange(len(BINS))) % len(full)]
    distance = (lender - np.arange(len(BINS))) % len(BINS)
    return shingles[first[lender]].astype(np.uint32) + (distance * 0x9E3779B1).astype(np.uint32)


class _Records:
    """A growing file of equal records. n: how many to keep of those that stand there; folder None = a temporary one."""

    def __init__(self, folder: Path | None, name: str, dtype: type, width: int, n: int) -> None:
        self.dtype, self.width, self.n = np.dtype(dtype).newbyteorder("<"), width, n
        self.size = self.dtype.itemsize * width
        if folder is None:
            self._file: Any = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this
            return
        path = folder / name
        if n and (not path.exists() or path.stat().st_size < n * self.size):
            raise DamagedError(f"{path} is shorter than the build's state says; delete {folder} and start again")
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        self._file.truncate(n * self.size)
        self._file.seek(0, os.SEEK_END)

    def append(self, record: Array) -> None:
        self._file.write(record.astype(self.dtype).tobytes())
        self.n += 1

    def read(self, start: int, count: int) -> Array:
        """(count, width): records from `start` on."""
        self._file.flush()
        data = os.pread(self._file.fileno(), count * self.size, start * self.size)
        return np.frombuffer(data, self.dtype).reshape(-1, self.width)

    def save(self) -> int:
        """Make what was appended durable; returns the number of records."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.n


class ExactDuplicates:
    """Remembers every text by 8 bytes. folder: where they are kept; n: how many of those there count."""

    def __init__(self, folder: Path | None = None, n: int = 0) -> None:
        self._records = _Records(folder, "exact.keys", np.uint64, 1, n)
        self._old, self._new = np.unique(self._records.read(0, n)), set[int]()
        self.save = self._records.save

    def seen(self, text: str) -> bool:
        """Whether the same text came before; it is remembered."""
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        key = np.frombuffer(digest, "<u8")
        at = int(np.searchsorted(self._old, key[0]))
        if int(key[0]) in self._new or (at < len(self._old) and self._old[at] == key[0]):
            return True
        self._new.add(int(key[0]))
        self._records.append(key)
        if len(self._new) >= MERGE_KEYS:
            self._old = np.union1d(self._old, np.fromiter(self._new, np.uint64, len(self._new)))
            self._new.clear()
        return False


class NearDuplicates:
    """Remembers the signatures of the texts that were no duplicates. table_bytes: of memory; the rest is a file."""

    def __init__(self, folder: Path | None = None, n: int = 0, *, table_bytes: int = NEAR_BYTES) -> None:
        self._records = _Records(folder, "near.signatures", np.uint32, BANDS * ROWS, n)
        slots = 1 << max(10, (table_bytes // (8 * BANDS)).bit_length() - 1)
        self._table, self._bands = np.zeros((BANDS, slots), np.uint64), np.arange(BANDS)
        self.save = self._records.save
        for start in range(0, n, MERGE_KEYS):
            part = self._records.read(start, min(MERGE_KEYS, n - start))
            slot, tag = self._places(part)
            self._table[self._bands, slot] = tag | np.arange(start + 1, start + len(part) + 1, dtype=np.uint64)[:, None]

    def _places(self, signatures: Array) -> tuple[Array, Array]:
        """(N, 96) signatures -> (N, 16) slots in the bands' tables, and tags in the upper 32 bits."""
        keys = (signatures.reshape(-1, BANDS, ROWS).astype(np.uint64) * BAND_MIX).sum(2, dtype=np.uint64)
        keys = (keys ^ (keys >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
        keys ^= keys >> np.uint64(31)
        return keys & np.uint64(self._table.shape[1] - 1), keys >> np.uint64(32) << np.uint64(32)

    def seen(self, text: str) -> bool:
        """Whether a text near this one came before; if not, it is remembered. Texts without a shingle never are."""
        own = signature(text)
        if own is None:
            return False
        slot, tag = self._places(own)
        found = self._table[self._bands, slot[0]]
        same = found[(found ^ tag[0]) < np.uint64(2**32)] & np.uint64(2**32 - 1)
        for number in np.unique(same[same > 0]):
            if (self._records.read(int(number) - 1, 1)[0] == own).mean() >= NEAR:
                return True
        self._records.append(own)
        self._table[self._bands, slot[0]] = tag[0] | np.uint64(self._records.n)
        return False
