"""The world the built-in Chinese talks about: people, places and things, split into trained and held-out halves.

Whether a piece of content is held out depends only on a stable hash of its key (`is_held_out`), never on a seed, so
every stream ever generated agrees on what must not be trained on.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")

HELD_OUT_ONE_IN = 10  # one piece of content in so many is kept for evaluation
POOL_NAMES = 40_000  # person names drawn before the split; more only costs start-up time
POOL_PLACES = 12_000
POOL_FOREIGN = 12_000


class Rng(random.Random):
    """`random.Random` with a cheap uniform pick; documents make a dozen picks each, so the cost shows."""

    def pick(self, options: Sequence[T]) -> T:
        """Return one option, uniformly."""
        return options[int(self.random() * len(options))]

    def below(self, n: int) -> int:
        """Return an integer in [0, n)."""
        return int(self.random() * n)

    def two(self, options: Sequence[T]) -> tuple[T, T]:
        """Return two different options (the sequence holds no duplicates)."""
        i, j = self.below(len(options)), self.below(len(options) - 1)
        return options[i], options[j + (j >= i)]


class Item(NamedTuple):
    """One question with its answer and how to judge one.

    rule: how `checking.make_check` judges; right: what must be there; wrong: what must not.
    key: the content that decides the split. context: text the question is about, or "". history: earlier turns, the
    user's and the assistant's in alternation.
    """

    skill: str
    context: str
    ask: str
    answer: str
    key: str
    rule: str
    right: tuple[str, ...]
    wrong: tuple[str, ...] = ()
    answerable: bool = True
    chance: float = 0.0
    history: tuple[str, ...] = ()


Draw = Callable[[Rng, bool], Item]


class Person(NamedTuple):
    """A full name and the pronoun that goes with it."""

    name: str
    pronoun: str


def is_held_out(key: str) -> bool:
    """Say whether content named `key` is kept out of all training text."""
    # A mixing hash: CRC-32 is linear, so keys that differ in a suffix only would be held out together.
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_ONE_IN == 0


@cache
def sections(file: str) -> dict[str, list[str]]:
    """Read `lexicon/<file>.txt`: lines under [section] headings, blank lines dropped."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in (Path(__file__).parent / "lexicon" / f"{file}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("[") and line.endswith("]"):
            lines = found.setdefault(line[1:-1], [])
        elif line.strip():
            lines.append(line.strip())
    return found


@cache
def words(file: str, section: str) -> tuple[str, ...]:
    """Return the space-separated words of a section, each once."""
    return tuple(dict.fromkeys(" ".join(sections(file)[section]).split()))


@cache
def lines(file: str, section: str) -> tuple[str, ...]:
    """Return the lines of a section."""
    return tuple(sections(file)[section])


def cells(line: str) -> tuple[str, ...]:
    """Return the parts of a line between its upright strokes."""
    return tuple(map(str.strip, line.split("|")))


def split_pool(pool: Iterable[str], kind: str, held: bool) -> tuple[str, ...]:
    """Return the held-out or the trained part of a pool of names, of places, ..."""
    return tuple(x for x in pool if is_held_out(f"{kind}:{x}") is held)


@cache
def people(held: bool) -> tuple[Person, ...]:
    """Return the persons of one split: composed names, so none is a list to learn by heart."""
    rng, found = Rng(1), {}
    surnames, given = words("names", "surnames"), (words("names", "male"), words("names", "female"))
    # Weigh surnames as a street would: the first ones are far more common.
    while len(found) < POOL_NAMES:
        surname, female = surnames[int(len(surnames) * rng.random() ** 1.5)], rng.below(2)
        chars = given[female]
        name = surname + rng.pick(chars) + (rng.pick(chars) if rng.random() < 0.7 else "")
        found.setdefault(name, Person(name, "他她"[female]))
    return tuple(found[name] for name in split_pool(found, "name", held))


@cache
def names(held: bool) -> tuple[str, ...]:
    """Return the persons' names of one split."""
    return tuple(person.name for person in people(held))


@cache
def places(held: bool, kinds: str = "place_kind") -> tuple[str, ...]:
    """Return invented place names of one split; kinds: "place_kind", or "village_kind" for where one lives."""
    rng, found = Rng(2), {}
    first, second, kind = words("names", "place_first"), words("names", "place_second"), words("names", kinds)
    while len(found) < POOL_PLACES:
        a, b = rng.pick(first), rng.pick(second)
        if a != b:
            found[a + b + rng.pick(kind)] = True
    return split_pool([*found, *words("names", "cities")], "place", held)


@cache
def foreign(held: bool) -> tuple[str, ...]:
    """Return invented foreign-sounding names that no real country or capital bears."""
    rng, found = Rng(3), {}
    syllables, real = words("names", "syllables"), words("names", "real_abroad")
    while len(found) < POOL_FOREIGN:
        name = "".join(rng.pick(syllables) for _ in range(3 + rng.below(2)))
        if len(set(name)) == len(name) and not any(r in name or name in r for r in real):
            found[name] = True
    return split_pool(found, "foreign", held)


@cache
def measures() -> dict[str, str]:
    """Return noun -> usual measure word."""
    table: dict[str, str] = {}
    measure = ""
    for line in lines("things", "measure"):
        nouns = line.split()
        if len(nouns[0]) == 1 and nouns[0] not in table:  # a line that continues the one above starts with a noun
            measure = nouns.pop(0)
        table |= {noun: measure for noun in nouns if noun not in table}
    return {noun: measure for noun, measure in table.items() if noun not in words("things", "drop")}


@cache
def other_measures() -> dict[str, str]:
    """Return noun -> further measure words that are right too, one character each."""
    return dict(entry.split() for entry in "|".join(lines("things", "also")).split("|"))


@cache
def things(section: str) -> tuple[tuple[str, str], ...]:
    """Return (noun, its usual measure word) of a section ("carry", "countable")."""
    return tuple((noun, measures()[noun]) for noun in words("things", section) if noun in measures())


@cache
def combos(rows: tuple[str, ...], phrasings: tuple[str, ...], held: bool) -> tuple[tuple[int, int], ...]:
    """Return the (row, phrasing) index pairs of one split: every row is trained in most phrasings, tested in others."""
    found: list[tuple[int, int]] = []
    for i, row in enumerate(rows):
        kept = [j for j, phrasing in enumerate(phrasings) if is_held_out(f"{row}|{phrasing}")]
        kept = kept[: max(1, len(phrasings) // 4)]  # bad luck must not hide a row from training
        found += [(i, j) for j in range(len(phrasings)) if (j in kept) is held]
    return tuple(found)
