"""Packed (B, T) batches from documents or conversations, the same global row order for any number of ranks.

Every rank runs the same packing over lengths only, and reads the tokens of its own rows: micro-batch m of W ranks
with B rows each holds global rows [m*W*B, (m+1)*W*B), rank r the r-th B of them. The state is a position in a seeded
permutation and the pieces waiting in the buffer, never tokens; it travels with each batch and restores exactly.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nanozhchat.packing import Array, Packer, Piece, shuffled
from nanozhchat.token_store import TokenStore
from nanozhchat.tokenizer import Tokenizer

log = logging.getLogger(__name__)

IGNORE = -1  # target of a position that is not scored
BUFFER_DOCS = 256
EVAL_SEED = 0
SINGLE_PASS: dict[str, Any] = {"seed": 0, "buffer_docs": 64, "endless": False, "shuffle": False}  # for evaluation
PREFETCH_BATCHES = 4

Rendered = list[tuple[Array, Array]]  # (ids, mask) of conversations
Pairs = list[tuple[tuple[Array, Array], tuple[Array, Array]]]  # the same of a better and a worse answer


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


@dataclass(frozen=True)
class RolloutBatch(Batch):
    """Sampled answers. advantages: (B, T), of the scored targets.

    reference: (B, T) log-probabilities of the scored targets under the model that reinforcement learning began with.
    """

    advantages: Tensor = field(kw_only=True)
    reference: Tensor | None = None


class Batches(Protocol):
    """What a training loop draws from; see `Prefetch`."""

    def __next__(self) -> Batch:
        """Return the next micro-batch of this rank."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch given out."""

    def seek(self, state: dict[str, Any], batch_rows: int) -> None:
        """Continue after `state`, with so many rows a micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How rows are shared out. batch_rows: of one rank; sequence_len: T; device: where batches go."""

    batch_rows: int
    sequence_len: int
    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if self.batch_rows < 1 or self.sequence_len < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(f"{self}: sizes must be at least 1 and rank below world_size")


class Loader:
    """This rank's batches of packed rows. fill: the pieces of rows -> inputs, targets (rows, T) each."""

    def __init__(self, packer: Packer, shape: Shape, fill: Callable[[list[list[Piece]]], tuple[Array, Array]]) -> None:
        self.packer, self.shape, self.fill = packer, shape, fill

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.packer.refill()  # so that the first batch of an epoch counts as its own
        if self.packer.finished:
            raise StopIteration
        epoch, size, device = self.packer.epoch, self.shape.batch_rows, torch.device(self.shape.device)
        rows = [self.packer.next_row() for _ in range(self.shape.world_size * size)]
        rows = rows[self.shape.rank * size : (self.shape.rank + 1) * size]
        tensors = map(torch.from_numpy, self.fill(rows))
        x, y = ((t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True) for t in tensors)
        documents = tuple(sorted({doc for row in rows for _, doc, _ in row}))
        return Batch(x, y, epoch, self.packer.state_dict(), documents)

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch, plain JSON types."""
        return self.packer.state_dict()

    def seek(self, state: dict[str, Any], batch_rows: int) -> None:
        """Continue after the batch that carried `state`, with so many rows; ValueError if it is of other data."""
        self.packer.load_state_dict(state)
        self.shape = replace(self.shape, batch_rows=batch_rows)


class Prefetch:
    """Makes batches ahead of the model in a thread; the state travels with the batch, so nothing is lost by it."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.state = loader.state_dict()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: deque[Future[Batch]] = deque()

    def __next__(self) -> Batch:
        while len(self._ahead) <= PREFETCH_BATCHES:
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


def document_loader(
    store: TokenStore, split: str, *, bos_id: int, seed: int = 0, buffer_docs: int = BUFFER_DOCS, **shape: Any
) -> Loader:
    """Endless batches of packed documents; every row starts with BOS and is full, every document start gets a BOS.

    No token of the split is lost or repeated within an epoch. A document cut at a row's end goes on in a later row
    after a fresh BOS. shape: fields of `Shape`. Raises ValueError if the split is empty.
    """
    lengths, cut = store.lengths(split), Shape(**shape)
    if not lengths.sum():
        raise ValueError(f"the {split} split holds no tokens; give more data")

    def fill(rows: list[list[Piece]]) -> tuple[Array, Array]:
        tokens = _document_rows(rows, lambda doc: store.doc(split, doc), cut.sequence_len + 1, bos_id)
        return tokens[:, :-1].copy(), tokens[:, 1:].copy()

    return Loader(Packer(lengths, cut.sequence_len + 1, cut=True, seed=seed, buffer_docs=buffer_docs), cut, fill)


def eval_documents(source: TokenStore | list[list[int]], split: str, max_tokens: int | None) -> tuple[Array, Array]:
    """Choose the documents to evaluate on: (their numbers, how many tokens of each).

    They come in a fixed pseudo-random order, so that a part stands for the whole, until there are `max_tokens`; the
    last one is cut. None = all. Raises ValueError if there is no token.
    """
    lengths = np.array([len(doc) for doc in source]) if isinstance(source, list) else source.lengths(split)
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
    source: TokenStore | list[list[int]], split: str = "val", *, bos_id: int, max_tokens: int | None = None,
    **shape: Any,
) -> Iterator[Batch]:  # fmt: skip
    """Score each token of the documents that `eval_documents` chooses exactly once, in the same rows for any ranks.

    source: a token store, or documents as lists of ids. A BOS is never a target. All ranks get the same number of
    batches; rows that are not full end in BOS inputs without targets. shape: fields of `Shape`.
    """
    order, lengths = eval_documents(source, split, max_tokens)
    cut = Shape(**shape)
    read = (lambda doc: np.asarray(source[doc])) if isinstance(source, list) else partial(source.doc, split)

    def fill(rows: list[list[Piece]]) -> tuple[Array, Array]:
        tokens = _document_rows(rows, lambda i: read(int(order[i])), cut.sequence_len + 1, bos_id)
        targets = np.where(tokens[:, 1:] == bos_id, IGNORE, tokens[:, 1:])
        return np.where(tokens[:, :-1] == IGNORE, bos_id, tokens[:, :-1]), targets

    return Loader(Packer(lengths, cut.sequence_len + 1, cut=True, **SINGLE_PASS), cut, fill)


def prepare_conversations(conversations: Sequence[Any], tokenizer: Tokenizer, sequence_len: int) -> Rendered:
    """Render conversations to (ids, mask), at most sequence_len + 1 tokens each; those without a target are dropped.

    The number of dropped ones is logged. Raises ValueError if nothing is left.
    """
    total, made = len(conversations), (tokenizer.render(c, max_tokens=sequence_len + 1) for c in conversations)
    rendered = [(np.array(ids, np.int32), np.array(mask, np.uint8)) for ids, mask in made if any(mask[1:])]
    if total > len(rendered):
        log.warning("%d of %d conversations have no assistant text within %d tokens and are left out",
                    total - len(rendered), total, sequence_len)  # fmt: skip
    if not rendered:
        raise ValueError(f"none of {total} conversations has assistant text within {sequence_len} tokens; "
                         "give other --data, or a base model trained with a longer --max-seq-len")  # fmt: skip
    return rendered


def _side_by_side(rows: list[list[tuple[Array, Array]]], width: int, pad_id: int) -> tuple[Array, Array]:
    """Lay (ids, mask) end to end in rows of inputs and targets; a first token has no context of its own: no target."""
    inputs, targets = np.full((len(rows), width), pad_id, np.int64), np.full((len(rows), width), IGNORE, np.int64)
    for x, y, parts in zip(inputs, targets, rows, strict=True):
        at = 0
        for ids, mask in parts:
            x[at : at + len(ids)] = ids
            y[at + 1 : at + len(ids)] = np.where(np.asarray(mask[1:], bool), ids[1:], IGNORE)
            at += len(ids)
    return inputs[:, :-1].copy(), targets[:, 1:].copy()


def conversation_loader(
    rendered: Rendered, *, pad_id: int, seed: int = 0, buffer_docs: int = BUFFER_DOCS, endless: bool = True,
    **shape: Any,
) -> Loader:  # fmt: skip
    """Batches of whole conversations packed into rows; what remains of a row is padded and not scored.

    Endless and shuffled, or each once in the given order, in as many batches on every rank. rendered: (ids, mask) as
    made by `prepare_conversations`; mask 1 = the token is to be learnt. shape: fields of `Shape`. Raises ValueError if
    there are none, or one does not fit or has no target.
    """
    cut = Shape(**shape)
    width = cut.sequence_len + 1
    if not rendered:
        raise ValueError("there are no conversations to train on; give other --data")
    for i, (ids, mask) in enumerate(rendered):
        if len(ids) != len(mask) or not 2 <= len(ids) <= width or not any(mask[1:]):
            raise ValueError(f"conversation {i} has {len(ids)} ids and {int(sum(mask[1:]))} targets; rows take 2 to "
                             f"{width} ids with at least one target: use prepare_conversations")  # fmt: skip

    def fill(rows: list[list[Piece]]) -> tuple[Array, Array]:
        return _side_by_side([[rendered[doc] for _, doc, _ in pieces] for pieces in rows], width, pad_id)

    lengths = np.array([len(ids) for ids, _ in rendered], np.int64)
    order: dict[str, Any] = {"seed": seed, "buffer_docs": buffer_docs} if endless else SINGLE_PASS
    return Loader(Packer(lengths, width, cut=False, **order), cut, fill)


def rows_in_epoch(rendered: Rendered | Pairs, sequence_len: int) -> int:
    """Count the rows that one pass over conversations, or pairs, takes."""
    if not isinstance(rendered[0][0], np.ndarray):
        return len(rendered)
    lengths = np.array([len(ids) for ids, _ in rendered], np.int64)
    packer = Packer(lengths, sequence_len + 1, cut=False, seed=0, buffer_docs=BUFFER_DOCS, endless=False)
    while not packer.finished:
        packer.next_row()
    return packer.rows


def prepare_preferences(preferences: Sequence[Any], tokenizer: Tokenizer, sequence_len: int) -> Pairs:
    """Render pairs of conversations that differ in the last answer, of which alone the tokens are scored.

    At most sequence_len + 1 tokens each; both sides lose the same old turns. Pairs whose question leaves no room, or
    whose answers are equal once cut, are left out and counted. Raises ValueError if nothing is left.
    """
    made: Pairs = []
    total, width = len(preferences), sequence_len + 1
    for sides in preferences:
        answers = [tokenizer.render_message(side[-1])[1:] for side in sides]
        prompt = tokenizer.render_prompt(sides[0][:-1], max_tokens=width - min(width // 2, max(map(len, answers))))
        both = [np.array([*prompt, *answer][:width], np.int32) for answer in answers]
        if len(prompt) < width and not np.array_equal(both[0], both[1]):
            better, worse = ((ids, (np.arange(len(ids)) >= len(prompt)).astype(np.uint8)) for ids in both)
            made.append((better, worse))
    if total > len(made):
        log.warning("%d of %d pairs have no room for two answers within %d tokens and are left out",
                    total - len(made), total, sequence_len)  # fmt: skip
    if not made:
        raise ValueError(f"none of {total} pairs of answers fits {sequence_len} tokens; give other --data")
    return made


def preference_loader(pairs: Pairs, *, pad_id: int, seed: int = 0, endless: bool = True, **shape: Any) -> Loader:
    """Batches of a pair a row, as two rows of inputs and targets, better then worse, no longer than needed.

    Endless and shuffled, or each pair once. shape: fields of `Shape`.
    """

    def fill(rows: list[list[Piece]]) -> tuple[Array, Array]:
        nothing = np.zeros(0, np.int32), np.zeros(0, np.uint8)
        sides = [side for row in rows for side in (pairs[row[0][1]] if row else (nothing, nothing))]
        return _side_by_side([[side] for side in sides], max(2, *(len(ids) for ids, _ in sides)), pad_id)

    one_each = Packer(np.ones(len(pairs), np.int64), 1, cut=False, seed=seed, buffer_docs=1, endless=endless,
                      shuffle=endless)  # fmt: skip
    return Loader(one_each, Shape(**shape), fill)
