"""Packed (B, T) batches from documents or conversations, the same global row order for any number of ranks.

Every rank runs the same packing over lengths only, and reads the tokens of its own rows: micro-batch m of W ranks
with B rows each holds global rows [m*W*B, (m+1)*W*B), rank r the r-th B of them. The state is a position in a seeded
permutation and the pieces waiting in the buffer, never tokens; it travels with each batch and restores exactly.
"""

from __future__ import annotations

import logging
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

log = logging.getLogger(__name__)

IGNORE = -1  # target of a position that is not scored
BUFFER_DOCS = 256
SHUFFLE_ROUNDS = 4
EVAL_BUFFER_DOCS = 64
EVAL_SEED = 0

Array = npt.NDArray[Any]
Piece = tuple[int, int, int]  # (length, document, start): sorted by length


@dataclass(frozen=True)
class Batch:
    """Rows to train on. inputs, targets: (B, T) int64, target -1 = not scored; epoch: passes finished before this one.

    state: the loader's state after this batch, plain JSON types.
    """

    inputs: Tensor
    targets: Tensor
    epoch: int
    state: dict[str, Any]


class Store(Protocol):
    """What is needed of a token store (see token_store.py)."""

    def n_docs(self, split: str) -> int:
        """Count documents."""
        ...

    def lengths(self, split: str) -> Array:
        """Tokens of each document."""
        ...

    def doc(self, split: str, index: int) -> Array:
        """Token ids of one document."""
        ...


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
    `cut`, each piece costs one more token (the BOS before it), rows are always full, and when nothing fits the longest
    is cut at the row's end, its rest going back to the buffer. Without `cut`, documents stay whole and the row ends
    short. The buffer is emptied before the next epoch enters it: within an epoch each token comes once.
    """

    def __init__(self, lengths: Array, capacity: int, *, cut: bool, seed: int, buffer_docs: int, endless: bool = True,
                 shuffle: bool = True) -> None:  # fmt: skip
        """Start at the first row. lengths: (n_docs,) tokens of each document."""
        self.lengths = lengths
        self.capacity, self.cut, self.endless, self.shuffle = capacity, cut, endless, shuffle
        self.seed, self.buffer_docs = seed, buffer_docs
        self.epoch = self.position = self.rows = 0
        self.buffer: list[Piece] = []
        self._ahead: tuple[tuple[int, int], list[int]] = ((-1, -1), [])  # (epoch, block) and its documents in order

    def _document_at(self, position: int) -> int:
        """Return the document at a position of the epoch's order; a block of positions is computed at once."""
        if not self.shuffle:
            return position
        block, offset = divmod(position, 4096)
        if self._ahead[0] != (self.epoch, block):
            n = len(self.lengths)
            wanted = np.arange(block * 4096, min(n, block * 4096 + 4096))
            self._ahead = ((self.epoch, block), shuffled(n, self.seed, self.epoch, wanted).tolist())
        return self._ahead[1][offset]

    def _refill(self) -> None:
        n = len(self.lengths)
        if self.position == n and not self.buffer and self.endless:
            self.epoch += 1
            self.position = 0
        while len(self.buffer) < self.buffer_docs and self.position < n:
            doc = self._document_at(self.position)
            self.position += 1
            if length := int(self.lengths[doc]):
                insort(self.buffer, (length, doc, 0))

    def next_row(self) -> list[Piece]:
        """Return the pieces of the next global row, [] when a single pass is over."""
        overhead = int(self.cut)
        space = self.capacity
        row: list[Piece] = []
        self.rows += 1
        self._refill()
        while space > 0:
            if not self.buffer:
                self._refill()
                if not self.buffer:
                    break
            fits = bisect_right(self.buffer, (space - overhead, len(self.lengths), 0))
            if fits:
                piece = self.buffer.pop(fits - 1)
            elif not self.cut:
                break
            else:
                length, doc, start = self.buffer.pop()
                take = space - overhead  # 0 if only the BOS fits
                insort(self.buffer, (length - take, doc, start + take))
                piece = (take, doc, start)
            row.append(piece)
            space -= piece[0] + overhead
        return row

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs, and what it must be used with, as plain types."""
        return {
            "epoch": self.epoch, "position": self.position, "rows": self.rows,
            "buffer": [[doc, start] for _, doc, start in self.buffer], **self._identity(),
        }  # fmt: skip

    def _identity(self) -> dict[str, Any]:
        sizes = {"capacity": self.capacity, "buffer_docs": self.buffer_docs, "docs": len(self.lengths)}
        return {"seed": self.seed, **sizes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; raises ValueError if data, seed or row length are not the same."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"cannot resume the data order: {name} was {state.get(name)} and is {value}; "
                    "use the same data and settings, or start a new run"
                )
        self.epoch, self.position, self.rows = state["epoch"], state["position"], state["rows"]
        self.buffer = sorted((int(self.lengths[doc]) - start, doc, start) for doc, start in state["buffer"])


class _Loader:
    """What both loaders share: which rows are this rank's, iteration, state."""

    def __init__(self, packer: Packer, batch_rows: int, sequence_len: int, rank: int, world_size: int,
                 device: torch.device | str | None) -> None:  # fmt: skip
        if batch_rows < 1 or sequence_len < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_rows={batch_rows}, sequence_len={sequence_len}, rank={rank}, world_size={world_size}: "
                "sizes must be at least 1 and rank below world_size"
            )
        self.packer = packer
        self.batch_rows, self.sequence_len = batch_rows, sequence_len
        self.rank, self.world_size = rank, world_size
        self.device = torch.device(device or "cpu")

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        epoch = self.packer.epoch
        rows = self._own_rows()
        inputs, targets = self._fill(rows)
        return _batch(inputs, targets, epoch, self.packer.state_dict(), self.device)

    def _own_rows(self) -> list[list[Piece]]:
        rows = [self.packer.next_row() for _ in range(self.world_size * self.batch_rows)]
        return rows[self.rank * self.batch_rows : (self.rank + 1) * self.batch_rows]

    def _fill(self, rows: list[list[Piece]]) -> tuple[Array, Array]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch, plain JSON types."""
        return self.packer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch that carried `state`; ValueError if it belongs to other data or settings."""
        self.packer.load_state_dict(state)


def _batch(inputs: Array, targets: Array, epoch: int, state: dict[str, Any], device: torch.device) -> Batch:
    x, y = torch.from_numpy(inputs), torch.from_numpy(targets)
    if device.type == "cuda":
        x, y = x.pin_memory(), y.pin_memory()
    if device.type != "cpu":
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
    return Batch(x, y, epoch, state)


def _document_rows(rows: list[list[Piece]], read: Callable[[int], Array], capacity: int, bos_id: int) -> Array:
    """Gather tokens: (len(rows), capacity) int64, IGNORE after the end of a row that is not full."""
    out = np.full((len(rows), capacity), IGNORE, np.int64)
    for tokens, pieces in zip(out, rows, strict=True):
        at = 0
        for length, doc, start in pieces:
            tokens[at] = bos_id
            tokens[at + 1 : at + 1 + length] = read(doc)[start : start + length]
            at += 1 + length
    return out


class DocumentLoader(_Loader):
    """Endless batches of packed documents; every row starts with BOS and is full, every document start gets a BOS.

    No token of the split is lost or repeated within an epoch. A document cut at a row's end goes on in a later row
    after a fresh BOS.
    """

    def __init__(
        self,
        store: Store,
        split: str,
        *,
        batch_rows: int,
        sequence_len: int,
        bos_id: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        device: torch.device | str | None = None,
        buffer_docs: int = BUFFER_DOCS,
    ) -> None:
        """Start at the first batch; raises ValueError if the split is empty."""
        lengths = store.lengths(split)
        if not lengths.sum():
            raise ValueError(f"the {split} split holds no tokens; give more data")
        packer = Packer(lengths, sequence_len + 1, cut=True, seed=seed, buffer_docs=buffer_docs)
        super().__init__(packer, batch_rows, sequence_len, rank, world_size, device)
        self.store, self.split, self.bos_id = store, split, bos_id

    def _fill(self, rows: list[list[Piece]]) -> tuple[Array, Array]:
        tokens = _document_rows(rows, lambda doc: self.store.doc(self.split, doc), self.sequence_len + 1, self.bos_id)
        return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def eval_batches(
    source: Store | Sequence[Sequence[int]],
    split: str = "val",
    *,
    batch_rows: int,
    sequence_len: int,
    bos_id: int,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str | None = None,
) -> Iterator[Batch]:
    """Score each token of the chosen documents exactly once; all ranks get the same number of batches.

    source: a token store, or documents as lists of ids. max_tokens: documents are chosen in a fixed pseudo-random
    order until there are so many tokens, the last one cut; None = all. A BOS is never a target. Rows that are not
    full end in BOS inputs without targets.
    """
    is_store = hasattr(source, "lengths")
    lengths = source.lengths(split) if is_store else np.fromiter(map(len, source), np.int64, len(source))  # type: ignore
    order = shuffled(len(lengths), EVAL_SEED, 0, np.arange(len(lengths)))
    if max_tokens is not None:
        ends = np.cumsum(lengths[order])
        order = order[: int(np.searchsorted(ends, max_tokens)) + 1]
        lengths = lengths[order].copy()
        lengths[-1] -= max(0, int(lengths.sum()) - max_tokens)
    else:
        lengths = lengths[order]
    if not lengths.sum():
        raise ValueError(f"the {split} data holds no tokens to evaluate on; give more text or --val-data")

    def read(position: int) -> Array:
        doc = int(order[position])
        return source.doc(split, doc) if is_store else np.asarray(source[doc])  # type: ignore

    packer = Packer(lengths, sequence_len + 1, cut=True, seed=0, buffer_docs=EVAL_BUFFER_DOCS, endless=False,
                    shuffle=False)  # fmt: skip
    while packer.buffer or packer.position < len(lengths):
        rows = [packer.next_row() for _ in range(world_size * batch_rows)]
        tokens = _document_rows(rows[rank * batch_rows : (rank + 1) * batch_rows], read, sequence_len + 1, bos_id)
        targets = np.where(tokens[:, 1:] == bos_id, IGNORE, tokens[:, 1:])
        inputs = np.where(tokens[:, :-1] == IGNORE, bos_id, tokens[:, :-1])
        yield _batch(inputs, targets, 0, {}, torch.device(device or "cpu"))


class Renderer(Protocol):
    """What is needed of a tokenizer to prepare conversations."""

    def render(self, conversation: Any, *, max_tokens: int | None = None) -> tuple[list[int], list[int]]:
        """Return ids and mask."""
        ...


def prepare_conversations(
    conversations: Iterable[Any], tokenizer: Renderer, sequence_len: int
) -> list[tuple[Array, Array]]:
    """Render conversations to (ids, mask), at most sequence_len + 1 tokens each; those without a target are dropped.

    The number of dropped ones is logged. Raises ValueError if nothing is left.
    """
    rendered = []
    dropped = 0
    for conversation in conversations:
        ids, mask = tokenizer.render(conversation, max_tokens=sequence_len + 1)
        if any(mask[1:]):
            rendered.append((np.array(ids, np.int32), np.array(mask, np.uint8)))
        else:
            dropped += 1
    total = len(rendered) + dropped
    if dropped:
        log.warning(
            "%d of %d conversations have no assistant text within %d tokens and are left out",
            dropped, total, sequence_len,
        )  # fmt: skip
    if not rendered:
        raise ValueError(
            f"none of {total} conversations has assistant text within {sequence_len} tokens; "
            "give other --data or a longer --max-seq-len"
        )
    return rendered


class ConversationLoader(_Loader):
    """Endless batches of whole conversations packed into rows; what remains of a row is padded and not scored.

    rendered: (ids, mask) as made by `prepare_conversations`; mask 1 = the token is to be learnt.
    """

    def __init__(
        self,
        rendered: Sequence[tuple[Sequence[int] | Array, Sequence[int] | Array]],
        *,
        batch_rows: int,
        sequence_len: int,
        pad_id: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        device: torch.device | str | None = None,
        buffer_docs: int = BUFFER_DOCS,
    ) -> None:
        """Start at the first batch; raises ValueError if there are none, or one does not fit or has no target."""
        if not rendered:
            raise ValueError("there are no conversations to train on; give other --data")
        for i, (ids, mask) in enumerate(rendered):
            if len(ids) != len(mask) or not 2 <= len(ids) <= sequence_len + 1 or not any(mask[1:]):
                raise ValueError(
                    f"conversation {i} has {len(ids)} ids and {int(sum(mask[1:]))} targets; rows take 2 to "
                    f"{sequence_len + 1} ids with at least one target: use prepare_conversations"
                )
        lengths = np.fromiter((len(ids) for ids, _ in rendered), np.int64, len(rendered))
        packer = Packer(lengths, sequence_len + 1, cut=False, seed=seed, buffer_docs=buffer_docs)
        super().__init__(packer, batch_rows, sequence_len, rank, world_size, device)
        self.rendered, self.pad_id = rendered, pad_id

    def _fill(self, rows: list[list[Piece]]) -> tuple[Array, Array]:
        T = self.sequence_len
        inputs = np.full((len(rows), T + 1), self.pad_id, np.int64)
        targets = np.full((len(rows), T + 1), IGNORE, np.int64)  # targets[i] stands at position i of the ids
        for x, y, pieces in zip(inputs, targets, rows, strict=True):
            at = 0
            for length, doc, _ in pieces:
                ids, mask = self.rendered[doc]
                x[at : at + length] = ids
                y[at : at + length] = np.where(np.asarray(mask, bool), ids, IGNORE)
                y[at] = IGNORE  # the first token has no context of its own
                at += length
        inputs, targets = inputs[:, :-1].copy(), targets[:, 1:].copy()
        assert (targets >= 0).any(axis=1).all(), "a row without targets"  # would make the mean loss 0/0
        return inputs, targets
