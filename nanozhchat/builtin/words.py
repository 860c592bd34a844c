"""Characters and words: antonyms, synonyms, pinyin, measure words, idioms; counting, reversing, picking characters."""

from functools import cache, partial

from nanozhchat.builtin import world
from nanozhchat.builtin.world import Item, Rng, combos, lines, names, split_pool
from nanozhchat.builtin.world import words as lexicon_words

COUNT_POOL = 60_000  # character strings drawn before the split
ORDINAL_MAX = 5

STATEMENTS = {
    "antonyms": "“{w}”的反义词是“{o}”。", "synonyms": "“{w}”的近义词是“{o}”。", "pinyin": "“{w}”的拼音是{o}。",
    "measure": "{w}的量词是“{o}”，一{o}{w}。",
    "meaning": "“{w}”的意思是{o}。", "idiom": "“{w}”说的是“{o}”。",
}  # fmt: skip
NTH_NUMERALS = ("零一二三四五", "012345")  # up to ORDINAL_MAX


@cache
def pairs(section: str, both_ways: bool = True) -> tuple[tuple[str, str], ...]:
    """Return the (word, other) pairs of a section, both ways round."""
    table: dict[str, str] = {}
    for a, b in map(str.split, "|".join(lines("words", section)).split("|")):
        table.setdefault(a, b)
        if both_ways:
            table.setdefault(b, a)
    return tuple(table.items())


@cache
def idioms() -> tuple[tuple[str, str], ...]:
    """Return (idiom, meaning)."""
    return tuple((idiom, meaning) for idiom, _, meaning in (line.partition(" ") for line in lines("words", "idioms")))


@cache
def strings(held: bool) -> tuple[str, ...]:
    """Return words and made-up strings of two to seven characters to count, reverse and spell."""
    rng, chars = Rng(4), lexicon_words("words", "characters")
    real = [w for w in (*world.measures(), *dict(pairs("antonyms")), *dict(idioms())) if len(w) > 1]
    real += [w for section in ("colours", "carry") for w in lexicon_words("things", section) if len(w) > 1]
    found = dict.fromkeys(real, True)
    while len(found) < COUNT_POOL:
        if (kind := rng.below(3)) < 2:
            text = rng.pick(chars if kind else real) + rng.pick(real)
        else:
            text = "".join(rng.pick(chars) for _ in range(2 + rng.below(5)))
        if len(text) <= 7:
            found[text] = True
    return split_pool(found, "string", held)


@cache
def _rows(kind: str) -> tuple[tuple[str, str], ...]:
    """Return the (word, answer) table of a word skill."""
    if kind in STATED:
        return pairs(kind, both_ways=kind != "pinyin")
    if kind == "measure":
        return tuple(world.measures().items())
    return idioms() if kind == "meaning" else tuple((meaning, idiom) for idiom, meaning in idioms())


def _asks(kind: str) -> tuple[str, ...]:
    return lines("words", "ask_" + kind)


@cache
def _keys(kind: str) -> tuple[str, ...]:
    return tuple(f"{kind}:{word}" for word, _ in _rows(kind))


def _pick(rng: Rng, kind: str, held: bool, asks: str = "") -> tuple[str, str, str, str]:
    """Return (word, answer, question, key). asks: the phrasings, the kind's own if empty."""
    asks = asks or kind
    i, j = rng.pick(combos(_keys(kind), _asks(asks), held))
    word, answer = _rows(kind)[i]
    return word, answer, _asks(asks)[j].format(w=word), f"{kind}:{word}|{asks}{j}"


def _draw(rng: Rng, held: bool, kind: str, asks: str = "") -> Item:
    """Ask about a word table whose answers are its plain statements."""
    word, answer, ask, key = _pick(rng, kind, held, asks)
    text = STATEMENTS[kind].format(w=word, o=answer)
    return Item(kind, "", ask, text, key, "contains", (text[text.index("是") :].strip("是。"),))


STATED = ("antonyms", "synonyms", "pinyin")
draw_antonym, draw_synonym, draw_pinyin = (partial(_draw, kind=kind) for kind in STATED)


def draw_followup(rng: Rng, held: bool) -> Item:
    """Ask the same about another word, without saying again what."""
    kind = rng.pick(STATED)
    first = _draw(rng, False, kind)
    return _draw(rng, held, kind, "more")._replace(skill="followup", history=(first.ask, first.answer))


def draw_measure(rng: Rng, held: bool) -> Item:
    """Ask for a measure word; every measure word that is usual with the noun is right."""
    word, answer, ask, key = _pick(rng, "measure", held)
    right = tuple(f"一{m}{word}" for m in answer + world.other_measures().get(word, ""))
    return Item("measure", "", ask, f"一{answer}{word}。", key, "any", right, chance=0.05)


def draw_idiom(rng: Rng, held: bool) -> Item:
    """Ask what an idiom means, or which idiom has a meaning."""
    if rng.random() < 0.6:
        word, answer, ask, key = _pick(rng, "meaning", held)
        return Item("idioms", "", ask, f"“{word}”的意思是{answer}。", key, "contains", (f"意思是{answer}。",))
    word, answer, ask, key = _pick(rng, "idiom", held)
    others = tuple(idiom for idiom, _ in idioms() if idiom != answer)
    return Item("idioms", "", ask, f"“{answer}”。", key, "contains", (answer,), others)


def _counted(text: str) -> str:
    return "，".join([f"{i}{char}" for i, char in enumerate(text, 1)])


def draw_count(rng: Rng, held: bool) -> Item:
    """Ask how many characters a string has; the answer counts them off."""
    text = rng.pick(strings(held))
    answer = f"{_counted(text)}，一共{len(text)}个字。"
    ask = rng.pick(_asks("count")).format(w=text)
    return Item("counting", "", ask, answer, "string:" + text, "number", (str(len(text)),), chance=0.2)


def draw_reverse(rng: Rng, held: bool) -> Item:
    """Ask for a string backwards; the answer spells it first, for a token may hold several characters."""
    text = rng.pick(strings(held))
    ask = rng.pick(_asks("reverse")).format(w=text)
    answer = f"{'，'.join(text)}，倒过来是“{text[::-1]}”。"
    return Item("reversing", "", ask, answer, "string:" + text, "contains", (f"“{text[::-1]}”",))


def draw_repeat(rng: Rng, held: bool) -> Item:
    """Ask to repeat a string or a name: not evaluated, but the plainest lesson in copying there is."""
    text = rng.pick(strings(held)) if rng.random() < 0.5 else rng.pick(names(held)) + rng.pick(lines("words", "acts"))
    ask = rng.pick(_asks("repeat")).format(w=text)
    return Item("repeat", "", ask, f"{text}。", "string:" + text, "contains", (text,))


def draw_nth(rng: Rng, held: bool) -> Item:
    """Ask for the n-th character of a string; the answer counts up to it."""
    text = rng.pick(strings(held))
    i = rng.below(min(len(text), ORDINAL_MAX))
    ask = rng.pick(_asks("nth")).format(w=text, i=rng.pick(NTH_NUMERALS)[i + 1])
    answer = f"{_counted(text[: i + 1])}，第{i + 1}个字是“{text[i]}”。"
    return Item("characters", "", ask, answer, "string:" + text, "contains", (f"“{text[i]}”",), chance=1 / len(text))


def statements(rng: Rng) -> str:
    """Return a few entries of one word table as plain sentences: dense, so the tables are learnt in few tokens."""
    kind = rng.pick(tuple(STATEMENTS))
    rows, shape = _rows(kind), STATEMENTS[kind]
    return "".join([shape.format(w=w, o=o) for w, o in (rng.pick(rows) for _ in range(3 + rng.below(4)))])
