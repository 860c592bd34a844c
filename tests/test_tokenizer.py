"""The tokenizer: files, special tokens, conversations, streams; the same ids as tiktoken and Hugging Face."""

import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe
from tokenizers import Tokenizer as HuggingFace

from nanozhchat.builtin import documents
from nanozhchat.conversation import SPECIAL_TOKENS, Message, make_conversation
from nanozhchat.errors import DamagedError
from nanozhchat.tokenizer import StreamDecoder, Tokenizer
from tests.conftest import cut, pack, refused

SAID = (("system", "你是小助手。"), ("user", "你好！"), ("assistant", "你好，有什么事？"), ("user", "今天星期几？"),
        ("assistant", "我不知道。"))  # fmt: skip
CHAT = [{"role": role, "content": content} for role, content in SAID]
BLOCKS = [  # code points that every library has long known
    (0x00, 0x7F), (0x80, 0x24F), (0x300, 0x36F), (0x391, 0x3A1), (0x410, 0x44F), (0x5D0, 0x5EA), (0x627, 0x64A),
    (0x905, 0x939), (0xE01, 0xE3A), (0x2000, 0x206F), (0x2150, 0x218B), (0x2460, 0x24FF), (0x3000, 0x303F),
    (0x3041, 0x3096), (0x30A1, 0x30FA), (0x3400, 0x4DB5), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xE000, 0xE0FF),
    (0xF900, 0xFA6D), (0xFE00, 0xFE0F), (0xFF01, 0xFF5E), (0x1F300, 0x1F5FF), (0x1F600, 0x1F64F), (0x20000, 0x2A6D6),
]  # fmt: skip
PIECES = [
    "的", "中国人民", "，", "。", "：“", "！？", " ", "  ", "\n", "\r\n", "\t", "\u3000\u3000", "don't", " the", "'LL",
    "3.14", "２０２６", "〇", "々", "❤️", "👨‍👩‍👧", "é", "e\u0301", "\u0301", "\x00", "\x7f", "\u200b", "\ufeff",
    "\ufffd", "<|end|>", "http://a.b/c?d=e",
]  # fmt: skip


@pytest.fixture(scope="module")
def text():
    stream = documents(0, split="train")
    return [next(stream) for _ in range(600)]


@pytest.fixture(scope="module")
def tokenizer(text):
    return Tokenizer.train([*text, *varied_lines(500, seed=1)], 2000)


def varied_lines(n, seed):
    """Lines of Chinese, other scripts, emoji, controls, combining marks and line ends, in any order."""
    rng = random.Random(seed)

    def piece():
        first, last = rng.choice(BLOCKS)
        return rng.choice(PIECES) if rng.random() < 0.6 else chr(rng.randint(first, last)) * rng.choice([1, 1, 2, 5])

    return ["".join(piece() for _ in range(rng.randrange(24))) for _ in range(n)]


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_ids_equal_those_of_tiktoken_and_hugging_face(kind, tokenizer, text, tmp_path):
    ours = tokenizer if kind == "bpe" else Tokenizer.train(text, 800, "char")
    ours.save(tmp_path)
    lines = [line.replace("<|end|>", "<|End|>") for line in varied_lines(5000, seed=2)] + text[:50]
    ids = ours.encode_batch(lines)
    encoding, hugging_face = ours.to_tiktoken(), HuggingFace.from_file(str(tmp_path / "tokenizer.json"))
    assert ids == [encoding.encode_ordinary(line) for line in lines]
    assert ids == [found.ids for found in hugging_face.encode_batch(lines)]
    for line, found in zip(lines[:500], ids[:500], strict=True):
        assert ours.decode(found) == encoding.decode(found) == hugging_face.decode(found) == line
    assert hugging_face.get_vocab_size() == encoding.n_vocab == ours.vocab_size
    for i, name in enumerate(SPECIAL_TOKENS, start=ours.vocab_size - len(SPECIAL_TOKENS)):
        assert ours.special(name) == hugging_face.token_to_id(name) == encoding.encode_single_token(name) == i
    if kind == "char":  # a token never crosses a character
        assert all(sum(b & 0xC0 != 0x80 for b in token) <= 1 for token in encoding.token_byte_values())


def test_loading_gives_back_what_was_saved_here_and_in_other_libraries(tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer.save(tmp_path)
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for line in (line.replace("<|end|>", "") for line in varied_lines(300, seed=3)):
        assert fast.encode(line, add_special_tokens=False) == tokenizer.encode(line)
    again, lines = Tokenizer.load(tmp_path), varied_lines(200, seed=4)
    for name in ("hash", "kind", "pattern", "trained_on", "vocab_size"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert again.encode_batch(lines) == tokenizer.encode_batch(lines)
    ranks = load_tiktoken_bpe(str(tmp_path / "ranks.tiktoken"))
    assert ranks == tokenizer.to_tiktoken()._mergeable_ranks


def reword(path):
    pack(path, path.read_bytes().replace(b"format_version", b"format_versions").replace(b"BPE", b"BPF"))


@pytest.mark.parametrize("name", ["meta.json", "tokenizer.json"])
@pytest.mark.parametrize("harm", [reword, partial(cut, n=100), partial(pack, data=b""), Path.unlink])
def test_every_damage_to_the_files_is_found(tokenizer, tmp_path, name, harm):
    tokenizer.save(tmp_path)
    harm(tmp_path / name)
    refused("scripts.tok_train", Tokenizer.load, tmp_path, error=(DamagedError, FileNotFoundError))


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_control_strings_in_text_stay_text(tokenizer, name):
    hostile = f"{name}你好{name}"
    controls = {tokenizer.special(n) for n in SPECIAL_TOKENS}
    assert not controls & set(tokenizer.encode(hostile))
    assert not controls & set(tokenizer.encode_batch([hostile])[0])
    assert tokenizer.decode(tokenizer.encode(hostile)) == hostile
    plain = tokenizer.render([{"role": "user", "content": "好"}])[0]
    attack = tokenizer.render([{"role": "user", "content": hostile}])[0]
    assert [i for i in attack if i in controls] == [i for i in plain if i in controls]


def test_token_bytes_counts_utf8_bytes_and_no_special_tokens(tokenizer, text):
    lengths, n = tokenizer.token_bytes(), len(SPECIAL_TOKENS)
    assert (lengths.dtype, lengths.shape) == (np.int32, (tokenizer.vocab_size,))
    assert (lengths[:-n].min(), lengths[-n:].any()) == (1, False)
    assert lengths[tokenizer.encode(text[0])].sum() == len(text[0].encode())


def test_a_rendered_conversation_follows_the_template_and_a_prompt_is_its_beginning(tokenizer):
    ids, mask = tokenizer.render(CHAT)
    want = "<|bos|><|system|>你是小助手。<|end|><|user|>你好！<|end|><|assistant|>你好，有什么事？<|end|>"
    want += "<|user|>今天星期几？<|end|><|assistant|>我不知道。<|end|>"
    assert tokenizer.decode(ids, show_special=True) == want
    assert tokenizer.decode(ids) == "".join(m["content"] for m in CHAT)
    learnt = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(learnt, show_special=True) == "你好，有什么事？<|end|>我不知道。<|end|>"
    prompt = tokenizer.render_prompt(CHAT[:-1])
    assert (ids[: len(prompt)], prompt[-1]) == (prompt, tokenizer.special("<|assistant|>"))
    assert mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]
    assert tokenizer.render_prompt(make_conversation(CHAT[:-1])) == prompt
    refused("must end with the user's", tokenizer.render_prompt, CHAT)


def test_calls_of_tools_are_learnt_and_what_tools_answer_is_not(tokenizer):
    called = [CHAT[1], Message("assistant", "算一下。", "3+5"), Message("tool", "8<|end|>"), CHAT[4]]
    ids, mask = tokenizer.render(called)
    want = "<|bos|><|user|>你好！<|end|><|assistant|>算一下。<|tool_call|>3+5<|end|><|tool_result|>8<|end|><|end|>"
    assert tokenizer.decode(ids, show_special=True) == want + "<|assistant|>我不知道。<|end|>"
    learnt = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(learnt, show_special=True) == "算一下。<|tool_call|>3+5<|end|>我不知道。<|end|>"
    last = [CHAT[3], CHAT[4]]  # an exchange is dropped with its calls
    assert tokenizer.render([*called, *last], max_tokens=len(ids)) == tokenizer.render(last)
    assert tokenizer.render_prompt(called[:3]) == ids[: len(tokenizer.render_prompt(called[:3]))]


@settings(max_examples=150)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=9), system=st.booleans(), limit=st.integers(1, 200))
def test_long_conversations_lose_whole_turns_first_and_never_raise(tokenizer, lengths, system, limit):
    turns = [Message("assistant" if i % 2 else "user", "字" * n) for i, n in enumerate(lengths)]
    first = [Message("system", "规则")] * system
    ids, mask = tokenizer.render([*first, *turns], max_tokens=limit)
    assert len(ids) == len(mask) <= limit
    shorter = [tokenizer.render([*first, *turns[drop:]]) for drop in range(0, len(turns), 2)]
    if fitting := [rendered for rendered in shorter if len(rendered[0]) <= limit]:
        assert (ids, mask) == fitting[0]
    else:
        last_pair = turns[(len(turns) - 1) // 2 * 2 :] if len(turns) > 2 else turns
        assert ids == tokenizer.render([*first, *last_pair])[0][:limit]


def test_a_long_prompt_keeps_the_question_and_the_system_message(tokenizer):
    turns = CHAT[:1] + CHAT[1:3] * 50 + CHAT[3:4]
    ids = tokenizer.render_prompt(turns, max_tokens=100)
    shown = tokenizer.decode(ids, show_special=True)
    assert len(ids) <= 100
    assert shown.startswith("<|bos|><|system|>你是小助手。<|end|><|user|>你好！")
    assert shown.endswith("<|user|>今天星期几？<|end|><|assistant|>")


@settings(max_examples=300)
@given(data=st.one_of(st.binary(max_size=40), st.text(max_size=20).map(str.encode)), seed=st.integers(0, 9))
def test_any_bytes_survive_the_round_trip_and_streamed_pieces_are_the_decoded_text(tokenizer, data, seed):
    ids = tokenizer.encode_bytes(data)
    assert (tokenizer.decode_bytes(ids), tokenizer.decode(ids)) == (data, data.decode(errors="replace"))
    ids = ids if seed % 2 else list(data)
    random.Random(seed).shuffle(ids) if seed > 6 else None
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)
    for n in range(len(ids) + 1):
        waiting = len(tokenizer.decode(ids[:n])) - len("".join(pieces[:n]))
        assert 0 <= waiting <= 3  # bytes, each of which may yet turn out to be U+FFFD


def test_a_stream_shows_only_complete_characters(tokenizer):
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(byte) for byte in "好".encode()] == ["", "", "好"]
    assert decoder.push(0xFF) == "\ufffd"
    assert [decoder.push(0xE5), decoder.push(ord("a"))] == ["", "\ufffda"]
    assert decoder.push(tokenizer.end_id) == ""
    assert [decoder.push(0xF0), decoder.flush(), decoder.push(ord("b"))] == ["", "\ufffd", "b"]


def test_impossible_settings_and_ids_are_errors_that_say_what_to_pass(tokenizer):
    refused("--vocab-size=263", Tokenizer.train, ["aaaa"], 262, "bpe")
    refused("kinds are bpe, char", Tokenizer.train, ["aaaa"], 300, "word")
    refused("at most 265 tokens; pass --vocab-size=265", Tokenizer.train, ["aaaa"], 1000, "bpe")
    for i in (-1, 2000):
        refused(f"id {i} is not in this vocabulary", tokenizer.decode, [i])
