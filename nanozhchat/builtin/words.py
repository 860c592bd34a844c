"""Characters and words: antonyms, measure words, idioms, counting, reversing and picking characters."""

from __future__ import annotations

from functools import cache

from nanozhchat.builtin.world import (
    DIGITS,
    Item,
    Rng,
    combos,
    is_held_out,
    lines,
    measures,
    names,
    other_measures,
    sections,
)
from nanozhchat.builtin.world import words as lexicon_words

COUNT_POOL = 60_000  # character strings drawn before the split
ORDINAL_MAX = 5

ANTONYM_ASKS = (
    "“{w}”的反义词是什么？",
    "{w}的反义词是什么？",
    "与“{w}”意思相反的词是什么？",
    "和{w}相反的词是哪个？",
    "和“{w}”意思相反的是什么词？",
    "说出“{w}”的反义词。",
    "什么词和“{w}”意思相反？",
    "找一个和“{w}”相反的词。",
    "请写出{w}的反义词。",
    "{w}和什么词意思相反？",
)
MEASURE_ASKS = (
    "“{w}”的量词是什么？",
    "一什么{w}？",
    "说“{w}”用什么量词？",
    "“{w}”要用哪个量词？",
    "在“一（  ）{w}”里填一个量词。",
    "哪个量词可以和“{w}”搭配？",
    "数{w}的时候，该说一什么{w}？",
    "{w}前面用什么量词？",
    "请给“{w}”配一个量词。",
    "{w}的量词应该用哪个字？",
)
MEANING_ASKS = (
    "“{w}”是什么意思？",
    "“{w}”这个成语是什么意思？",
    "成语“{w}”的意思是什么？",
    "解释一下“{w}”。",
    "怎么理解“{w}”？",
    "什么叫“{w}”？",
    "请说说成语{w}的意思。",
    "{w}是什么意思？",
    "人们说“{w}”，是想说什么？",
    "“{w}”指的是什么？",
)
IDIOM_ASKS = (
    "哪个成语的意思是“{w}”？",
    "“{w}”可以用哪个成语来说？",
    "用一个成语表示“{w}”。",
    "表示“{w}”的成语是什么？",
    "什么成语说的是“{w}”？",
    "请找一个意思是“{w}”的成语。",
    "说一个成语，意思是“{w}”。",
    "想说“{w}”，该用哪个成语？",
)
COUNT_ASKS = (
    "“{w}”有几个字？",
    "“{w}”一共有几个字？",
    "数一数“{w}”有多少个字。",
    "“{w}”这个词里有几个字？",
    "“{w}”是几个字？",
    "“{w}”共有多少个字？",
    "请数出“{w}”的字数。",
    "“{w}”里面有几个汉字？",
    "写“{w}”要写几个字？",
    "“{w}”的字数是多少？",
)
REVERSE_ASKS = (
    "把“{w}”倒过来写。",
    "把“{w}”反过来读是什么？",
    "“{w}”倒着念是什么？",
    "请倒着写出“{w}”。",
    "“{w}”从后往前读是什么？",
    "将“{w}”的字倒过来排。",
    "把“{w}”的顺序颠倒过来。",
    "从最后一个字开始读“{w}”，是什么？",
    "“{w}”倒过来是什么？",
    "倒着说“{w}”。",
)
NTH_ASKS = (
    "“{w}”的第{i}个字是什么？",
    "“{w}”里的第{i}个字是哪个？",
    "说出“{w}”的第{i}个字。",
    "在“{w}”中，第{i}个字是什么？",
    "“{w}”这个词的第{i}个字是哪个字？",
    "请写出“{w}”的第{i}个字。",
    "“{w}”从左数第{i}个字是什么？",
    "第{i}个字在“{w}”里是哪个？",
)
REPEAT_ASKS = (
    "请跟我说：“{w}”。",
    "请重复一遍：“{w}”。",
    "照着写：“{w}”。",
    "跟我读“{w}”。",
    "把“{w}”再说一遍。",
    "请原样写出“{w}”。",
)
STATEMENTS = {
    "antonyms": "“{w}”的反义词是“{o}”。",
    "measure": "{w}的量词是“{o}”，一{o}{w}。",
    "meaning": "“{w}”的意思是{o}。",
    "idiom": "“{w}”说的是“{o}”。",
}
NTH_NUMERALS = (DIGITS, "0123456789")


@cache
def antonyms() -> tuple[tuple[str, str], ...]:
    """Return (word, opposite), both ways round."""
    rows = [entry.split() for entry in "|".join(sections("words")["antonyms"]).split("|")]
    table: dict[str, str] = {}
    for a, b in rows:
        table.setdefault(a, b)
        table.setdefault(b, a)
    return tuple(table.items())


@cache
def idioms() -> tuple[tuple[str, str], ...]:
    """Return (idiom, meaning)."""
    return tuple((line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines("words", "idioms"))


@cache
def strings(held: bool) -> tuple[str, ...]:
    """Return words and made-up strings of two to seven characters to count, reverse and spell."""
    rng, found = Rng(4), {}
    chars = lexicon_words("words", "characters")
    real = [w for w in measures() if len(w) > 1] + [w for w, _ in antonyms() if len(w) > 1] + [w for w, _ in idioms()]
    real += [w for section in ("colours", "carry") for w in lexicon_words("things", section) if len(w) > 1]
    for word in real:
        found[word] = True
    while len(found) < COUNT_POOL:
        kind = rng.below(3)
        if kind == 0:
            text = rng.pick(real) + rng.pick(real)
        elif kind == 1:
            text = rng.pick(chars) + rng.pick(real)
        else:
            text = "".join(rng.pick(chars) for _ in range(2 + rng.below(5)))
        if len(text) <= 7:
            found[text] = True
    return tuple(s for s in found if is_held_out("string:" + s) is held)


@cache
def _rows(kind: str) -> tuple[tuple[str, str], ...]:
    """Return the (word, answer) table of a word skill."""
    if kind == "antonyms":
        return antonyms()
    if kind == "measure":
        return tuple(measures().items())
    return idioms() if kind == "meaning" else tuple((meaning, idiom) for idiom, meaning in idioms())


@cache
def _asks(kind: str, asks: tuple[str, ...], held: bool) -> tuple[tuple[int, int], ...]:
    return combos(tuple(f"{kind}:{word}" for word, _ in _rows(kind)), asks, held)


def _pick(rng: Rng, kind: str, asks: tuple[str, ...], held: bool) -> tuple[str, str, str, str]:
    """Return (word, answer, question, key)."""
    i, j = rng.pick(_asks(kind, asks, held))
    word, answer = _rows(kind)[i]
    return word, answer, asks[j].format(w=word), f"{kind}:{word}|{j}"


def draw_antonym(rng: Rng, held: bool) -> Item:
    """Ask for the opposite of a word."""
    word, answer, ask, key = _pick(rng, "antonyms", ANTONYM_ASKS, held)
    text = f"“{word}”的反义词是“{answer}”。"
    return Item("antonyms", "", ask, text, key, "contains", (f"“{answer}”",))


def draw_measure(rng: Rng, held: bool) -> Item:
    """Ask for a measure word; every measure word that is usual with the noun is right."""
    word, answer, ask, key = _pick(rng, "measure", MEASURE_ASKS, held)
    right = tuple(f"一{m}{word}" for m in answer + other_measures().get(word, ""))
    return Item("measure", "", ask, f"一{answer}{word}。", key, "any", right, chance=0.05)


def draw_idiom(rng: Rng, held: bool) -> Item:
    """Ask what an idiom means, or which idiom has a meaning."""
    if rng.random() < 0.6:
        word, answer, ask, key = _pick(rng, "meaning", MEANING_ASKS, held)
        return Item("idioms", "", ask, f"“{word}”的意思是{answer}。", key, "contains", (f"意思是{answer}。",))
    word, answer, ask, key = _pick(rng, "idiom", IDIOM_ASKS, held)
    others = tuple(idiom for idiom, _ in idioms() if idiom != answer)
    return Item("idioms", "", ask, f"“{answer}”。", key, "contains", (answer,), others)


def draw_count(rng: Rng, held: bool) -> Item:
    """Ask how many characters a string has; the answer counts them off."""
    text = rng.pick(strings(held))
    steps = "，".join([f"{i}{char}" for i, char in enumerate(text, 1)])
    answer = f"{steps}，一共{len(text)}个字。"
    return Item(
        "counting",
        "",
        rng.pick(COUNT_ASKS).format(w=text),
        answer,
        "string:" + text,
        "number",
        (str(len(text)),),
        (),
        True,
        0.2,
    )


def draw_reverse(rng: Rng, held: bool) -> Item:
    """Ask for a string backwards."""
    text = rng.pick(strings(held))
    ask = rng.pick(REVERSE_ASKS).format(w=text)
    return Item("reversing", "", ask, f"“{text[::-1]}”。", "string:" + text, "contains", (f"“{text[::-1]}”",))


def draw_repeat(rng: Rng, held: bool) -> Item:
    """Ask to repeat a string or a name: not evaluated, but the plainest lesson in copying there is."""
    text = rng.pick(strings(held)) if rng.random() < 0.5 else rng.pick(names(held)) + rng.pick(lines("words", "acts"))
    ask = rng.pick(REPEAT_ASKS).format(w=text)
    return Item("repeat", "", ask, f"{text}。", "string:" + text, "contains", (text,))


def draw_nth(rng: Rng, held: bool) -> Item:
    """Ask for the n-th character of a string; the answer counts up to it."""
    text = rng.pick(strings(held))
    i = rng.below(min(len(text), ORDINAL_MAX))
    ask = rng.pick(NTH_ASKS).format(w=text, i=rng.pick(NTH_NUMERALS)[i + 1])
    steps = "，".join([f"{k}{char}" for k, char in enumerate(text[: i + 1], 1)])
    answer = f"{steps}，第{i + 1}个字是“{text[i]}”。"
    return Item("characters", "", ask, answer, "string:" + text, "contains", (f"“{text[i]}”",), (), True, 1 / len(text))


def statements(rng: Rng) -> str:
    """Return a few entries of one word table as plain sentences: dense, so the tables are learnt in few tokens."""
    kind = rng.pick(tuple(STATEMENTS))
    rows, shape = _rows(kind), STATEMENTS[kind]
    return "".join([shape.format(w=w, o=o) for w, o in (rng.pick(rows) for _ in range(3 + rng.below(4)))])
