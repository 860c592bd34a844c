"""What cannot be known, and its answerable twins: the same question with the information given.

A model that only learns to refuse private questions refuses too much; the twins share every surface shape.
"""

from nanozhchat.builtin import reading
from nanozhchat.builtin.reading import refuse
from nanozhchat.builtin.world import Draw, Item, Rng, cells, combos, foreign, lines, names, places, words

CHANCE = 0.55  # share of unknowable questions: refusing everything scores that


def _tell(context: str, ask: str, answer: str, value: str, key: str, wrong: tuple[str, ...] = ()) -> Item:
    """Return a twin: the answer repeats the statement that holds the value."""
    return Item("unknown", context, ask, answer, key, "contains", (value,), wrong)


def _date(rng: Rng) -> str:
    return f"{rng.below(12) + 1}月{rng.below(28) + 1}日"


def _private_values(rng: Rng, held: bool, choices: str) -> dict[str, object]:
    options = choices.split()
    return {
        "v": rng.pick(options) if options else "", "d": rng.below(9000) + 1000, "a": rng.below(80) + 11,
        "h": rng.below(6) + 5, "b": _date(rng), "p": rng.pick(places(held, "home_kind")),
        "j": rng.pick(words("names", "jobs")), "o": rng.pick(names(held)),
        "w": rng.pick(words("names", "animal_names")),
    }  # fmt: skip


def draw_private(rng: Rng, held: bool) -> Item:
    """Ask for something private about a person: told nothing, told about somebody else, or told."""
    ask, say, choices = cells(rng.pick(lines("unknown", "private")))
    n, k = rng.two(names(held))
    key = f"unknown:{ask}|{n}"
    kind = rng.random()
    untold, about_another = (0.33, 0.45) if held else (0.25, 0.5)  # the hardest kind needs the most examples
    if kind < untold:
        return refuse("", ask.format(n=n), "我不知道，这是私事，没有人告诉过我。", key)
    values = _private_values(rng, held, choices)
    if n in say.format(n="", **values):
        return draw_private(rng, held)
    if kind < about_another:
        return refuse(say.format(n=k, **values), ask.format(n=n), reading.untold(n), key)
    told = say.format(n=n, **values)
    slot = next(slot for slot in "vdahbpjow" if "{" + slot + "}" in say)
    right = str(values[slot])
    if kind < 0.75:
        return _tell(told, ask.format(n=n), reading.told(n, told), right, key)
    others = _private_values(rng, held, choices)
    other, value = say.format(n=k, **others), str(others[slot])
    context = told + other if rng.random() < 0.5 else other + told
    wrong = () if value in told else (value,)
    return _tell(context, ask.format(n=n), reading.told(n, told), right, key, wrong)


def draw_future(rng: Rng, held: bool) -> Item:
    """Ask about the future."""
    shapes, whens = lines("unknown", "future"), words("unknown", "future_when")
    i, j = rng.pick(combos(shapes, whens, held))
    shape, when, n = shapes[i], whens[j], rng.pick(names(held))
    city = rng.pick(places(held)) if rng.random() < 0.7 else rng.pick(words("names", "cities"))
    ask, key = shape.format(q=when, n=n, c=city), f"unknown:{shape}|{n}|{city}|{when}"
    return refuse("", ask, "我不知道，将来的事没有人能预先知道。", key)


def draw_invented(rng: Rng, held: bool) -> Item:
    """Ask about something that does not exist, or that exists in the passage only."""
    ask, say, value, what = cells(rng.pick(lines("unknown", "invented")))
    x, y = rng.two(foreign(held))
    key = f"unknown:{ask}|{x}"
    if rng.random() < 0.5:
        return refuse("", ask.format(x=x), f"我不知道，我没听说过{what.format(x=x)}。", key)
    if "{" in value:
        numbers = {"a": rng.below(900) + 10, "d": rng.below(9000) + 100, "k": rng.below(9) + 2}
        letter = "ABCDEFGHKLMN"[rng.below(12)]
        filled = value.format(y=y, **numbers, z=letter, b=_date(rng), o=rng.pick(names(held)))
    else:
        filled = rng.pick(value.split())
    told = say.format(x=x, v=filled)
    return _tell(told, ask.format(x=x), told, filled, key)


def draw_self(rng: Rng, held: bool) -> Item:
    """Ask something about the asker that was never said; a name makes every instance its own."""
    shape, n = rng.pick(lines("unknown", "self")), rng.pick(names(held))
    context = f"我叫{n}。"
    if "叫什么名字" in shape:
        return _tell(context, shape, f"你叫{n}。", n, f"unknown:{shape}|{n}")
    return refuse(context, shape, "我不知道，你还没有告诉我。", f"unknown:{shape}|{n}")


def draw_who(rng: Rng, held: bool) -> Item:
    """Ask who an unheard-of person is, or one just described."""
    shape = rng.pick(lines("unknown", "who"))
    n, k = rng.two(names(held))
    key = f"unknown:{shape}|{n}"
    if rng.random() < 0.5:
        return refuse("", shape.format(n=n), f"我不知道，我不认识{n}。", key)
    job, place = rng.pick(words("names", "jobs")), rng.pick(places(held))
    told = f"{n}是{place}的一名{job}。"
    if rng.random() < 0.3:
        return refuse(told, shape.format(n=k), reading.untold(k), key)
    return _tell(told, shape.format(n=n), reading.told(n, told), job, key)


# Up to which random number each is drawn: to train on, and held out. To train on there is more of what is learnt last,
# which is to see that a name is none of those in a passage.
KINDS: tuple[tuple[Draw, tuple[float, float]], ...] = (
    (draw_private, (0.36, 0.42)), (draw_future, (0.42, 0.52)), (draw_invented, (0.56, 0.70)), (draw_self, (0.60, 0.75)),
    (draw_who, (0.70, 0.82)), (reading.draw_missing, (1.0, 0.90)), (reading.draw, (1.0, 1.0)),
)  # fmt: skip


def draw(rng: Rng, held: bool) -> Item:
    """Return an unknowable question, or its answerable twin, in held-out questions about half of the time."""
    dice = rng.random()
    kind = next(kind for kind, limits in KINDS if dice < limits[held])
    return kind(rng, held)._replace(skill="unknown", chance=CHANCE)
