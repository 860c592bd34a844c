"""Token shards: all tokens come back, in the smallest type, reused only for the same text and tokenizer."""

import numpy as np
import pytest

from nanozhchat import corpus, token_store
from nanozhchat.errors import DamagedError
from nanozhchat.sources import SPLITS
from nanozhchat.token_store import TokenStore
from tests.conftest import write_jsonl

TEXTS = [f"第{i}篇文档" + "好" * (i % 7) for i in range(300)]


class ByteTokenizer:
    """Ids are bytes plus an offset, so that any vocabulary size can be had."""

    def __init__(self, vocab_size=300, offset=0, hash="a" * 64):
        self.vocab_size, self.offset, self.hash = vocab_size, offset, hash
        self.calls = 0

    def encode(self, text):
        return [b + self.offset for b in text.encode()]

    def stopping_after(self, turns):
        def encode(data, offsets):
            if self.calls == turns:
                raise KeyboardInterrupt
            return ByteTokenizer.encode_joined(self, data, offsets)

        return encode

    def encode_joined(self, data, offsets):
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
    for i in range(store.n_docs(split)):
        yield bytes(store.doc(split, i).astype(np.uint8)).decode()


def test_the_tokens_of_every_document_come_back_and_are_counted(built):
    store = tokenize(built)
    for split in SPLITS:
        assert list(texts_of(store, split)) == list(built.documents(split))
        assert store.lengths(split).tolist() == [len(t.encode()) for t in built.documents(split)]
        assert store.n_tokens(split) == store.n_bytes(split) == store.lengths(split).sum()


def test_many_shards_hold_the_same_as_one(built, monkeypatch):
    monkeypatch.setattr(token_store, "SHARD_TOKENS", 500)
    monkeypatch.setattr(corpus, "READ_ROWS", 5)
    store = tokenize(built)
    assert len(store.manifest["shards"]) > 5
    assert list(texts_of(store, "train")) == list(built.documents("train"))
    assert sum(store.lengths("train")) == store.n_tokens("train")


@pytest.mark.parametrize("turns", [3, 20, 40])
def test_tokenizing_that_was_killed_goes_on_and_ends_with_the_same_files(built, monkeypatch, turns):
    monkeypatch.setattr(token_store, "SHARD_TOKENS", 500)
    monkeypatch.setattr(corpus, "READ_ROWS", 3)
    store = tokenize(built)
    want = {path.name: path.read_bytes() for path in store.directory.iterdir()}
    store.directory.joinpath("manifest.json").unlink()
    first, again = ByteTokenizer(), ByteTokenizer()
    monkeypatch.setattr(first, "encode_joined", first.stopping_after(turns))
    with pytest.raises(KeyboardInterrupt):
        tokenize(built, first)
    store = tokenize(built, again)
    assert {path.name: path.read_bytes() for path in store.directory.iterdir()} == want
    assert turns == 3 or again.calls * corpus.READ_ROWS < 0.9 * len(TEXTS)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "<u2"), (65_535, "<u2"), (65_536, "<u4"), (200_000, "<u4")])
def test_ids_take_two_bytes_when_the_vocabulary_allows(built, vocab_size, dtype):
    tokenizer = ByteTokenizer(vocab_size, offset=vocab_size - 256)
    store = tokenize(built, tokenizer)
    assert store.manifest["dtype"] == dtype
    first = next(built.documents("train"))
    assert store.doc("train", 0).tolist() == tokenizer.encode(first)


def test_an_id_outside_the_vocabulary_is_refused(built):
    with pytest.raises(ValueError, match="vocab_size is 200"):
        tokenize(built, ByteTokenizer(200))


def test_only_the_same_corpus_and_tokenizer_are_reused(built, tmp_path):
    again = ByteTokenizer()
    assert tokenize(built).directory == tokenize(built, again).directory
    assert again.calls == 0
    assert tokenize(built).directory != tokenize(built, ByteTokenizer(hash="b" * 64)).directory
    changed = build(tmp_path, [*TEXTS, "新的一篇"])
    assert list(texts_of(tokenize(changed), "train")) == list(changed.documents("train"))


def test_a_file_cut_short_is_refused_when_opened_and_made_again_when_tokenizing(built):
    store = tokenize(built)
    path = store.directory / "train-00000.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(DamagedError, match=r"train-00000\.bin"):
        TokenStore(store.directory)
    tokenize(built)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("objects", [True, False])
def test_an_index_of_another_shard_or_of_python_objects_is_refused(built, objects):
    store = tokenize(built)
    if objects:
        with open(store.directory / "train-00000.idx", "wb") as handle:
            np.save(handle, np.array([{}], dtype=object), allow_pickle=True)
    else:
        (store.directory / "train-00000.idx").write_bytes((store.directory / "val-00000.idx").read_bytes())
    with pytest.raises(DamagedError, match=r"train-00000\.idx"):
        TokenStore(store.directory)


def test_a_folder_without_a_manifest_is_no_store(built):
    store = tokenize(built)
    (store.directory / "manifest.json").unlink()
    with pytest.raises(ValueError, match="tokenize it first"):
        TokenStore(store.directory)


def test_the_real_tokenizer_gives_back_the_text(built):
    from nanozhchat.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(built.documents("train"), 270)
    store = token_store.tokenize(built, tokenizer, progress=lambda _: None)
    found = [tokenizer.decode(store.doc("train", i).tolist()) for i in range(store.n_docs("train"))]
    assert found == list(built.documents("train"))
