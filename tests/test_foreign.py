"""Tokenizers from elsewhere: the same tokens as in their own library, kept, loaded, and a warning when too large."""

import base64
import json
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nanozhchat import foreign, paths
from nanozhchat.prepare import prepare, vocabulary_use
from nanozhchat.tokenizer import Tokenizer
from scripts import tok_train
from tests.conftest import CPU, ROOT, pack, refused, write_jsonl

TEXT = (ROOT / "README.zh.md").read_text(encoding="utf-8")
SAMPLES = [*TEXT.splitlines(), "Hello  world's\n\n\n 12345 ①②", "😺\t\x00 <|endoftext|> naïve", "", "   "]
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern):
    return pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


def byte_level(**options):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


LAYOUTS = {  # pre-tokenizer, where the special tokens stand, how it runs here
    "gpt2": (byte_level(), "last", "foreign"),
    "qwen": (pre_tokenizers.Sequence([split(QWEN), byte_level(use_regex=False)]), "added", "foreign"),
    "specials first": (pre_tokenizers.Sequence([split(QWEN), byte_level(use_regex=False)]), "first", "foreign"),
    "two cuts": (pre_tokenizers.Sequence([split(r"\p{N}{1,3}"), split("[一-鿿]+"), byte_level()]), "added", "hub"),
}


def write_one(path, layout):
    pre, place, _ = LAYOUTS[layout]
    hub = tokenizers.Tokenizer(models.BPE())
    hub.pre_tokenizer, hub.decoder = pre, decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>"] if place == "first" else []
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    hub.train_from_iterator(TEXT.splitlines(), trainers.BpeTrainer(vocab_size=900, **options))
    hub.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
    hub.save(str(path))
    return hub


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tokenizer_json_gives_the_tokens_that_its_library_gives_and_comes_back_from_disk(tmp_path, layout):
    hub = write_one(tmp_path / "tokenizer.json", layout)
    made = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert made.kind == LAYOUTS[layout][2]
    made.save(tmp_path / "t")
    again = Tokenizer.load(tmp_path / "t")
    assert (again.hash, again.kind, again.vocab_size) == (made.hash, made.kind, made.vocab_size)
    exported = tokenizers.Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json"))
    shift = 2 if LAYOUTS[layout][1] == "first" else 0
    for text in SAMPLES:
        ids = again.encode(text)
        assert again.decode(ids) == text
        if "<|" not in text:
            assert [i + shift for i in ids] == hub.encode(text).ids
            assert exported.encode(text, add_special_tokens=False).ids == ids
    assert again.decode(again.encode("\ud800半")) == "\ufffd半"
    data = bytes(random.Random(0).randbytes(200))
    assert again.decode_bytes(again.encode_bytes(data)) == data
    ids, offsets = again.encode_batch_flat(SAMPLES)
    assert ids.tolist() == [i for text in SAMPLES for i in again.encode(text)]
    assert np.array_equal(offsets, np.cumsum([0, *(len(again.encode(text)) for text in SAMPLES)]))
    assert again.special("<|bos|>") == again.vocab_size - 7 not in again.encode("<|bos|>")


def test_ranks_of_tiktoken_need_a_pattern_that_is_known_and_what_is_no_byte_level_bpe_is_refused(tmp_path, monkeypatch):
    write_one(tmp_path / "tokenizer.json", "gpt2")
    wanted = Tokenizer.from_file(tmp_path / "tokenizer.json")
    lines = [f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(wanted._ranks)]
    path = pack(tmp_path / "gpt2.tiktoken", "\n".join(lines) + "\n")
    refused(r"has \d+ ranks; the split pattern", Tokenizer.from_file, path)
    monkeypatch.setitem(foreign.PATTERNS, len(lines), foreign.GPT2_PATTERN)
    assert Tokenizer.from_file(path).hash == wanted.hash
    unigram = json.dumps({"model": {"type": "Unigram", "vocab": []}, "pre_tokenizer": {}})
    for content in ("{}", "不是", unigram):
        for name in ("tokenizer.json", "a.tiktoken"):
            with pytest.raises(ValueError, match="is no byte-level BPE|is neither a tokenizer.json nor"):
                Tokenizer.from_file(pack(tmp_path / name, content))


def test_it_is_taken_over_by_name_and_a_vocabulary_too_large_for_the_data_is_called_so(tmp_path, capsys):
    write_one(tmp_path / "tokenizer.json", "qwen")
    data = str(write_jsonl(tmp_path / "a.jsonl", [f"第{i}行：今天天气很好。" for i in range(300)]))
    tok_train.main(["--data", data, f"--from={tmp_path / 'tokenizer.json'}", "--name=q"])
    assert "bytes per token" in capsys.readouterr().out
    tokenizer = Tokenizer.load(paths.tokenizer_dir("q"))
    store = prepare([data], tokenizer, CPU)
    used, tokens = vocabulary_use(store), store.n_tokens("train")
    assert 20 < used < 100
    assert f"{tokens} tokens of text for {tokenizer.vocab_size} entries, of which {used} " in capsys.readouterr().err
    given = ["--data", data, f"--from={tmp_path / 'tokenizer.json'}"]
    refused("needs a --name", lambda: tok_train.main(given))
    refused("leave out --vocab-size, --kind", lambda: tok_train.main([*given, "--vocab-size=999", "--kind=char"]))
