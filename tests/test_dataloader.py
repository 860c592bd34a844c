"""Packing and loading: nothing lost, rows full, same rows for any number of ranks, exact resume, never an empty row."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanozhchat import dataloader
from nanozhchat.dataloader import document_loader, eval_batches, prepare_conversations
from nanozhchat.packing import Packer, shuffled
from nanozhchat.prepare import prepare
from nanozhchat.tokenizer import Tokenizer
from tests.conftest import CPU, refused, write_jsonl

BOS = 0


class Docs:
    """A token store in memory whose every token is unique: document d holds ids first[d] .. first[d] + length."""

    def __init__(self, lengths):
        self.sizes = np.array(lengths, np.int64)
        self.first = 1 + np.concatenate([[0], np.cumsum(self.sizes)])

    def n_docs(self, split):
        return len(self.sizes)

    def lengths(self, split):
        return self.sizes

    def doc(self, split, index):
        return np.arange(self.first[index], self.first[index + 1]).astype(np.uint32)


def loader(docs, T=16, rows=2, **options):
    return document_loader(docs, "train", batch_rows=rows, sequence_len=T, bos_id=BOS, **options)


def full_rows(batch):
    """The T + 1 tokens of each row."""
    return torch.cat([batch.inputs[:, :1], batch.targets], dim=1)


def same(a, b):
    return torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) and a.state == b.state


sizes = st.lists(st.integers(0, 60), min_size=1, max_size=40).filter(any)
masks = st.lists(st.integers(0, 1), min_size=1, max_size=16).filter(any).map(lambda m: [0, *m])
rendered_lists = st.lists(masks, min_size=1, max_size=30)


def numbered(masks):
    """Give each conversation with these masks ids of its own."""
    ends = np.cumsum([0, *map(len, masks)]) + 1
    return [(list(range(ends[i], ends[i + 1])), mask) for i, mask in enumerate(masks)]


def learnt(rendered):
    return sorted(i for ids, mask in rendered for i, m in zip(ids, mask, strict=True) if m)


def chat_loader(rendered, T=16, rows=2, **options):
    return dataloader.conversation_loader(rendered, batch_rows=rows, sequence_len=T, pad_id=0, **options)


def test_a_row_of_whole_documents_holds_none_twice_however_few_there_are_and_their_order_changes():
    packer = Packer(np.array([5, 6, 7, 8]), 100, cut=False, seed=1, buffer_docs=64)
    rows = [[doc for _, doc, _ in packer.next_row()] for _ in range(20)]
    assert [row for row in rows if sorted(row) != [0, 1, 2, 3]] == []
    assert len({tuple(row) for row in rows}) > 5


def test_the_order_of_an_epoch_is_a_permutation_of_its_own_and_no_simple_shift():
    assert all(sorted(shuffled(n, n, 3, np.arange(n)).tolist()) == list(range(n)) for n in range(1, 300, 7))
    orders = [shuffled(1000, seed, epoch, np.arange(1000)) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert all(abs(np.corrcoef(a, np.arange(1000))[0, 1]) < 0.15 for a in orders)
    assert all((a == b).mean() < 0.02 for a, b in itertools.combinations(orders, 2))


@given(sizes, st.integers(1, 24), st.integers(0, 3))
def test_over_two_epochs_every_token_comes_twice_before_any_comes_three_times(lengths, T, seed):
    docs = Docs(lengths)
    load = loader(docs, T, rows=1, seed=seed, buffer_docs=4)
    total = int(docs.sizes.sum())
    stream = [int(t) for _ in range(2 * total + 5) for t in full_rows(next(load))[0] if t != BOS]
    for epoch in range(2):
        assert sorted(stream[epoch * total : (epoch + 1) * total]) == list(range(1, total + 1))


@given(sizes, st.integers(1, 24))
def test_rows_are_full_begin_with_bos_and_hold_runs_of_documents_each_after_a_bos(lengths, T):
    docs = Docs(lengths)
    load, starts = loader(docs, T), set(docs.first.tolist())
    for batch in itertools.islice(load, 20):
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        for row in full_rows(batch).tolist():
            assert (row[0], -1 in row) == (BOS, False)
            for left, right in itertools.pairwise(row):
                assert BOS in (left, right) or (right == left + 1 and right not in starts)


def test_a_short_document_is_cut_only_when_nothing_fits():
    load = loader(Docs([5] * 300), T=17)  # three documents with their BOS fill a row of 18 exactly
    assert all((row == BOS).sum() == 3 for _ in range(20) for row in full_rows(next(load)))


def test_a_long_document_does_not_fill_the_rows_of_a_whole_batch():
    docs = Docs([100_000] + [400] * 20)
    load = loader(docs, T=16, rows=8)
    for _ in range(10):
        first = full_rows(next(load))[:, 1]
        assert len({int(np.searchsorted(docs.first, token, side="right")) for token in first}) >= 4


def documents(**options):
    return loader(Docs([(i * 37) % 50 for i in range(100)]), seed=3, **options)


def chats(**options):
    return chat_loader(numbered([[0] + [1] * (i % 13 + 1) for i in range(60)]), **options)


@pytest.mark.parametrize(("world_size", "rows"), [(2, 2), (4, 1), (1, 2)])
@pytest.mark.parametrize("make", [documents, chats])
def test_the_rows_of_a_step_do_not_depend_on_the_number_of_ranks(make, world_size, rows):
    alone = make(rows=4)
    ranks = [make(rows=rows, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(30):
        parts = [next(rank) for _ in range(4 // (world_size * rows)) for rank in ranks]
        whole = next(alone)
        assert torch.equal(whole.inputs, torch.cat([p.inputs for p in parts]))
        assert torch.equal(whole.targets, torch.cat([p.targets for p in parts]))


@given(sizes, st.data(), st.integers(0, 30), st.integers(1, 10), st.integers(0, 1))
@settings(max_examples=50)
def test_resuming_from_any_batch_continues_exactly(lengths, data, done, buffer, rank):
    options = {"seed": 1, "buffer_docs": buffer, "rank": rank, "world_size": 2}
    rendered = numbered(data.draw(rendered_lists))
    for make in (lambda: loader(Docs(lengths), **options), lambda: chat_loader(rendered, **options)):
        first, second = make(), make()
        states = [json.dumps(first.state_dict()), *(json.dumps(next(first).state) for _ in range(done))]
        expected = [next(first) for _ in range(8)]
        second.seek(json.loads(states[-1]), 2)
        assert all(same(batch, next(second)) for batch in expected)


@pytest.mark.parametrize("change", [{"seed": 2}, {"T": 17}, {"buffer_docs": 9}, {"docs": Docs([9] * 51)}])
def test_a_state_of_other_data_or_settings_is_refused_with_the_difference(change):
    given = {"docs": Docs([9] * 50), "T": 16, "seed": 1, "buffer_docs": 8}
    state = next(loader(**given)).state
    refused(r"was \d+ and is \d+", loader(**{**given, **change}).seek, state, 2)


def test_the_epoch_counts_finished_passes():
    load = loader(Docs([15] * 8), T=15, rows=4)  # 8 documents of one row each: an epoch is two batches
    assert [next(load).epoch for _ in range(7)] == [0, 0, 1, 1, 2, 2, 3]


def scored(batches):
    return [t for b in batches for t in b.targets.flatten().tolist() if t >= 0]


@given(sizes, rendered_lists, st.integers(1, 24), st.integers(1, 3), st.sampled_from([1, 2, 3]))
def test_evaluation_scores_each_token_once_over_all_ranks_after_its_context(lengths, masks, T, rows, world):
    docs, rendered = Docs(lengths), numbered(masks)
    shape = {"batch_rows": rows, "world_size": world}
    texts = [list(eval_batches(docs, "val", sequence_len=T, bos_id=BOS, rank=r, **shape)) for r in range(world)]
    talks = [list(chat_loader(rendered, rows=rows, rank=r, world_size=world, endless=False)) for r in range(world)]
    assert sorted(scored(sum(texts, []))) == list(range(1, int(docs.sizes.sum()) + 1))
    assert sorted(scored(sum(talks, []))) == learnt(rendered)
    assert len(set(map(len, texts))) == len(set(map(len, talks))) == 1
    for batch in sum(texts, []):
        assert ((batch.targets < 0) | (batch.inputs == BOS) | (batch.inputs == batch.targets - 1)).all()


@given(sizes, st.integers(1, 400))
def test_evaluation_keeps_to_its_limit_and_to_the_documents_it_names(lengths, max_tokens):
    docs, shape = Docs(lengths), {"batch_rows": 2, "sequence_len": 9, "bos_id": BOS}
    found = scored(eval_batches(docs, "val", max_tokens=max_tokens, **shape))
    lists = [docs.doc("val", d).tolist() for d in range(len(lengths))]
    assert scored(eval_batches(lists, max_tokens=max_tokens, **shape)) == found
    named = zip(*dataloader.eval_documents(docs, "val", max_tokens), strict=True)
    assert sorted(found) == sorted(int(t) for d, n in named for t in docs.doc("val", int(d))[:n])
    assert len(found) == min(max_tokens, int(docs.sizes.sum()))


def exchange(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


PATHOLOGICAL = [exchange("问" * 1000, "答")]  # the question alone is longer than any context
PATHOLOGICAL += [exchange("问", "答" * 1000), exchange("", ""), exchange("问", "答") * 1000, exchange("问", "答")]


@given(rendered_lists, st.integers(1, 9))
def test_each_target_is_learnt_once_an_epoch_after_its_own_context_and_no_row_is_without_one(masks, buffer):
    wanted, found = learnt(numbered(masks)), []
    load = chat_loader(numbered(masks), rows=1, buffer_docs=buffer)
    while len(found) < len(wanted):
        batch = next(load)
        kept = batch.targets >= 0
        assert kept.any()
        assert torch.equal(batch.inputs[kept], batch.targets[kept] - 1)
        found += scored([batch])
    assert sorted(found[: len(wanted)]) == wanted


def test_conversations_that_cannot_teach_are_left_out_and_counted_and_none_left_is_an_error(bytes_tokenizer, caplog):
    rendered = prepare_conversations(PATHOLOGICAL, bytes_tokenizer, 30)
    assert (len(rendered), "1 of 5 conversations" in caplog.text) == (4, True)
    assert max(len(ids) for ids, _ in rendered) <= 31
    for T in range(5, 40):
        load = chat_loader(prepare_conversations([exchange("", "答"), *PATHOLOGICAL], bytes_tokenizer, T), T)
        assert all((next(load).targets >= 0).any(dim=1).all() for _ in range(10))
    refused("no tokens", loader, Docs([0, 0]))
    refused("no conversations", chat_loader, [])
    refused("none of 1 conversations", prepare_conversations, PATHOLOGICAL[:1], bytes_tokenizer, 30)
    refused("31 tokens, a row only 30", Packer, np.array([5, 31]), 30, cut=False, seed=0, buffer_docs=8)
    for bad in (([1, 2], [0, 0]), ([1], [1]), (list(range(18)), [0] + [1] * 17), ([1, 2, 3], [0, 1])):
        refused("conversation 1 ", chat_loader, [([1, 2], [0, 1]), bad])


def test_two_sources_by_weight_reach_the_trainer_in_that_ratio_of_tokens_not_bytes(tmp_path):
    rng, han = random.Random(0), "".join(map(chr, range(0x4E00, 0x4E60)))
    kinds = {"han": (han, 20, 80), "latin": ("abcdefghijklmnop", 50, 300)}
    texts = {k: ["".join(rng.choices(abc, k=rng.randint(*n))) for _ in range(2000)] for k, (abc, *n) in kinds.items()}
    tokenizer = Tokenizer.train(iter(texts["han"][:300] + texts["latin"][:300]), 600)
    worth = [len("".join(t).encode()) / len(tokenizer.encode_batch_flat(t)[0]) for t in texts.values()]
    assert abs(worth[0] / worth[1] - 1) > 0.1
    specs = [f"{write_jsonl(tmp_path / f'{k}.jsonl', texts[k])}@{weight}" for k, weight in (("han", 3), ("latin", 1))]
    store = prepare(specs, tokenizer, CPU)
    is_han = np.array([tokenizer.decode_bytes([i])[:1] >= b"\x80" for i in range(tokenizer.vocab_size)])
    options = {"batch_rows": 4, "sequence_len": 64, "bos_id": tokenizer.bos_id}
    batches = list(itertools.takewhile(lambda batch: batch.epoch == 0, document_loader(store, "train", **options)))
    ids = torch.cat([batch.inputs.flatten() for batch in batches]).numpy()
    shares = is_han[ids[ids != tokenizer.bos_id]].mean()
    assert shares / (1 - shares) == pytest.approx(3, rel=0.01)
