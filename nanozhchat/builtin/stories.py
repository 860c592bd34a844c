"""Short stories: a hero, an aim and its reason, an obstacle, help, an attempt that answers the obstacle, an ending."""

from functools import cache
from typing import NamedTuple

from nanozhchat.builtin.world import Item, Rng, cells, is_held_out, lines, people, places, words

STORY_CHARS_MIN = 60
OPEN_SHARE = 0.1  # of the stories in training: asked without name and aim, as people do first
SWIM, SWIMMERS = "学会游泳", ("小鸭子", "小青蛙", "小乌龟", "小企鹅", "小海豚")  # who need not learn it
MEASURES = {"小马": "匹", "小牛": "头", "小象": "头", "小猪": "头"}  # of the other animals: 只
HUMAN_KINDS = ("小男孩", "小女孩", "年轻人", "学生", "姑娘", "孩子")
HUMAN_PRONOUN = {"小男孩": "他", "小女孩": "她", "姑娘": "她"}


class Plot(NamedTuple):
    """One way to an aim: why it was wanted, what stood in the way, what was done, what came of it, how it ended."""

    aim: str
    why: str
    block: str
    attempt: str
    result: str
    end: str


@cache
def plots() -> tuple[Plot, ...]:
    """Return every (aim, obstacle) plot of `lexicon/plots.txt`.

    There, "= aim" opens a group; then its reason, one "obstacle | attempt | result" a line, and "> ending".
    """
    found: list[Plot] = []
    aim = why = ""
    blocks: list[tuple[str, ...]] = []
    for line in lines("plots", "aims"):
        if line.startswith("= "):
            aim, why, blocks = line[2:], "", []
        elif line.startswith("> "):
            found += [Plot(aim, why, block, attempt, result, line[2:]) for block, attempt, result in blocks]
        elif not why:
            why = line
        else:
            blocks.append(cells(line))
    return tuple(found)


@cache
def _combos(held: bool) -> tuple[tuple[str, Plot], ...]:
    """Return (hero kind, plot) of one split."""
    return tuple(
        (kind, plot)
        for kind in (*words("names", "animal_heroes"), *HUMAN_KINDS)
        for plot in plots()
        if is_held_out(f"story:{kind}|{plot.aim}") is held
        and not plot.aim.endswith(kind)
        and not (plot.aim == SWIM and kind in SWIMMERS)
    )


def _hero(rng: Rng, held: bool, kind: str) -> tuple[str, str]:
    """Return (name, pronoun) for a hero of a kind."""
    if kind not in HUMAN_KINDS:
        return rng.pick(words("names", "animal_names")), "它"
    while (hero := rng.pick(people(held))).pronoun != HUMAN_PRONOUN.get(kind, hero.pronoun):
        pass
    return hero


def draw(rng: Rng, held: bool) -> Item:
    """Ask for a story about a named hero with an aim."""
    kind, plot = rng.pick(_combos(held))
    name, he = _hero(rng, held, kind)
    if he == "它":
        while (other := rng.pick(words("names", "animal_heroes"))) == kind:
            pass
        intro = f"一{MEASURES.get(kind, '只')}{kind}"
    else:
        other = rng.pick(people(held)).name[0] + rng.pick(words("names", "titles"))
        intro = f"一个{kind}"
    told = {"w": plot.why, "b": plot.block, "y": plot.attempt, "r": plot.result, "e": plot.end}
    slots = {slot: text.format(h=he) for slot, text in told.items()}
    # A helper's name begins alike for all: where it begins as the hero's does, models say the hero's, and loop.
    slots |= {"n": name, "h": he, "k": "邻居" + other, "d": intro, "f": kind + name, "a": plot.aim}
    slots["p"] = rng.pick(places(held, "village_kind"))
    parts = ("open", "want", "block", "help", "try", "result", "end", "moral")
    shape = "".join([rng.pick(lines("plots", part)) for part in parts])
    open_ask = not held and rng.random() < OPEN_SHARE  # without name and aim there is nothing to judge
    ask = rng.pick(lines("plots", "ask_open" if open_ask else "ask")).format(**slots, c=kind)
    key = f"story:{kind}|{plot.aim}"
    return Item("story", "", ask, shape.format(**slots), key, "story", (name, plot.aim))
