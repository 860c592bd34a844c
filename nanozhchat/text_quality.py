"""How much generated text repeats itself: in characters, as Chinese has no spaces between words."""

import re
from collections.abc import Sequence

LOOP_CHARS = 12  # a unit said three times or more in a row is a loop from this length on: 一步一步一步 is none
LOOP = re.compile(r"(.{2,40}?)\1{2,}", re.DOTALL)
SENTENCE = re.compile(r"[^。！？…\n]{4,}")
SENTENCE_TIMES = 3  # the same sentence so often in one text is a loop as well, in a row or not


def distinct(text: str, n: int) -> float:
    """Share of a text's character n-grams that are different ones (arXiv 1510.03055); 1 for a text that has none."""
    grams = [text[i : i + n] for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def loops(text: str) -> bool:
    """Whether a text is caught in a loop."""
    sentences = SENTENCE.findall(text)
    often = any(sentences.count(s) >= SENTENCE_TIMES for s in set(sentences))
    return often or any(len(m[0]) >= LOOP_CHARS for m in LOOP.finditer(text))


def quality(texts: Sequence[str]) -> dict[str, float]:
    """Means over texts: share of 4-grams said before (`repetition_rate`), `distinct_1` and `_2`, and `loop_rate`."""
    n = max(1, len(texts))
    return {"repetition_rate": sum(1 - distinct(t, 4) for t in texts) / n,
            "distinct_1": sum(distinct(t, 1) for t in texts) / n, "distinct_2": sum(distinct(t, 2) for t in texts) / n,
            "loop_rate": sum(map(loops, texts)) / n}  # fmt: skip
