"""Facts: tables of (subject, object) under relations, each with its own phrasings of question and answer."""

import re
from functools import cache
from typing import NamedTuple

from nanozhchat.builtin.world import Item, Rng, combos, sections

PARENT_RELATION = "<"  # "< name" takes the table of another relation the other way round
UNIT_RELATION = "convert"  # its objects end with a unit
UNIT = re.compile(r"(?<=\d)(?=\D)")  # the place where it begins


class Relation(NamedTuple):
    """rows: (subject, object, unit or ""); asks and answers: templates over {s}, {o}, {u}; chance: of a blind guess."""

    name: str
    asks: tuple[str, ...]
    answers: tuple[str, ...]
    rows: tuple[tuple[str, str, str], ...]
    chance: float


@cache
def relations() -> tuple[Relation, ...]:
    """Return every relation of `lexicon/facts.txt`.

    Lines there: "? question", "! answer", "= subject object|subject object", "< relation" (its table turned round).
    """
    found: dict[str, Relation] = {}
    for name, text in sections("facts").items():
        by_mark: dict[str, list[str]] = {}
        for line in text:
            by_mark.setdefault(line[0], []).append(line[2:])
        if PARENT_RELATION in by_mark:
            rows = tuple((o, s, "") for s, o, _ in found[by_mark[PARENT_RELATION][0]].rows)
        else:
            entries = map(str.split, "|".join(by_mark["="]).split("|"))
            parted = ((s, UNIT.split(o, maxsplit=1) if name == UNIT_RELATION else (o, "")) for s, o in entries)
            rows = tuple((s, value, unit) for s, (value, unit) in parted)
        chance = 1 / len({o for _, o, _ in rows})
        found[name] = Relation(name, tuple(by_mark["?"]), tuple(by_mark["!"]), rows, chance)
    return tuple(found.values())


@cache
def _index(held: bool) -> tuple[tuple[int, int, int], ...]:
    """Return (relation, row, phrasing) of one split, so that every fact is equally likely."""
    keys = [tuple(f"{relation.name}:{s}{u}" for s, _, u in relation.rows) for relation in relations()]
    return tuple((r, i, j) for r, own in enumerate(keys) for i, j in combos(own, relations()[r].asks, held))


@cache
def _wrong(r: int, i: int) -> tuple[str, ...]:
    """Return the other objects of the relation that a right answer cannot contain."""
    subject, value, _ = relations()[r].rows[i]
    said = "".join(a.format(s=subject, o=value, u="") for a in relations()[r].answers)
    return tuple(sorted({o for s, o, _ in relations()[r].rows if s != subject and o not in said}))


def draw(rng: Rng, held: bool) -> Item:
    """Ask for one fact."""
    r, i, j = rng.pick(_index(held))
    relation = relations()[r]
    subject, value, unit = relation.rows[i]
    ask = relation.asks[j].format(s=subject, u=unit)
    answer = relation.answers[rng.random() < 0.25].format(s=subject, o=value, u=unit)
    key = f"fact:{relation.name}:{subject}{unit}|{j}"
    rule, wrong = ("value", ()) if value.isdigit() else ("contains", _wrong(r, i))
    return Item("facts", "", ask, answer, key, rule, (value,), wrong, chance=relation.chance)


def _state(rng: Rng, r: int, i: int) -> str:
    subject, value, unit = relations()[r].rows[i]
    return rng.pick(relations()[r].answers).format(s=subject, o=value, u=unit)


@cache
def _rows() -> tuple[tuple[int, int], ...]:
    return tuple((r, i) for r, relation in enumerate(relations()) for i in range(len(relation.rows)))


@cache
def _subjects() -> tuple[tuple[tuple[int, int], ...], ...]:
    """Return, for every subject with several facts, its (relation, row) pairs."""
    found: dict[str, list[tuple[int, int]]] = {}
    for r, i in _rows():
        found.setdefault(relations()[r].rows[i][0], []).append((r, i))
    return tuple(tuple(facts) for facts in found.values() if len(facts) > 1)


def statement(rng: Rng) -> str:
    """Return one fact as a plain sentence. All facts are trained; only the questions are split."""
    return _state(rng, *rng.pick(_rows()))


def article(rng: Rng) -> str:
    """Return a short entry: everything known about one subject."""
    return "".join([_state(rng, r, i) for r, i in rng.pick(_subjects())])
