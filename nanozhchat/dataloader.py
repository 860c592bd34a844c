"""Packed (B, T) batches from documents or conversations, the same global row order for any number of ranks.

Every rank runs the same packing over lengths only, and reads the tokens of its own rows: micro-batch m of W ranks
with B rows each holds global rows [m*W*B, (m+1)*W*B), rank r the r-th B of them. The state is a position in a seeded
permutation and the pieces waiting in the buffer, never tokens; it travels with each batch and restores exactly.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from nanozhchat.packing import Array, Packer, Piece, shuffled

log = logging.getLogger(__name__)

IGNORE = -1  # target of a position that is not scored
BUFFER_DOCS = 256
EVAL_BUFFER_DOCS = 64
EVAL_SEED = 0
PREFETCH_BATCHES = 4

Rendered = list[tuple[Array, Array]]  # (ids, mask) of conversations


@dataclass(frozen=True)
class Batch:
    """Rows to train on. inputs, targets: (B, T) int64, target -1 = not scored; epoch: passes finished before this one.

    state: the loader's state after this batch, plain JSON types. documents: whose text it holds.
    """

    inputs: Tensor
    targets: Tensor
    epoch: int
    state: dict[str, Any]
    documents: tuple[int, ...] = ()


class Batches(Protocol):
    """What the training loop needs of a loader."""

    def __next__(self) -> Batch:
        """Return the next batch of this rank."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch, plain JSON types."""
        ...

    def seek(self, state: dict[str, Any], batch_rows: int) -> None:
        """Continue after the batch that carried `state`, with so many rows a batch."""
        ...


@runtime_checkable
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
        self.packer.refill()  # so that the first batch of an epoch counts as its own
        epoch = self.packer.epoch
        rows = self._own_rows()
        inputs, targets = self._fill(rows)
        documents = tuple(sorted({doc for row in rows for _, doc, _ in row}))
        return _batch(inputs, targets, epoch, self.packer.state_dict(), self.device, documents)

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

    def seek(self, state: dict[str, Any], batch_rows: int) -> None:
        """Continue after the batch that carried `state`, with so many rows a batch."""
        self.load_state_dict(state)
        self.batch_rows = batch_rows


class Prefetch:
    """Makes batches ahead of the model in a thread; the state travels with the batch, so nothing is lost by it."""

    def __init__(self, loader: _Loader, depth: int = PREFETCH_BATCHES) -> None:
        """Start at the loader's place. depth: batches ready at most."""
        self.loader, self.depth = loader, depth
        self.state = loader.state_dict()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: deque[Future[Batch]] = deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while len(self._ahead) <= self.depth:
            self._ahead.append(self._pool.submit(next, self.loader))
        batch = self._ahead.popleft().result()  # an error of the thread is raised here
        self.state = batch.state
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch given out, not after what was read ahead."""
        return self.state

    def seek(self, state: dict[str, Any], batch_rows: int) -> None:
        """Throw away what was read ahead and continue after `state`."""
        for future in self._ahead:
            future.cancel()
        wait(self._ahead)
        self._ahead.clear()
        self.loader.seek(state, batch_rows)
        self.state = state


def _batch(
    inputs: Array, targets: Array, epoch: int, state: dict[str, Any], device: torch.device,
    documents: tuple[int, ...] = (),
) -> Batch:  # fmt: skip
    x, y = torch.from_numpy(inputs), torch.from_numpy(targets)
    if device.type == "cuda":
        x, y = x.pin_memory(), y.pin_memory()
    if device.type != "cpu":
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
    return Batch(x, y, epoch, state, documents)


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


def eval_documents(source: Store | Sequence[Sequence[int]], split: str, max_tokens: int | None) -> tuple[Array, Array]:
    """Choose the documents to evaluate on: (their numbers, how many tokens of each).

    They come in a fixed pseudo-random order, so that a part stands for the whole, until there are `max_tokens`; the
    last one is cut. None = all. Raises ValueError if there is no token.
    """
    lengths = source.lengths(split) if isinstance(source, Store) else np.array([len(doc) for doc in source], np.int64)
    order = shuffled(len(lengths), EVAL_SEED, 0, np.arange(len(lengths)))
    lengths = lengths[order]
    if max_tokens is not None:
        count = int(np.searchsorted(np.cumsum(lengths), max_tokens)) + 1
        order, lengths = order[:count], lengths[:count]
        if len(lengths):
            lengths[-1] -= max(0, int(lengths.sum()) - max_tokens)
    if lengths.sum() <= 0:
        raise ValueError(f"the {split} data holds no tokens to evaluate on; give more text or --val-data")
    return order, lengths


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
    """Score each token of the documents that `eval_documents` chooses exactly once, in the same rows for any ranks.

    source: a token store, or documents as lists of ids. A BOS is never a target. All ranks get the same number of
    batches; rows that are not full end in BOS inputs without targets.
    """
    order, lengths = eval_documents(source, split, max_tokens)

    def read(position: int) -> Array:
        doc = int(order[position])
        return source.doc(split, doc) if isinstance(source, Store) else np.asarray(source[doc])

    packer = Packer(lengths, sequence_len + 1, cut=True, seed=0, buffer_docs=EVAL_BUFFER_DOCS, endless=False,
                    shuffle=False)  # fmt: skip
    while not packer.finished:
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


def prepare_conversations(conversations: Iterable[Any], tokenizer: Renderer, sequence_len: int) -> Rendered:
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
        inputs, targets = _conversation_rows(rows, self.rendered, self.sequence_len, self.pad_id)
        assert (targets >= 0).any(axis=1).all(), "a row without targets"  # would make the mean loss 0/0
        return inputs, targets


def _conversation_rows(rows: list[list[Piece]], rendered: Sequence[Any], T: int, pad_id: int) -> tuple[Array, Array]:
    """Gather ids and targets: (len(rows), T) each."""
    inputs = np.full((len(rows), T + 1), pad_id, np.int64)
    targets = np.full((len(rows), T + 1), IGNORE, np.int64)  # targets[i] stands at position i of the ids
    for x, y, pieces in zip(inputs, targets, rows, strict=True):
        at = 0
        for length, doc, _ in pieces:
            ids, mask = rendered[doc]
            x[at : at + length] = ids
            y[at : at + length] = np.where(np.asarray(mask, bool), ids, IGNORE)
            y[at] = IGNORE  # the first token has no context of its own
            at += length
    return inputs[:, :-1].copy(), targets[:, 1:].copy()


def conversation_eval_batches(
    rendered: Sequence[tuple[Sequence[int] | Array, Sequence[int] | Array]],
    *,
    batch_rows: int,
    sequence_len: int,
    pad_id: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str | None = None,
) -> Iterator[Batch]:
    """Score each target of each conversation exactly once, in the given order; as many batches on every rank."""
    lengths = np.array([len(ids) for ids, _ in rendered], np.int64)
    packer = Packer(lengths, sequence_len + 1, cut=False, seed=0, buffer_docs=EVAL_BUFFER_DOCS, endless=False,
                    shuffle=False)  # fmt: skip
    if len(lengths) and lengths.max() > sequence_len + 1:
        raise ValueError(
            f"a conversation has {lengths.max()} ids, rows take {sequence_len + 1}: use prepare_conversations"
        )
    while not packer.finished:
        rows = [packer.next_row() for _ in range(world_size * batch_rows)]
        inputs, targets = _conversation_rows(rows[rank * batch_rows : (rank + 1) * batch_rows], rendered, sequence_len,
                                             pad_id)  # fmt: skip
        yield _batch(inputs, targets, 0, {}, torch.device(device or "cpu"))
