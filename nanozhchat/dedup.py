"""Duplicate documents in one pass and bounded memory: exact ones by hash, near ones by MinHash (Broder 1997) and LSH.

A document is near another when about NEAR of their 5-character shingles are the same (letters and Han only, so marks
and blanks don't count). 96 minima in 16 bands of 6 find pairs, all 96 confirm them. The bands' tables have a fixed
size: a new entry takes the place of an old one, so memory stays, and what is found less is what lies far back.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nanozhchat.errors import DamagedError

Array = npt.NDArray[Any]

SHINGLE, BANDS, ROWS, NEAR = 5, 16, 6, 0.7
NEAR_BYTES = 256 << 20  # of tables: 2 million documents at full recall
MERGE_KEYS = 1 << 18
LETTERS = r"[^\W_]"  # and digits
NOT_WORDS = re.compile(r"[\W_]+")
MIX, SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(29)
NUMBERS = np.arange(BANDS * ROWS)
BINS = (NUMBERS * (2**32 // (BANDS * ROWS))).astype(np.uint32)
UPPER, LOWER = np.uint64(2**64 - 2**32), np.uint64(2**32 - 1)  # of a table's entry
BAND_MIX = np.random.default_rng(20_261_127).integers(1, 2**64, ROWS, np.uint64) | np.uint64(1)


@lru_cache(maxsize=2)  # several steps look at the same text one after the other
def units(text: str) -> Array:
    """Return a text in UTF-16, uint16: what the tables of characters are made for."""
    return np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2")


def marked(pattern: str) -> Array:
    """(65536,) bool: which units match; a character beyond them counts by its first, as most of that one's do."""
    found = np.zeros(0x40000, bool)  # no letters or blanks have higher numbers
    for run in re.finditer(f"(?:{pattern})+", "".join(map(chr, range(len(found))))):
        found[run.start() : run.end()] = True
    found[0xD800:0xD8C0] = found[0x10000:].reshape(-1, 1024).mean(1) > 0.5
    return found[:0x10000]


@cache
def _folded() -> Array:
    """(65536,) uint16: letters, digits and Han in lower case; 0 for what is none."""
    table = np.zeros(0x10000, np.uint16)
    for unit in np.flatnonzero(marked(LETTERS)).tolist():
        table[unit] = ord(chr(unit).lower()[0])
    return table


def ngram_hashes(characters: Array, n: int) -> Array:
    """(max(0, len - n + 1),) uint64: a hash of every run of n >= 4 units, made of those of 4."""
    size = max(0, len(characters) - n + 1)
    fours = np.ndarray(size + n - 4 if size else 0, "<u8", characters, strides=2)
    hashed = fours[:size] * MIX
    for at in sorted({*range(4, n - 4, 4), n - 4} - {0}):
        hashed ^= hashed >> SHIFT
        hashed += fours[at : at + size]
        hashed *= MIX
    hashed ^= hashed >> SHIFT
    hashed *= MIX
    return hashed


def _halves(hashes: Array) -> Array:
    """Return one half of each hash: these sort three times as fast, and one pair in 10^9 is equal by chance."""
    return hashes.view("<u4")[1::2]


def repeats(hashes: Array, times: int) -> tuple[int, bool]:
    """Return how many of the hashes came before, and whether any occurs more than `times` times."""
    ordered = np.sort(_halves(hashes))
    again = int(np.count_nonzero(ordered[1:] == ordered[:-1]))
    return again, again >= times and bool((ordered[times:] == ordered[: max(0, len(ordered) - times)]).any())


def signature(text: str) -> Array | None:
    """(96,) uint32: one-permutation MinHash (Li, Owen, Zhang 2012) of a text's shingles; None if it has none.

    The hashes fall into 96 ranges; each keeps its smallest. An empty one borrows from the next (Shrivastava, Li 2014).
    """
    folded = _folded().take(units(text))
    shingles = np.sort(_halves(ngram_hashes(folded[folded > 0], SHINGLE)))
    if not len(shingles):
        return None
    first = shingles.searchsorted(BINS)
    if first[-1] < len(shingles) and (first[1:] > first[:-1]).all():
        return shingles[first]
    full = np.flatnonzero(first < np.append(first[1:], len(shingles)))
    lender = full[full.searchsorted(NUMBERS) % len(full)]
    distance = (lender - NUMBERS) % len(BINS)
    return shingles[first[lender]] + (distance * 0x9E3779B1).astype(np.uint32)


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

    def append(self, record: bytes) -> None:
        self._file.write(record)
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


class ExactDuplicates(_Records):
    """Remembers every text by 8 bytes. folder: where they are kept; n: how many of those there count."""

    def __init__(self, folder: Path | None = None, n: int = 0) -> None:
        super().__init__(folder, "exact.keys", np.uint64, 1, n)
        self._old, self._new = np.unique(self.read(0, n)), set[int]()

    @staticmethod
    def keys(texts: Sequence[str]) -> list[bytes]:
        """Return what is remembered of texts."""
        return [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts]

    def seen(self, key: bytes) -> bool:
        """Whether the same text came before; it is remembered."""
        number = int.from_bytes(key, "little")
        at = int(self._old.searchsorted(np.uint64(number)))
        if number in self._new or (at < len(self._old) and self._old[at] == number):
            return True
        self._new.add(number)
        self.append(key)
        if len(self._new) >= MERGE_KEYS:
            self._old = np.union1d(self._old, np.fromiter(self._new, np.uint64, len(self._new)))
            self._new.clear()
        return False


def _bands(signatures: Array) -> Array:
    """(N, 96) signatures -> (N, 16) uint64: a hash of each band."""
    keys = signatures.reshape(-1, BANDS, ROWS).astype(np.uint64) @ BAND_MIX
    keys = (keys ^ (keys >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


class NearDuplicates(_Records):
    """Remembers the signatures of the texts that were no duplicates. table_bytes: of memory; the rest is a file."""

    def __init__(self, folder: Path | None = None, n: int = 0, *, table_bytes: int = NEAR_BYTES) -> None:
        super().__init__(folder, "near.signatures", np.uint32, BANDS * ROWS, n)
        slots = 1 << max(10, (table_bytes // (8 * BANDS)).bit_length() - 1)
        self._table, self._mask = np.zeros(BANDS * slots, np.uint64), np.uint64(slots - 1)  # one table after the other
        self._starts = np.arange(BANDS) * slots
        for start in range(0, n, MERGE_KEYS):
            part = self.read(start, min(MERGE_KEYS, n - start))
            place, tag = self._places(_bands(part))
            self._table[place] = tag | np.arange(start + 1, start + len(part) + 1, dtype=np.uint64)[:, None]

    @staticmethod
    def keys(texts: Sequence[str]) -> list[bytes]:
        """Return what is remembered of texts, and their bands; b"" of one without a shingle."""
        found = [signature(text) for text in texts]
        bands = _bands(np.array([np.zeros(BANDS * ROWS, "<u4") if own is None else own for own in found]))
        return [b"" if own is None else own.tobytes() + band.tobytes() for own, band in zip(found, bands, strict=True)]

    def _places(self, bands: Array) -> tuple[Array, Array]:
        """Split hashes of bands into places in the tables, and tags in the upper 32 bits."""
        return (bands & self._mask).astype(np.int64) + self._starts, bands & UPPER

    def seen(self, key: bytes) -> bool:
        """Whether a text near this one came before; if not, it is remembered. Texts without a shingle never are."""
        if not key:
            return False
        own = key[: self.size]
        place, tag = self._places(np.frombuffer(key, np.uint64, offset=self.size))
        found = self._table.take(place)
        same = (found ^ tag) <= LOWER
        for number in np.unique(found[same] & LOWER) if same.any() else ():
            if number and (self.read(int(number) - 1, 1)[0] == np.frombuffer(own, "<u4")).mean() >= NEAR:
                return True
        self.append(own)
        self._table[place] = tag | np.uint64(self.n)
        return False
