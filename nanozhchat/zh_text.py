"""Rules for *scoring*: width folding, Chinese numerals, finding the answer in what a model wrote, overlap of spans.

Nothing here ever touches training text.
"""

import re
import unicodedata
from collections.abc import Sequence
from difflib import SequenceMatcher
from fractions import Fraction

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
UNITS = {"十": 10, "百": 100, "千": 1000}
LARGE = {"万": 10**4, "亿": 10**8}
HAN_NUMERAL = r"[零〇一二两三四五六七八九十百千万亿]+(?:点[零〇一二三四五六七八九]+[万亿]?)?"
NUMERAL = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
NUMBER = re.compile(rf"({NUMERAL})(?:\s*/\s*(\d+(?:\.\d+)?))?\s*([%万亿]?)")
MARK = re.compile(r"####|\\boxed|答案|the answer|answer is|answer:", re.IGNORECASE)  # what follows is the answer
LETTER_SAID = re.compile(
    r"(?:####|boxed|答案|故选|应选|选择|选|answer)(?:(?:应该|应当|应|选项|选|是|为|is|option|[^\w]|_)\s*)*"
    r"([A-Z](?:[\s,、和]*[A-Z])*)(?![A-Za-z])", re.IGNORECASE
)  # fmt: skip
LETTER_FIRST = re.compile(r"\W*([A-Z]+)\s*(?:[.,:;)。]|$)")
LETTER_ALONE = re.compile(r"(?<![A-Za-z])[A-Z](?![A-Za-z])")


def fold(text: str) -> str:
    """Make width variants equal (NFKC: Ａ→A, １→1, ，→,) and drop case and outer blanks."""
    return unicodedata.normalize("NFKC", text).replace("⁄", "/").casefold().strip()


def han_number(text: str) -> Fraction:
    """Read a Chinese numeral: 三百二十五, 一亿零五万, 二〇二六, 一点五万. Raises KeyError for other characters."""
    if "点" in text and text[-1] in LARGE:
        return han_number(text[:-1]) * LARGE[text[-1]]
    whole, _, decimals = text.partition("点")
    part = Fraction(int("".join(str(DIGITS[c]) for c in decimals)), 10 ** len(decimals)) if decimals else Fraction(0)
    if not set(whole) & {*UNITS, "万", "亿"}:
        return int("".join(str(DIGITS[c]) for c in whole)) + part
    total = section = digit = 0
    for c in whole:
        if c in UNITS:
            section += (digit or 1) * UNITS[c]
        elif c == "万":
            total += (section + digit or 1) * LARGE[c]
        elif c == "亿":
            total = (total + section + digit or 1) * LARGE[c]
        else:
            digit = DIGITS[c]
            continue
        section, digit = (section if c in UNITS else 0), 0
    return total + section + digit + part


def numbers(text: str) -> list[Fraction]:
    """Return the numbers in a text, in order: 5,600, 3.5万, 2/6, 12%, 三分之一, \\frac{1}{2}; Chinese numerals only
    where there are no digits, since 一 is part of many words."""
    text = fold(text).replace("百分之", "100分之")
    if not re.search(r"\d", text.replace("100分之", "")):
        text = re.sub(HAN_NUMERAL, lambda m: str(float(n)) if (n := han_number(m[0])).denominator > 1 else str(n), text)
    text = re.sub(r"\\d?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    text = re.sub(rf"({NUMERAL})\s*分之\s*({NUMERAL})", r"\2/\1", text)
    found = [(n, Fraction(below or 1), unit) for n, below, unit in NUMBER.findall(text)]
    times: dict[str, Fraction | int] = {"%": Fraction(1, 100), **LARGE}
    return [Fraction(n.replace(",", "")) / below * times.get(unit, 1) for n, below, unit in found if below]


def final_number(text: str) -> Fraction | None:
    """Return the number that an answer ends in: after "答案", "####" and the like, else the last; None = no number."""
    after = MARK.split(text)[-1]
    if after is not text and (said := numbers(re.split(r"[。\n;；]", after.strip(" :：\n"))[0])):
        return said[-1]
    return next(reversed(numbers(text)), None)


def chosen(answer: str, choices: Sequence[str]) -> int | None:
    """Return which of the choices an answer names, by letter or by its text; None when that is unclear.

    Choices that are letters themselves ("A", "BD") stand for what the question lists.
    """
    text = unicodedata.normalize("NFKC", answer).strip()
    known = LETTERS if set("".join(choices)) <= set(LETTERS) else LETTERS[: len(choices)]
    names = list(choices) if known is LETTERS else list(known)
    exact = [i for i, c in enumerate(choices) if fold(c) == text.casefold().rstrip("。.")]
    if exact:
        return exact[0]
    alone = set(LETTER_ALONE.findall(text)) & {*known}
    said = [m[1] for m in LETTER_SAID.finditer(text)][-1:] or [
        m[1] for m in [LETTER_FIRST.match(text) or re.fullmatch(r"\W*([a-z])\W*", text)] if m
    ]
    if not said and len(alone) == 1:
        said = [*alone]
    letters = "".join(sorted(set(re.sub(r"[^A-Z]", "", said[0].upper())))) if said else ""
    if letters in names:
        return names.index(letters)
    if known is LETTERS or len(alone) > 1:
        return None
    named = [i for i, c in enumerate(choices) if fold(c) in text.casefold()]
    named = [i for i in named if not any(i != j and fold(choices[i]) in fold(choices[j]) for j in named)]
    return named[0] if len(named) == 1 else None


def span_f1(answer: str, reference: str) -> float:
    """F1 of two short texts as CMRC 2018 defines it: the longest common run of characters (words where Latin).

    1 only where they are equal but for width, case, blanks and punctuation.
    """
    a, b = (re.findall(r"[a-z0-9]+|[^\W_]", fold(t)) for t in (answer, reference))
    if not a or not b:
        return float(a == b)
    common = SequenceMatcher(None, a, b, autojunk=False).find_longest_match(0, len(a), 0, len(b)).size
    return 2 * common / (len(a) + len(b))
