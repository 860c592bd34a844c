"""What a vocabulary holds: common characters, whole characters and words, tokens that text never uses."""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import numpy as np

from nanozhchat.tokenizer import Tokenizer


@cache
def common_characters() -> tuple[str, str]:
    """Return the characters of the Table of General Standard Chinese Characters (2013).

    First the 3,500 of level one, in frequent use, then all 8,105; both in the order of the table.
    """
    first, rest = (files("nanozhchat") / "common_characters.txt").read_text(encoding="utf-8").split("\n\n")
    first, rest = first.replace("\n", ""), rest.replace("\n", "")
    return first, first + rest


def vocabulary_facts(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, float]:
    """Return shares, 0 to 1, of what is in the vocabulary, special tokens left out.

    texts: what `unused_frac` is about: tokens that these texts never need.
    """
    tokens = [token for i in range(tokenizer.vocab_size) if (token := tokenizer.decode_bytes([i]))]
    words = {text for token in tokens if (text := _text_of(token)) is not None}
    level_one, table = common_characters()
    ids, _ = tokenizer.encode_batch_flat(texts)
    return {"common_3500_frac": sum(c in words for c in level_one) / len(level_one),
            "common_8105_frac": sum(c in words for c in table) / len(table),
            "character_tokens_frac": sum(len(word) == 1 for word in words) / len(tokens),
            "word_tokens_frac": sum(len(word) > 1 for word in words) / len(tokens),
            "unused_frac": 1 - len(np.unique(ids)) / len(tokens)}  # fmt: skip


def describe(facts: dict[str, float]) -> str:
    """Say the facts in one line."""
    return (f"{facts['common_3500_frac']:.1%} of the 3,500 and {facts['common_8105_frac']:.1%} of the 8,105 common "
            f"characters are one token; of the tokens {facts['character_tokens_frac']:.1%} are one character, "
            f"{facts['word_tokens_frac']:.1%} several; {facts['unused_frac']:.1%} not in held-out text")  # fmt: skip


def _text_of(token: bytes) -> str | None:
    """Return the text of a token, or None if it begins or ends within a character."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None
