"""Packing and loading: nothing lost, rows full, same rows for any number of ranks, exact resume, never an empty row."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanozhchat.dataloader import (
    Batch,
    ConversationLoader,
    DocumentLoader,
    conversation_eval_batches,
    eval_batches,
    eval_documents,
    prepare_conversations,
)
from nanozhchat.packing import Packer, shuffled

BOS = 0


class Docs:
    """A token store in memory whose every token is unique: document d holds ids first[d] .. first[d] + length."""

    def __init__(self, lengths: list[int]) -> None:
        self.sizes = np.array(lengths, np.int64)
        self.first = 1 + np.concatenate([[0], np.cumsum(self.sizes)])

    def n_docs(self, split: str) -> int:
        return len(self.sizes)

    def lengths(self, split: str) -> np.ndarray:
        return self.sizes

    def doc(self, split: str, index: int) -> np.ndarray:
        return np.arange(self.first[index], self.first[index + 1]).astype(np.uint32)


def loader(docs: Docs, T: int = 16, rows: int = 2, **options: Any) -> DocumentLoader:
    return DocumentLoader(docs, "train", batch_rows=rows, sequence_len=T, bos_id=BOS, **options)


def full_rows(batch: Batch) -> torch.Tensor:
    """The T + 1 tokens of each row."""
    return torch.cat([batch.inputs[:, :1], batch.targets], dim=1)


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) and a.state == b.state


sizes = st.lists(st.integers(0, 60), min_size=1, max_size=40).filter(any)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 4097])
def test_the_order_of_an_epoch_is_a_permutation(n: int) -> None:
    for seed, epoch in [(0, 0), (0, 1), (5, 0)]:
        assert sorted(shuffled(n, seed, epoch, np.arange(n)).tolist()) == list(range(n))


def test_the_order_differs_between_seeds_and_epochs_and_is_no_simple_shift() -> None:
    n = 1000
    orders = [shuffled(n, seed, epoch, np.arange(n)) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    for i, a in enumerate(orders):
        assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 0.15
        for b in orders[i + 1 :]:
            assert (a == b).mean() < 0.02


@given(sizes, st.integers(1, 24), st.integers(1, 9), st.integers(0, 3))
@settings(deadline=None)
def test_no_token_is_lost_or_repeated_within_an_epoch(lengths: list[int], T: int, buffer: int, seed: int) -> None:
    packer = Packer(np.array(lengths), T + 1, cut=True, seed=seed, buffer_docs=buffer, endless=False)
    found: Counter[tuple[int, int]] = Counter()
    while not packer.finished:
        for length, doc, start in packer.next_row():
            found.update((doc, i) for i in range(start, start + length))
    assert found == Counter({(d, i): 1 for d, length in enumerate(lengths) for i in range(length)})


@given(sizes, st.integers(1, 24), st.integers(0, 3))
@settings(deadline=None)
def test_over_two_epochs_every_token_comes_twice_before_any_comes_three_times(
    lengths: list[int], T: int, seed: int
) -> None:
    docs = Docs(lengths)
    load = loader(docs, T, rows=1, seed=seed, buffer_docs=4)
    total = int(docs.sizes.sum())
    stream = [int(t) for _ in range(2 * total + 5) for t in full_rows(next(load))[0] if t != BOS]
    for epoch in range(2):
        assert sorted(stream[epoch * total : (epoch + 1) * total]) == list(range(1, total + 1))


@given(sizes, st.integers(1, 24))
@settings(deadline=None)
def test_rows_are_full_begin_with_bos_and_hold_runs_of_documents_each_after_a_bos(lengths: list[int], T: int) -> None:
    docs = Docs(lengths)
    load = loader(docs, T)
    starts = set(docs.first.tolist())
    for _ in range(20):
        batch = next(load)
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        for row in full_rows(batch).tolist():
            assert row[0] == BOS
            assert -1 not in row
            for left, right in zip(row, row[1:], strict=False):
                assert right == BOS or left == BOS or (right == left + 1 and right not in starts)


def test_a_short_document_is_cut_only_when_nothing_fits() -> None:
    load = loader(Docs([5] * 300), T=17)  # three documents with their BOS fill a row of 18 exactly
    for _ in range(20):
        assert all((row == BOS).sum() == 3 for row in full_rows(next(load)))


@pytest.mark.parametrize(("world_size", "rows"), [(2, 2), (4, 1), (1, 2)])
def test_the_rows_of_a_step_do_not_depend_on_the_number_of_ranks(world_size: int, rows: int) -> None:
    docs = Docs([(i * 37) % 50 for i in range(100)])
    alone = loader(docs, rows=4, seed=3)
    ranks = [loader(docs, rows=rows, seed=3, rank=r, world_size=world_size) for r in range(world_size)]
    micro_steps = 4 // (world_size * rows)
    for _ in range(30):
        parts = [next(rank).inputs for _ in range(micro_steps) for rank in ranks]
        assert torch.equal(next(alone).inputs, torch.cat(parts))


@given(sizes, st.integers(0, 30), st.integers(1, 10), st.integers(0, 1))
@settings(deadline=None, max_examples=50)
def test_resuming_from_any_batch_continues_exactly(lengths: list[int], done: int, buffer: int, rank: int) -> None:
    options: dict[str, Any] = {"seed": 1, "buffer_docs": buffer, "rank": rank, "world_size": 2}
    first = loader(Docs(lengths), **options)
    state = first.state_dict()
    for _ in range(done):
        state = next(first).state
    second = loader(Docs(lengths), **options)
    second.load_state_dict(json.loads(json.dumps(state)))
    for _ in range(10):
        assert same(next(first), next(second))


def test_the_state_of_a_batch_does_not_change_when_more_batches_are_read() -> None:
    load = loader(Docs([9] * 50))
    batch = next(load)
    before = json.dumps(batch.state)
    for _ in range(20):
        next(load)
    assert json.dumps(batch.state) == before


@pytest.mark.parametrize("change", [{"seed": 2}, {"T": 17}, {"buffer_docs": 9}, {"docs": Docs([9] * 51)}])
def test_a_state_of_other_data_or_settings_is_refused_with_the_difference(change: dict[str, Any]) -> None:
    given: dict[str, Any] = {"docs": Docs([9] * 50), "T": 16, "seed": 1, "buffer_docs": 8}
    state = next(loader(**given)).state
    with pytest.raises(ValueError, match=r"was \d+ and is \d+"):
        loader(**{**given, **change}).load_state_dict(state)


def test_the_epoch_counts_finished_passes() -> None:
    load = loader(Docs([15] * 8), T=15, rows=4)
    # 8 documents of one row each, 4 rows a batch: an epoch is two batches
    assert [next(load).epoch for _ in range(7)] == [0, 0, 1, 1, 2, 2, 3]


def test_an_empty_split_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        loader(Docs([0, 0]))


def test_packing_a_batch_for_eight_ranks_takes_under_a_hundredth_of_a_step() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 20_000)
    load = loader(Docs(lengths.tolist()), T=2048, rows=1, world_size=8)
    next(load)
    best = min(_timed(load) for _ in range(20))
    assert best < 0.005  # of a step of half a second; the best of twenty, as the machine may be busy


def _timed(load: DocumentLoader) -> float:
    start = time.perf_counter()
    next(load)
    return time.perf_counter() - start


@given(sizes, st.integers(1, 24), st.integers(1, 3), st.sampled_from([1, 2, 3]))
@settings(deadline=None)
def test_evaluation_scores_each_token_exactly_once_over_all_ranks(
    lengths: list[int], T: int, rows: int, world_size: int
) -> None:
    docs = Docs(lengths)
    scored: list[int] = []
    counts = set()
    for rank in range(world_size):
        batches = list(
            eval_batches(docs, "val", batch_rows=rows, sequence_len=T, bos_id=BOS, rank=rank, world_size=world_size)
        )
        counts.add(len(batches))
        scored += [int(t) for b in batches for t in b.targets.flatten() if t >= 0]
    assert sorted(scored) == list(range(1, int(docs.sizes.sum()) + 1))
    assert len(counts) == 1


@given(sizes, st.integers(1, 400))
@settings(deadline=None)
def test_evaluation_keeps_to_its_limit_and_to_the_documents_it_names(lengths: list[int], max_tokens: int) -> None:
    docs = Docs(lengths)
    batches = eval_batches(docs, "val", batch_rows=2, sequence_len=9, bos_id=BOS, max_tokens=max_tokens)
    scored = sorted(int(t) for b in batches for t in b.targets.flatten() if t >= 0)
    chosen, counts = eval_documents(docs, "val", max_tokens)
    assert scored == sorted(int(t) for d, n in zip(chosen, counts, strict=True) for t in docs.doc("val", int(d))[:n])
    assert len(scored) == min(max_tokens, int(docs.sizes.sum()))


def test_evaluation_takes_plain_lists_and_never_scores_a_bos() -> None:
    batches = eval_batches([[5, 6, 7], [8]], batch_rows=1, sequence_len=8, bos_id=BOS)
    rows = [(b.inputs.tolist(), b.targets.tolist()) for b in batches]
    assert len(rows) == 1
    assert sorted(t for t in rows[0][1][0] if t != -1) == [5, 6, 7, 8]
    assert BOS not in rows[0][1][0]


def test_evaluation_targets_follow_their_inputs() -> None:
    for batch in eval_batches(Docs([30, 4, 11]), batch_rows=1, sequence_len=8, bos_id=BOS):
        for x, y in zip(batch.inputs[0].tolist(), batch.targets[0].tolist(), strict=True):
            assert y == -1 or x in (BOS, y - 1)


# --- conversations


class ByteRenderer:
    """Renders like the real tokenizer: BOS, then each turn as a role id, bytes, an end id; assistant turns learnt."""

    def render(self, conversation: Any, *, max_tokens: int | None = None) -> tuple[list[int], list[int]]:
        ids, mask = [256], [0]
        for role, content in conversation:
            learn = int(role == "assistant")
            data = list(content.encode())
            ids += [257 + learn, *data, 259]
            mask += [0, *[learn] * len(data), learn]
        return ids[:max_tokens], mask[:max_tokens]


def exchange(question: str, answer: str) -> list[tuple[str, str]]:
    return [("user", question), ("assistant", answer)]


PATHOLOGICAL = [
    exchange("问" * 1000, "答"),  # the question alone is longer than any context
    exchange("问", "答" * 1000),
    exchange("", ""),
    exchange("问", "答") * 10_000,
    exchange("问", "答"),
]
rendered_lists = st.lists(
    st.integers(2, 17).flatmap(
        lambda n: st.lists(st.integers(0, 1), min_size=n - 1, max_size=n - 1).filter(any).map(lambda m: [0, *m])
    ),
    min_size=1,
    max_size=30,
)


def numbered(masks: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """Give each conversation with these masks ids of its own."""
    ends = np.cumsum([0, *map(len, masks)]) + 1
    return [(list(range(ends[i], ends[i + 1])), mask) for i, mask in enumerate(masks)]


def conversation_loader(rendered: Any, T: int = 16, rows: int = 2, **options: Any) -> ConversationLoader:
    return ConversationLoader(rendered, batch_rows=rows, sequence_len=T, pad_id=0, **options)


@given(rendered_lists, st.integers(1, 9))
@settings(deadline=None)
def test_no_row_is_without_a_target_whatever_the_conversations(masks: list[list[int]], buffer: int) -> None:
    load = conversation_loader(numbered(masks), buffer_docs=buffer)
    for _ in range(30):
        assert (next(load).targets >= 0).any(dim=1).all()


@given(st.lists(st.sampled_from(PATHOLOGICAL), min_size=1, max_size=6), st.integers(5, 40))
@settings(deadline=None, max_examples=30)
def test_no_row_is_without_a_target_when_rendered_conversations_are_cut(conversations: Any, T: int) -> None:
    rendered = prepare_conversations([exchange("", "答"), *conversations], ByteRenderer(), T)  # the first always fits
    load = conversation_loader(rendered, T)
    for _ in range(10):
        assert (next(load).targets >= 0).any(dim=1).all()


@given(rendered_lists)
@settings(deadline=None)
def test_each_target_of_each_conversation_is_learnt_once_an_epoch_after_its_own_context(masks: list[list[int]]) -> None:
    rendered = numbered(masks)
    wanted = sorted(i for ids, mask in rendered for i, m in zip(ids, mask, strict=True) if m)
    load = conversation_loader(rendered, rows=1)
    found: list[int] = []
    while len(found) < len(wanted):
        batch = next(load)
        for x, y in zip(batch.inputs[0].tolist(), batch.targets[0].tolist(), strict=True):
            if y >= 0:
                assert x == y - 1
                found.append(y)
    assert sorted(found[: len(wanted)]) == wanted


def test_conversations_that_cannot_teach_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    rendered = prepare_conversations(PATHOLOGICAL, ByteRenderer(), 30)
    assert len(rendered) == 4
    assert max(len(ids) for ids, _ in rendered) <= 31
    assert "1 of 5 conversations" in caplog.text


def test_nothing_to_learn_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="none of 1 conversations"):
        prepare_conversations(PATHOLOGICAL[:1], ByteRenderer(), 30)
    with pytest.raises(ValueError, match="no conversations"):
        conversation_loader([])


@pytest.mark.parametrize("bad", [([1, 2], [0, 0]), ([1], [1]), (list(range(18)), [0] + [1] * 17), ([1, 2, 3], [0, 1])])
def test_a_rendered_conversation_that_breaks_the_rules_is_refused(bad: tuple[list[int], list[int]]) -> None:
    with pytest.raises(ValueError, match="conversation 1 "):
        conversation_loader([([1, 2], [0, 1]), bad])


@given(rendered_lists, st.integers(0, 20))
@settings(deadline=None, max_examples=40)
def test_resuming_conversations_from_any_batch_continues_exactly(masks: list[list[int]], done: int) -> None:
    first = conversation_loader(numbered(masks), seed=4, buffer_docs=5)
    state = first.state_dict()
    for _ in range(done):
        state = next(first).state
    second = conversation_loader(numbered(masks), seed=4, buffer_docs=5)
    second.load_state_dict(json.loads(json.dumps(state)))
    for _ in range(8):
        assert same(next(first), next(second))


def test_two_ranks_share_the_conversation_rows_of_one() -> None:
    rendered = numbered([[0] + [1] * (i % 13 + 1) for i in range(60)])
    alone = conversation_loader(rendered, rows=4)
    ranks = [conversation_loader(rendered, rows=2, rank=r, world_size=2) for r in range(2)]
    for _ in range(30):
        assert torch.equal(next(alone).targets, torch.cat([next(rank).targets for rank in ranks]))


@given(rendered_lists, st.sampled_from([1, 2, 3]))
@settings(deadline=None)
def test_conversation_evaluation_scores_each_target_once_over_all_ranks(masks: list[list[int]], world: int) -> None:
    rendered = numbered(masks)
    wanted = sorted(i for ids, mask in rendered for i, m in zip(ids, mask, strict=True) if m)
    shape: dict[str, Any] = {"batch_rows": 2, "sequence_len": 16, "pad_id": 0, "world_size": world}
    per_rank = [list(conversation_eval_batches(rendered, rank=r, **shape)) for r in range(world)]
    assert sorted(int(t) for batches in per_rank for b in batches for t in b.targets.flatten() if t >= 0) == wanted
    assert len({len(batches) for batches in per_rank}) == 1
