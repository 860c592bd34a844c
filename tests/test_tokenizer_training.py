"""Training in groups of files, within a memory limit, across interruptions: always the same tokenizer."""

import json

import pytest

from nanozhchat import sources
from nanozhchat.builtin import documents
from nanozhchat.conversation import SPECIAL_TOKENS
from nanozhchat.tokenizer import Tokenizer
from nanozhchat.tokenizer_training import finish, train
from nanozhchat.vocabulary import common_characters, vocabulary_facts

SIZE = 1200
SMALL = 2**18  # bytes: less than the chunks of the text need, so that counts are spilled


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    folder, texts = tmp_path_factory.mktemp("text"), documents(3, split="train")
    for number in range(7):
        lines = [json.dumps({"text": next(texts)}) for _ in range(400)]
        (folder / f"{number}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder / "*.jsonl")


@pytest.fixture(scope="module")
def wanted(spec):
    return Tokenizer.train(sources.documents([spec], "train"), SIZE)


class Killed(Exception):
    """The end of a run that nobody handles."""


def killed_after(calls):
    """A progress callback that ends the run at its n-th call."""
    seen = iter(range(calls))

    def progress(stage, done, total):
        if next(seen, None) is None:
            raise Killed

    return progress


@pytest.mark.parametrize(("memory", "chunk_files", "threads"), [(SMALL, 1, 2), (SMALL, None, 1), (2**28, 3, 2)])
def test_memory_groups_and_threads_do_not_change_the_tokenizer(spec, wanted, tmp_path, memory, chunk_files, threads):
    got = train([spec], SIZE, "bpe", tmp_path, memory_bytes=memory, chunk_files=chunk_files, threads=threads)
    assert got.hash == wanted.hash
    assert got.trained_on == wanted.trained_on


def test_a_run_killed_again_and_again_ends_with_the_same_tokenizer(spec, wanted, tmp_path):
    kills = 0
    while True:
        (tmp_path / "left-over.counts").write_bytes(b"\xff" * 9)  # what a kill in the middle of writing leaves
        try:
            got = train([spec], SIZE, "bpe", tmp_path, memory_bytes=SMALL, chunk_files=2, threads=1,
                        progress=killed_after(1))  # fmt: skip
            break
        except Killed:
            kills += 1
    assert kills >= 3
    assert got.hash == wanted.hash
    finish(tmp_path)
    assert not tmp_path.exists()


def test_counts_of_other_data_or_settings_are_not_gone_on_from(spec, tmp_path, capsys):
    for kind in ("bpe", "char"):
        got = train([spec], 800, kind, tmp_path, memory_bytes=2**26, chunk_files=4)
        assert got.hash == Tokenizer.train(sources.documents([spec], "train"), 800, kind).hash
    assert "counting from the start" in capsys.readouterr().out


def test_groups_that_were_counted_are_not_read_again(spec, tmp_path, capsys):
    for _ in range(2):
        train([spec], 600, "bpe", tmp_path, memory_bytes=2**26, chunk_files=4)
    assert "going on after 2 of 2 groups" in capsys.readouterr().out


def test_weights_cannot_be_kept_in_groups(spec, tmp_path):
    with pytest.raises(ValueError, match="has a weight"):
        train([f"{spec}@2"], SIZE, "bpe", tmp_path, memory_bytes=SMALL)


def test_the_table_of_common_characters_is_whole():
    level_one, table = common_characters()
    assert (len(level_one), len(set(table))) == (3500, 8105)
    assert table.startswith("一乙二十丁厂七卜八人")
    assert all("\u3400" <= c <= "\U000323af" for c in table)


def test_vocabulary_facts_of_a_known_vocabulary():
    tokenizer = Tokenizer.train(["的的的一一"], 260 + len(SPECIAL_TOKENS), "char")  # two merges for each character
    assert vocabulary_facts(tokenizer, ["的"]) == {
        "common_3500_frac": 2 / 3500,
        "common_8105_frac": 2 / 8105,
        "character_tokens_frac": (128 + 2) / 260,  # ASCII is single bytes
        "word_tokens_frac": 0,
        "unused_frac": 1 - 1 / 260,
    }
