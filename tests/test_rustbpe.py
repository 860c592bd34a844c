"""The Rust trainer and encoder against slow twins, other libraries, and hostile text."""

import ast
import inspect
import random
import threading
import time
from unittest.mock import Mock

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

import rustbpe
from rustbpe import BPE, BPE_PATTERN, CHAR_PATTERN
from tests.conftest import ROOT, refused
from tests.reference import bpe as reference

CHINESE = ["天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。", "寒来暑往，秋收冬藏。闰余成岁，律吕调阳。",
           "他说：“我们明天去学校，好吗？”她说：“好！”"]  # fmt: skip
MIXED = ["GPT-4 在2026年的价格是 $3.50，don't worry!\n\n", "  缩进    return x\r\n\tif a == b:\n",
         "日本語のテキスト、한국어 텍스트"]  # fmt: skip
HOSTILE = ["", "a", "a" * 16, "\x00\x00\x00", "é\u0301\u0301", "👨‍👩‍👧‍👦❤️", "abababababa", "𠀀𠀁𠀀𠀁",
           "'s'S'll'LL", " " * 30]  # fmt: skip
ALPHABET = "的一是不了我，。：“” \t\n\r\u3000aAbsdlve'12½〇々é\u0301ーがᄒ한😀\u200d\ufe0f\x00\x85\xa0<|end|>"
texts = st.one_of(st.text(alphabet=ALPHABET, max_size=60), st.text(max_size=40))


@pytest.fixture(scope="module")
def bpe():
    return BPE.train((CHINESE + MIXED + HOSTILE) * 2, 400)


@pytest.mark.parametrize("pattern", ["bpe", "char"])
@settings(max_examples=30)
@given(docs=st.lists(st.text(alphabet="ab的一，\n", max_size=40), max_size=6).filter(any))
@example(docs=CHINESE)
@example(docs=MIXED)
@example(docs=CHINESE + MIXED + HOSTILE)
def test_training_equals_the_reference(docs, pattern):
    want = reference.train(docs, 300, BPE_PATTERN if pattern == "bpe" else CHAR_PATTERN)
    assert BPE.train(docs, 256 + len(want), pattern).merges() == want


@settings(max_examples=30)
@given(docs=st.lists(st.text(alphabet="ab的一，了é\n", max_size=20), max_size=3).filter(any))
def test_covered_characters_come_first_as_if_each_stood_alone_more_often_than_there_is_text(docs):
    often = 1 + sum(len(doc.encode()) for doc in docs)
    want = reference.train([*docs, *sorted(set("".join(docs))) * often], 300, BPE_PATTERN)
    assert BPE.train(docs, 256 + len(want), coverage=1.0).merges() == want


def test_coverage_takes_the_most_frequent_characters_and_counts_only_what_stands_in_the_text():
    docs = ["春天" * 40 + "，" + "夏" * 5, "秋"]

    def learnt(size, share):
        tokens = BPE.train(docs, size, coverage=share).ranks()[256:]
        return [text for text in ("春", "天", "夏", "秋", "，", "春天") if text.encode() in tokens]

    assert learnt(261, 0.0) == ["春", "天", "春天"]
    assert learnt(261, 0.95) == ["春", "天", "夏"]
    assert learnt(262, 0.95) == ["春", "天", "夏", "春天"]
    assert learnt(265, 1.0) == ["春", "天", "夏", "秋", "，"]
    assert BPE.train(docs, 262, coverage=0.95).counts == [45, 40, 40, 40, 5, 40]
    refused("coverage=1.5", lambda: BPE.train(docs, 262, coverage=1.5))


@settings(max_examples=400)
@given(text=st.text(alphabet=ALPHABET, max_size=80))
def test_the_scanner_cuts_as_the_regex_does(bpe, text):
    assert bpe.split(text) == regex.findall(BPE_PATTERN, text)


@settings(max_examples=400)
@given(text=st.text(max_size=80))
@pytest.mark.parametrize("pattern", ["bpe", "char", r"\w+", "", r"(?=b)a|\s"])
def test_no_pattern_loses_text(pattern, text):
    tokenizer = BPE.from_ranks([bytes([byte]) for byte in range(256)], pattern)
    assert "".join(tokenizer.split(text)) == text


def test_a_pattern_that_gives_up_raises_instead_of_losing_text():
    tokenizer = BPE.from_ranks([bytes([byte]) for byte in range(256)], r"(x+x+)+(?=\1z)y")
    refused("split pattern failed", lambda: tokenizer.encode("x" * 64 + "yz"))


def test_the_number_of_threads_does_not_change_the_merges():
    rng = random.Random(1)
    docs = ["".join(rng.choices("的一是不了人我在，。ab ", k=200)) for _ in range(20_000)]
    one = BPE.train(docs, 3000, threads=1)
    assert BPE.train(docs, 3000, threads=2).merges() == one.merges()
    assert BPE.train(reversed(docs), 3000, threads=3).merges() == one.merges()
    assert one.encode_batch_flat(docs, threads=3) == one.encode_batch_flat(docs, threads=1)


def test_batches_equal_single_texts(bpe):
    docs = CHINESE + MIXED + HOSTILE
    single = [bpe.encode(doc) for doc in docs]
    assert bpe.encode_batch(docs) == single
    flat = bpe.encode_batch_flat(docs)
    ids, offsets = np.frombuffer(flat[0], "<u4"), np.frombuffer(flat[1], "<u8")
    assert [ids[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)] == single
    assert bpe.encode_batch_flat([]) == (b"", bytes(8))
    ends = np.cumsum([0, *(len(doc.encode()) for doc in docs)]).astype("<i8")
    assert bpe.encode_joined("".join(docs).encode(), ends.tobytes()) == bpe.encode_batch_flat(docs)
    for wrong in ([0, 1], [0, 4], [3, 0], [-1, 3]):
        refused("offsets do not fit", bpe.encode_joined, "好".encode(), np.array(wrong, "<i8").tobytes())


@settings(max_examples=300)
@given(data=st.binary(max_size=200), text=texts)
def test_any_bytes_survive_the_round_trip_and_those_of_a_text_encode_as_the_text(bpe, data, text):
    assert bpe.decode_bytes(bpe.encode_bytes(data)) == data
    assert bpe.encode_bytes(text.encode()) == bpe.encode(text)


def test_half_surrogate_pairs_become_the_replacement_character(bpe):
    assert bpe.decode_bytes(bpe.encode("a\ud800b\udc00\ud83d\ude00")).decode() == "a\ufffdb\ufffd😀"
    assert BPE.train(["\ud800\ud800"], 258).stats["bytes"] == 6


@pytest.mark.parametrize("char", ["a", "的", " ", "\n", "。", "\u0301", "é", "😀"])
def test_a_mebibyte_of_one_character_is_fast(bpe, char):
    text = char * (2**20 // len(char.encode()))
    started = time.process_time()
    ids = bpe.encode(text)
    assert time.process_time() - started < 2
    assert bpe.decode_bytes(ids) == text.encode()


def test_a_vocabulary_larger_than_the_text_says_what_the_text_can_give():
    error = refused("at most 258 tokens; pass --vocab-size=258 or give more text", BPE.train, ["aaaa"], 300)
    assert error.reached == 258
    assert BPE.train(["aaaa"], 258).vocab_size == 258


def test_what_cannot_be_trained_on_or_decoded_is_an_error_that_says_why(bpe):
    for docs in ([], ["", ""]):
        refused("no text", BPE.train, docs, 300, "bpe")
    for size in (0, 255, 2**31 + 1, 2**40):
        refused(f"vocab_size={size}", BPE.train, ["abc"], size, "bpe")
    refused("neither a known name", BPE.train, ["abc"], 300, "(")
    refused("document 1 is bytes, expected a str", BPE.train, ["abc", b"abc"], 300, "bpe")
    for i in (-1, 400, 2**40):
        refused(f"id {i} is not|{i}", bpe.decode_bytes, [i])
    ranks = [bytes([byte]) for byte in range(256)]
    for damaged, message in ((ranks[:-1], "byte 0xff"), ([*ranks, b""], "no bytes"), ([*ranks, b"a"], "same bytes")):
        refused(message, BPE.from_ranks, damaged)


def test_what_the_documents_or_the_callback_raise_comes_through():
    refused(None, lambda: BPE.train((doc if doc else 1 / 0 for doc in ("abc", "")), 300), error=ZeroDivisionError)
    refused(None, BPE.train, ["abcabc"], 257, progress=Mock(side_effect=KeyboardInterrupt), error=KeyboardInterrupt)


def test_other_threads_run_while_a_batch_is_encoded(bpe):
    worker = threading.Thread(target=bpe.encode_batch, args=(["的一是不了" * 200_000] * 2,))
    worker.start()
    turns = 0
    while worker.is_alive():
        turns += 1
        time.sleep(0.001)
    assert turns > 3


def test_ranks_rebuild_the_same_tokenizer(bpe):
    again = BPE.from_ranks(bpe.ranks(), bpe.pattern)
    assert (again.merges(), again.pattern, again.ranks()) == (bpe.merges(), bpe.pattern, bpe.ranks())
    assert len(set(bpe.ranks())) == bpe.vocab_size


def test_the_stub_file_names_what_the_module_has_with_the_same_arguments():
    tree = ast.parse((ROOT / "rustbpe" / "rustbpe.pyi").read_text(encoding="utf-8"))
    [cls] = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    named = {
        getattr(n, "name", None) or n.target.id for n in tree.body if isinstance(n, (ast.AnnAssign, ast.FunctionDef))
    }
    assert named | {cls.name} == {name for name in vars(rustbpe) if not name.startswith("_") and name != "rustbpe"}
    methods = {node.name: node for node in cls.body if isinstance(node, ast.FunctionDef)}
    assert set(methods) == {name for name in vars(BPE) if not name.startswith("_")}
    for name, node in methods.items():
        if callable(built := getattr(BPE, name)):
            parameters = [p for p in inspect.signature(built).parameters.values() if p.name != "self"]
            assert [p.name for p in parameters] == [a.arg for a in node.args.args if a.arg != "self"], name
            defaults = [p.default for p in parameters if p.default is not inspect.Parameter.empty]
            assert defaults == [ast.literal_eval(d) for d in node.args.defaults], name
