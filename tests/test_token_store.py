"""Token shards: all tokens come back, in the smallest type, reused only for the same text and tokenizer."""

from pathlib import Path

import numpy as np
import pytest

from nanozhchat import corpus, token_store
from nanozhchat.errors import DamagedError
from nanozhchat.sources import SPLITS
from nanozhchat.token_store import TokenStore
from tests.conftest import cut, refused, write_jsonl

TEXTS = [f"第{i}篇文档" + "好" * (i % 7) for i in range(300)]


class ByteTokenizer:
    """Ids are bytes plus an offset, so that any vocabulary size can be had; stops at a turn if told to."""

    def __init__(self, vocab_size=300, offset=0, hash="a" * 64, stop_at=None):
        self.vocab_size, self.offset, self.hash, self.stop_at = vocab_size, offset, hash, stop_at
        self.calls = 0

    def encode(self, text):
        return [b + self.offset for b in text.encode()]

    def encode_joined(self, data, offsets):
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        return np.frombuffer(data, np.uint8).astype(np.uint32) + self.offset, offsets.astype(np.uint64)


@pytest.fixture
def built(tmp_path):
    return build(tmp_path, TEXTS)


def build(tmp_path, texts):
    return corpus.build([str(write_jsonl(tmp_path / "in.jsonl", texts))], "c", progress=lambda _: None)


def tokenize(built, tokenizer=None):
    return token_store.tokenize(built, tokenizer or ByteTokenizer(), progress=lambda _: None)


def texts_of(store, split):
    return [bytes(store.doc(split, i).astype(np.uint8)).decode() for i in range(store.n_docs(split))]


@pytest.mark.parametrize("shard_tokens", [500, token_store.SHARD_TOKENS])
def test_the_tokens_of_every_document_come_back_and_are_counted(built, bytes_tokenizer, monkeypatch, shard_tokens):
    monkeypatch.setattr(token_store, "SHARD_TOKENS", shard_tokens)
    monkeypatch.setattr(corpus, "READ_ROWS", 5)
    store = tokenize(built)
    assert (len(store.manifest["shards"]) > 5) == (shard_tokens == 500)
    for split in SPLITS:
        assert texts_of(store, split) == list(built.documents(split))
        assert store.lengths(split).tolist() == [len(t.encode()) for t in built.documents(split)]
        assert store.n_tokens(split) == store.n_bytes(split) == store.lengths(split).sum()
    real = tokenize(built, bytes_tokenizer)
    found = [bytes_tokenizer.decode(real.doc("val", i).tolist()) for i in range(real.n_docs("val"))]
    assert found == list(built.documents("val"))


@pytest.mark.parametrize("turns", [3, 20, 40])
def test_tokenizing_that_was_killed_goes_on_and_ends_with_the_same_files(built, monkeypatch, turns):
    monkeypatch.setattr(token_store, "SHARD_TOKENS", 500)
    monkeypatch.setattr(corpus, "READ_ROWS", 3)
    store = tokenize(built)
    want = {path.name: path.read_bytes() for path in store.directory.iterdir()}
    store.directory.joinpath("manifest.json").unlink()
    again = ByteTokenizer()
    refused(None, lambda: tokenize(built, ByteTokenizer(stop_at=turns)), error=KeyboardInterrupt)
    store = tokenize(built, again)
    assert {path.name: path.read_bytes() for path in store.directory.iterdir()} == want
    assert turns == 3 or again.calls * corpus.READ_ROWS < 0.9 * len(TEXTS)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "<u2"), (65_535, "<u2"), (65_536, "<u4"), (200_000, "<u4")])
def test_ids_take_two_bytes_when_the_vocabulary_allows_and_none_may_lie_outside_it(built, vocab_size, dtype):
    tokenizer = ByteTokenizer(vocab_size, offset=vocab_size - 256)
    store = tokenize(built, tokenizer)
    assert store.manifest["dtype"] == dtype
    assert store.doc("train", 0).tolist() == tokenizer.encode(next(built.documents("train")))
    refused("vocab_size is 200", lambda: tokenize(built, ByteTokenizer(200, hash="b" * 64)))


def test_only_the_same_corpus_and_tokenizer_are_reused(built, tmp_path):
    again = ByteTokenizer()
    assert tokenize(built).directory == tokenize(built, again).directory
    assert again.calls == 0
    assert tokenize(built).directory != tokenize(built, ByteTokenizer(hash="b" * 64)).directory
    changed = build(tmp_path, [*TEXTS, "新的一篇"])
    assert texts_of(tokenize(changed), "train") == list(changed.documents("train"))


def objects(path):
    with open(path, "wb") as handle:
        np.save(handle, np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(("name", "harm", "error"), [
    ("train-00000.bin", lambda p: cut(p, 2), DamagedError), ("train-00000.idx", objects, DamagedError),
    ("train-00000.idx", lambda p: p.write_bytes((p.parent / "val-00000.idx").read_bytes()), DamagedError),
    ("manifest.json", Path.unlink, ValueError),
])  # fmt: skip
def test_a_damaged_store_is_refused_when_opened_and_made_again_when_tokenizing(built, name, harm, error):
    path = tokenize(built).directory / name
    whole = path.read_bytes()
    harm(path)
    refused("tokenize it first" if error is ValueError else name, lambda: TokenStore(path.parent), error=error)
    tokenize(built)
    assert path.read_bytes() == whole
