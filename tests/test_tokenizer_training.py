"""Training in groups of files, within a memory limit, across interruptions: always the same tokenizer."""

from functools import partial
from itertools import islice
from unittest.mock import Mock

import pytest

from nanozhchat import corpus, paths, sources
from nanozhchat.builtin import documents
from nanozhchat.conversation import SPECIAL_TOKENS
from nanozhchat.tokenizer import Tokenizer
from nanozhchat.tokenizer_training import train
from nanozhchat.vocabulary import common_characters, vocabulary_facts
from scripts import tok_train
from tests.conftest import refused, write_jsonl

SIZE = 1200
SMALL = 2**18  # bytes: less than the chunks of the text need, so that counts are spilled


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    folder, texts = tmp_path_factory.mktemp("text"), documents(3, split="train")
    for number in range(7):
        write_jsonl(folder / f"{number}.jsonl", list(islice(texts, 400)))
    return str(folder / "*.jsonl")


@pytest.fixture(scope="module")
def wanted(spec):
    return Tokenizer.train(sources.documents([spec], "train"), SIZE)


@pytest.mark.parametrize(("memory", "chunk_files", "threads"), [(SMALL, 1, 2), (SMALL, None, 1), (2**28, 3, 2)])
def test_memory_groups_and_threads_do_not_change_the_tokenizer(spec, wanted, tmp_path, memory, chunk_files, threads):
    got = train([spec], SIZE, "bpe", tmp_path, memory_bytes=memory, chunk_files=chunk_files, threads=threads)
    assert got.hash == wanted.hash
    assert got.trained_on == wanted.trained_on


def test_built_in_text_is_made_once_for_the_tokenizer_and_for_pretraining(base_dir, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "BUILTIN_BYTES", 200_000)
    tok_train.main(["--data=builtin", "--name=t", "--vocab-size=400"])
    read, said = Tokenizer.load(paths.tokenizer_dir("t")).trained_on, []
    made = corpus.build(["builtin"], corpus.name_of(["builtin"]), progress=said.append)
    assert ("reused" in said[0], read["bytes"]) == (True, made.n_bytes("train"))


def test_a_tokenizer_whose_files_have_changed_is_kept_and_said_to_be_old(tmp_path, capsys):
    text = write_jsonl(tmp_path / "a.jsonl", [f"第{i}篇，天地玄黄。" for i in range(300)])
    train_it = partial(tok_train.main, [f"--data={text}", "--name=t", "--vocab-size=275"])
    train_it()
    train_it()
    assert "its files have changed since" not in capsys.readouterr().out
    write_jsonl(text, ["宇宙洪荒"] * 9)
    train_it()
    assert "its files have changed since" in capsys.readouterr().out


def test_a_run_killed_again_and_again_ends_with_the_same_tokenizer(spec, wanted, tmp_path):
    options = {"memory_bytes": SMALL, "chunk_files": 2, "threads": 1}
    for kills in range(99):
        (tmp_path / "left-over.counts").write_bytes(b"\xff" * 9)  # what a kill in the middle of writing leaves
        try:
            got = train([spec], SIZE, "bpe", tmp_path, progress=Mock(side_effect=[None, KeyboardInterrupt]), **options)
            break
        except KeyboardInterrupt:
            assert kills < 50
    assert (kills >= 3, got.hash) == (True, wanted.hash)


def test_counts_are_not_made_again_unless_data_or_settings_changed(spec, tmp_path, capsys):
    for kind, said in (("bpe", ""), ("bpe", "going on after 2 of 2 groups"), ("char", "counting from the start")):
        got = train([spec], 800, kind, tmp_path, memory_bytes=2**26, chunk_files=4)
        assert got.hash == Tokenizer.train(sources.documents([spec], "train"), 800, kind).hash
        assert said in capsys.readouterr().out
    refused("has a weight", train, [f"{spec}@2"], SIZE, "bpe", tmp_path, memory_bytes=SMALL)


def test_vocabulary_facts_of_a_known_vocabulary_and_the_table_of_common_characters_is_whole():
    tokenizer = Tokenizer.train(["的的的一一"], 260 + len(SPECIAL_TOKENS), "char")  # two merges for each character
    want = {"common_3500_frac": 2 / 3500, "common_8105_frac": 2 / 8105, "word_tokens_frac": 0}
    want |= {"character_tokens_frac": (128 + 2) / 260, "unused_frac": 1 - 1 / 260}  # ASCII is single bytes
    assert vocabulary_facts(tokenizer, ["的"]) == want
    level_one, table = common_characters()
    assert (len(level_one), len(set(table)), table[:10]) == (3500, 8105, "一乙二十丁厂七卜八人")
    assert all("\u3400" <= c <= "\U000323af" for c in table)
