"""Token shards: all tokens come back, in the smallest type, reused only for the same text and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nanozhchat import corpus, token_store
from nanozhchat.errors import DamagedError
from nanozhchat.token_store import TokenStore

TEXTS = [f"第{i}篇文档" + "好" * (i % 7) for i in range(300)]


class ByteTokenizer:
    """Ids are bytes plus an offset, so that any vocabulary size can be had."""

    def __init__(self, vocab_size: int = 300, offset: int = 0, hash: str = "a" * 64) -> None:
        self.vocab_size, self.offset, self.hash = vocab_size, offset, hash
        self.calls = 0

    def encode(self, text: str) -> list[int]:
        return [b + self.offset for b in text.encode()]

    def encode_batch_flat(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        self.calls += 1
        rows = [self.encode(text) for text in texts]
        return np.array(sum(rows, []), np.uint32), np.cumsum([0, *map(len, rows)]).astype(np.uint64)


@pytest.fixture
def built(tmp_path: Path) -> corpus.Corpus:
    return build(tmp_path, TEXTS)


def build(tmp_path: Path, texts: list[str]) -> corpus.Corpus:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return corpus.build([str(path)], "c", progress=lambda _: None)


def tokenize(built: corpus.Corpus, tokenizer: ByteTokenizer | None = None) -> TokenStore:
    return token_store.tokenize(built, tokenizer or ByteTokenizer(), progress=lambda _: None)


def texts_of(store: TokenStore, split: str) -> Iterator[str]:
    for i in range(store.n_docs(split)):
        yield bytes(store.doc(split, i).astype(np.uint8)).decode()


def test_the_tokens_of_every_document_come_back(built: corpus.Corpus) -> None:
    store = tokenize(built)
    for split in token_store.SPLITS:
        assert list(texts_of(store, split)) == list(built.documents(split))


def test_counts_agree_with_the_documents(built: corpus.Corpus) -> None:
    store = tokenize(built)
    for split in token_store.SPLITS:
        lengths = [len(store.doc(split, i)) for i in range(store.n_docs(split))]
        assert store.lengths(split).tolist() == lengths
        assert store.n_tokens(split) == sum(lengths) == store.n_bytes(split)


def test_many_shards_hold_the_same_as_one(built: corpus.Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "SHARD_TOKENS", 500)
    monkeypatch.setattr(token_store, "BATCH_CHARS", 60)
    store = tokenize(built)
    assert len(store.manifest["shards"]) > 5
    assert list(texts_of(store, "train")) == list(built.documents("train"))
    assert sum(store.lengths("train")) == store.n_tokens("train")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "<u2"), (65_535, "<u2"), (65_536, "<u4"), (200_000, "<u4")])
def test_ids_take_two_bytes_when_the_vocabulary_allows(built: corpus.Corpus, vocab_size: int, dtype: str) -> None:
    tokenizer = ByteTokenizer(vocab_size, offset=vocab_size - 256)
    store = tokenize(built, tokenizer)
    assert store.manifest["dtype"] == dtype
    first = next(built.documents("train"))
    assert store.doc("train", 0).tolist() == tokenizer.encode(first)


def test_an_id_outside_the_vocabulary_is_refused(built: corpus.Corpus) -> None:
    with pytest.raises(ValueError, match="vocab_size is 200"):
        tokenize(built, ByteTokenizer(200))


def test_the_same_corpus_and_tokenizer_are_reused(built: corpus.Corpus) -> None:
    tokenize(built)
    again = ByteTokenizer()
    tokenize(built, again)
    assert again.calls == 0


def test_another_tokenizer_gets_its_own_folder(built: corpus.Corpus) -> None:
    assert tokenize(built).directory != tokenize(built, ByteTokenizer(hash="b" * 64)).directory


def test_a_changed_corpus_is_tokenized_again(built: corpus.Corpus, tmp_path: Path) -> None:
    tokenize(built)
    changed = build(tmp_path, [*TEXTS, "新的一篇"])
    assert list(texts_of(tokenize(changed), "train")) == list(changed.documents("train"))


def test_a_file_cut_short_is_refused_when_opened_and_made_again_when_tokenizing(built: corpus.Corpus) -> None:
    store = tokenize(built)
    path = store.directory / "train-00000.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(DamagedError, match=r"train-00000\.bin"):
        TokenStore.open(store.directory)
    tokenize(built)
    assert path.read_bytes() == whole


def test_an_index_of_another_shard_is_refused(built: corpus.Corpus) -> None:
    store = tokenize(built)
    (store.directory / "train-00000.idx").write_bytes((store.directory / "val-00000.idx").read_bytes())
    with pytest.raises(DamagedError, match=r"train-00000\.idx"):
        TokenStore.open(store.directory)


def test_an_index_that_holds_python_objects_is_refused(built: corpus.Corpus) -> None:
    store = tokenize(built)
    np.save(store.directory / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    (store.directory / "x.npy").rename(store.directory / "train-00000.idx")
    with pytest.raises(DamagedError, match=r"train-00000\.idx"):
        TokenStore.open(store.directory)


def test_verify_finds_one_flipped_bit(built: corpus.Corpus) -> None:
    store = tokenize(built)
    assert store.verify() == []
    path = store.directory / "train-00000.bin"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(bytes(data))
    assert [p["file"] for p in store.verify()] == [str(path)]


def test_a_folder_without_a_manifest_is_no_store(built: corpus.Corpus) -> None:
    store = tokenize(built)
    (store.directory / "manifest.json").unlink()
    with pytest.raises(ValueError, match="tokenize it first"):
        TokenStore.open(store.directory)


def test_documents_outside_the_store_are_an_index_error(built: corpus.Corpus) -> None:
    store = tokenize(built)
    for index in (-1, store.n_docs("val")):
        with pytest.raises(IndexError):
            store.doc("val", index)


def test_the_real_tokenizer_gives_back_the_text(built: corpus.Corpus) -> None:
    from nanozhchat.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(built.documents("train"), 270)
    store = token_store.tokenize(built, tokenizer, progress=lambda _: None)
    found = [tokenizer.decode(store.doc("train", i).tolist()) for i in range(store.n_docs("train"))]
    assert found == list(built.documents("train"))
