"""Reading: short passages about who, what, where, when, and questions whose answer stands in the passage."""

import re
from functools import cache
from typing import NamedTuple

from nanozhchat.builtin.world import Item, Rng, lines, names, places, things, words

SLOTS = {"hold": "ptc", "buy": "ptk", "live": "paj", "plan": "pdv", "give": "tco"}  # of each kind, beside the name n
LISTS = {"c": ("things", "colours"), "j": ("names", "jobs"), "d": ("reading", "days"), "v": ("reading", "verbs")}
NUMBERS = {"k": range(2, 100), "a": range(18, 86)}  # prices, ages
# What a passage of each kind never tells: (schema, slot) of questions that name the person only.
AGE, JOB, HOME, SPENT = ("live", "a"), ("live", "j"), ("live", "p"), ("buy", "k")
ABSENT = {
    "hold": (AGE, JOB, SPENT), "buy": (AGE, JOB, HOME), "live": (SPENT, ("buy", "t"), ("plan", "d")),
    "plan": (AGE, JOB, HOME, SPENT), "give": (AGE, JOB, HOME, SPENT),
}  # fmt: skip
ABOUT = "关于{}，上面"  # how answers begin: what to look for in the passage stands next to where it is looked for
THEREFORE = "，所以"  # between the quotation and the answer proper
SLOT = re.compile(r"\{([^m])\}")  # but measure words
# A passage holds 1 + int(low + span * random) events. In training mostly two or three: in one there is nothing to find.
EVENTS, EVENTS_PRACTISED = (0.0, 2.6), (0.6, 2.2)


class Schema(NamedTuple):
    """Templates of one kind of event; asks and answers are grouped by the slot they are about."""

    says: tuple[str, ...]
    asks: dict[str, tuple[str, ...]]
    answers: dict[str, str]


@cache
def schema(name: str) -> Schema:
    """Return the templates of a schema: lines ". statement", "? slot question", "! slot answer" of the lexicon."""
    told = lines("reading", name)
    asks: dict[str, tuple[str, ...]] = {}
    for slot, ask in ((line[2], line[4:]) for line in told if line[0] == "?"):
        asks[slot] = (*asks.get(slot, ()), ask)
    answers = {line[2]: line[4:] for line in told if line[0] == "!"}
    return Schema(tuple(line[2:] for line in told if line[0] == "."), asks, answers)


def _fill(rng: Rng, held: bool, kind: str, name: str) -> dict[str, object]:
    """Draw one event's slots; only those the schema uses."""
    slots: dict[str, object] = {"n": name}
    for slot in SLOTS[kind]:
        if slot == "t":
            slots["t"], slots["m"] = rng.pick(things("carry"))
        elif slot == "p":
            slots["p"] = rng.pick(places(held, "home_kind" if kind == "live" else "place_kind"))
        elif slot == "o":
            slots["o"] = rng.pick(names(held))
        else:
            slots[slot] = rng.pick(NUMBERS[slot] if slot in NUMBERS else words(*LISTS[slot]))
    return slots


class Passage(NamedTuple):
    """A passage of a few events of one kind, and the sentence that tells each."""

    kind: str
    sentences: tuple[str, ...]
    events: tuple[dict[str, object], ...]

    @property
    def text(self) -> str:
        """The whole passage."""
        return "".join(self.sentences)


def draw_passage(rng: Rng, held: bool) -> Passage:
    """Return one to three events in which no two share a value, so every question has one answer."""
    kind = rng.pick(tuple(SLOTS))
    events: list[dict[str, object]] = []
    seen: set[object] = set()
    pool = names(held)
    low, span = EVENTS if held else EVENTS_PRACTISED
    for _ in range(1 + int(low + span * rng.random())):
        slots = _fill(rng, held, kind, rng.pick(pool))
        values = set(slots.values()) - {slots.get("m")}
        if not values & seen:
            events.append(slots)
            seen |= values
    says = schema(kind).says
    return Passage(kind, tuple([rng.pick(says).format(**slots) for slots in events]), tuple(events))


def ask_about(rng: Rng, passage: Passage) -> Item:
    """Ask for one slot of one event. The answer quotes the sentence first: copying teaches how to find it.

    What is said after the quotation is judged alone: whoever quotes right can still conclude wrong.
    """
    templates, text = schema(passage.kind), passage.text
    event, said = rng.pick(tuple(zip(passage.events, passage.sentences, strict=True)))
    slot = rng.pick(tuple(templates.asks))
    ask = rng.pick(templates.asks[slot])
    concluded = templates.answers[slot].format(**event)
    answer = f"{told(event[SLOT.findall(ask)[0]], said[:-1])}{THEREFORE}{concluded}"
    right = str(event[slot])
    wrong = tuple(w for other in passage.events if other is not event and (w := str(other[slot])) not in concluded)
    rule = "value" if right.isdigit() else "contains"
    chance = 1 / (2 * len(passage.events))  # a guess that names some value of some event in the passage
    return Item("reading", text, ask.format(**event), answer, f"reading:{text}", rule, (right,), wrong, True, chance)


def draw(rng: Rng, held: bool) -> Item:
    """Return a passage with one question."""
    return ask_about(rng, draw_passage(rng, held))


def told(name: object, statement: str) -> str:
    """Return the answer that quotes what a passage tells."""
    return f"{ABOUT.format(name)}说{statement}"


def untold(name: str, what: str = "") -> str:
    """Return the answer that a passage does not tell this about somebody, or that it does not mention them."""
    return f"{ABOUT.format(name)}没有提到{what}，我不知道。"


def refuse(context: str, ask: str, answer: str, key: str) -> Item:
    """Return a question that cannot be answered."""
    return Item("unknown", context, ask, answer, key, "refusal", (), answerable=False)


def ask_missing(rng: Rng, held: bool, passage: Passage) -> Item:
    """Ask what a passage does not say: about somebody else, or something it leaves out."""
    text, key = passage.text, f"reading:{passage.text}"
    if rng.random() < 0.4:
        kind, slot = rng.pick(ABSENT[passage.kind])
        name = str(rng.pick(passage.events)["n"])
        ask = rng.pick([ask for ask in schema(kind).asks[slot] if ask.count("{") == 1])
        return refuse(text, ask.format(n=name), untold(name, "这件事"), key)
    asks = schema(passage.kind).asks
    event, name = rng.pick(passage.events), rng.pick(names(held))
    if name in text:
        return ask_missing(rng, held, passage)
    slot = rng.pick(tuple(s for s in asks if s != "n"))
    ask = rng.pick([ask for ask in asks[slot] if "{n}" in ask])
    return refuse(text, ask.format(**{**event, "n": name}), untold(name), key)


def draw_missing(rng: Rng, held: bool) -> Item:
    """Return a passage with a question that it does not answer."""
    return ask_missing(rng, held, draw_passage(rng, held))
