"""Packing of documents into rows of fixed length: over lengths only, in a seeded order, with an exact state.

The state is a position in a permutation that is computed, not stored, and the pieces waiting in a buffer; it costs
a few thousand numbers for any size of data.
"""

import hashlib
from bisect import bisect_right, insort
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

SHUFFLE_ROUNDS = 4
SHUFFLE_BLOCK = 4096  # positions whose documents are computed at once

Array = npt.NDArray[Any]
Piece = tuple[int, int, int]  # (length, document, start): sorted by length


def shuffled(n: int, seed: int, epoch: int, positions: Array) -> Array:
    """Images of `positions` under a pseudo-random permutation of range(n), computed without storing it.

    A Feistel network over the next power of four, walked until the image is below n: the same on every machine.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(SHUFFLE_ROUNDS, np.uint64)
    x = positions.astype(np.uint64)
    todo = np.ones(len(x), bool)
    while todo.any():
        left, right = x[todo] >> np.uint64(half), x[todo] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)  # odd multiplier and shifts of a common mixer
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        x[todo] = (left << np.uint64(half)) | right
        todo &= x >= n
    return x.astype(np.int64)


class Packer:
    """Best-fit packing of documents into rows of `capacity` tokens, over lengths only.

    Documents come in a permuted order of each epoch into a buffer; the longest one that fits goes into the row. With
    `cut`, each piece costs one more token (the BOS before it), rows are always full, and when nothing fits some other
    is cut at the row's end, its rest going back to the buffer. Such rows begin with any document, so that neighbours
    are not slices of the same long one, from which a short run would learn little else. Without `cut`, documents stay
    whole, and the row ends short, with the epoch at the latest; they stand in it in random order: what stands there
    twice, or always after the same neighbour, is copied or foretold from there instead of learnt. The buffer is emptied
    before the next epoch enters it: within an epoch each token comes once.
    """

    def __init__(self, lengths: Array, capacity: int, *, cut: bool, seed: int, buffer_docs: int, endless: bool = True,
                 shuffle: bool = True) -> None:  # fmt: skip
        """Start at the first row. lengths: (n_docs,) tokens of each document; ValueError if one can never fit."""
        if not cut and len(lengths) and (longest := int(lengths.max())) > capacity:
            raise ValueError(f"one document has {longest:,} tokens, a row only {capacity:,}: shorten it before")
        self.lengths, self.capacity, self.cut = lengths, capacity, cut
        self.seed, self.buffer_docs, self.endless, self.shuffle = seed, buffer_docs, endless, shuffle
        self.epoch = self.position = self.rows = 0
        self.buffer: list[Piece] = []
        self._ahead: tuple[tuple[int, int], list[int]] = ((-1, -1), [])  # (epoch, block) and its documents in order

    def _document_at(self, position: int) -> int:
        """Return the document at a position of the epoch's order; a block of positions is computed at once."""
        if not self.shuffle:
            return position
        block, offset = divmod(position, SHUFFLE_BLOCK)
        if self._ahead[0] != (self.epoch, block):
            n = len(self.lengths)
            wanted = np.arange(block * SHUFFLE_BLOCK, min(n, (block + 1) * SHUFFLE_BLOCK))
            self._ahead = ((self.epoch, block), shuffled(n, self.seed, self.epoch, wanted).tolist())
        return self._ahead[1][offset]

    def refill(self) -> None:
        """Fill the buffer, starting the next epoch if this one is used up; `next_row` does so by itself."""
        n = len(self.lengths)
        if self.position == n and not self.buffer and self.endless:
            self.epoch += 1
            self.position = 0
        while len(self.buffer) < self.buffer_docs and self.position < n:
            doc = self._document_at(self.position)
            self.position += 1
            if length := int(self.lengths[doc]):
                insort(self.buffer, (length, doc, 0))

    @property
    def finished(self) -> bool:
        """Whether a single pass is over; never with `endless`."""
        return not self.endless and not self.buffer and self.position == len(self.lengths)

    def next_row(self) -> list[Piece]:
        """Return the pieces of the next global row, [] when a single pass is over."""
        overhead = int(self.cut)
        space = self.capacity
        row: list[Piece] = []
        self.rows += 1
        self.refill()
        while space > 0:
            if not self.buffer:
                if row and not self.cut and self.position == len(self.lengths):
                    break
                self.refill()
                if not self.buffer:
                    break
            fits = bisect_right(self.buffer, (space - overhead, len(self.lengths), 0))
            if self.cut and (not row or not fits):
                length, doc, start = self.buffer.pop(self._any())
                take = min(length, space - overhead)  # 0 if only the BOS fits
                if take < length:
                    insort(self.buffer, (length - take, doc, start + take))
                piece = (take, doc, start)
            elif fits:
                piece = self.buffer.pop(fits - 1)
            else:
                break
            row.append(piece)
            space -= piece[0] + overhead
        if self.cut or not self.shuffle:
            return row
        return [row[i] for i in np.random.default_rng([self.seed, self.rows]).permutation(len(row))]

    def _any(self) -> int:
        """A place in the buffer that depends on the seed and the row alone."""
        mixed = (self.rows * 0x9E3779B97F4A7C15 + self.seed * 0xBF58476D1CE4E5B9) % 2**64
        return (mixed >> 32) % len(self.buffer)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs, and what it must be used with, as plain types."""
        return {"epoch": self.epoch, "position": self.position, "rows": self.rows,
                "buffer": [[doc, start] for _, doc, start in self.buffer], **self._identity()}  # fmt: skip

    def _identity(self) -> dict[str, Any]:
        return dict(seed=self.seed, capacity=self.capacity, buffer_docs=self.buffer_docs, docs=len(self.lengths))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; raises ValueError if data, seed or row length are not the same."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(f"cannot resume the data order: {name} was {state.get(name)} and is {value}; "
                                 "use the same data and settings, or start a new run")  # fmt: skip
        self.epoch, self.position, self.rows = state["epoch"], state["position"], state["rows"]
        self.buffer = sorted((int(self.lengths[doc]) - start, doc, start) for doc, start in state["buffer"])


def digest(rows: Iterable[Any]) -> str:
    """Short hash of rows of token ids."""
    hasher = hashlib.blake2b(digest_size=8)
    for ids in rows:
        hasher.update(np.asarray(ids, dtype=np.uint32).tobytes())
    return hasher.hexdigest()
