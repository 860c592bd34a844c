"""Built-in Chinese: documents, conversations and held-out questions about one small generated world.

Everything is generated from our own grammars, word lists and facts (`lexicon/*.txt`), deterministic by seed, endless.
The held-out half is decided by content (`world.is_held_out`): names, number pairs, (fact, phrasing) pairs, strings and
plots that no training text ever contains, so `questions` measure generalisation.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nanozhchat.builtin import layouts
from nanozhchat.builtin.checking import is_refusal, make_check
from nanozhchat.builtin.world import Rng
from nanozhchat.conversation import Conversation, Message

__all__ = ["PARTS", "SKILLS", "TALK", "Question", "conversations", "documents", "is_refusal", "questions"]

PARTS: tuple[str, ...] = tuple(layouts.PART_WEIGHTS)
TALK = ("chat", "repeat")  # conversations hold these too, but they are not evaluated
SKILLS: tuple[str, ...] = tuple(skill for skill in layouts.DRAWS if skill not in TALK)
SPLITS = ("train", "val")
MISSES_MAX = 300  # repeats in a row after which a skill counts as exhausted


@dataclass(frozen=True)
class Question:
    """A held-out question. messages ends with the user; chance: score of blind guessing, 0-1."""

    skill: str
    messages: tuple[Message, ...]
    expected: str
    answerable: bool
    chance: float
    check: Callable[[str], bool]


def _choose(kind: str, wanted: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """Return the wanted names; raise ValueError naming the known ones."""
    if wanted is None:
        return tuple(known)
    if isinstance(wanted, str) or not wanted:
        raise ValueError(f"{kind}s={wanted!r}: pass a non-empty list of names out of {', '.join(known)}")
    for name in wanted:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r} of the built-in data; there are: {', '.join(known)}")
    return tuple(wanted)


def _start(seed: int, split: str, view: str) -> tuple[Rng, bool]:
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    return Rng(f"{view}:{split}:{seed}"), split == "val"


def documents(seed: int = 0, *, split: str = "train", parts: Sequence[str] | None = None) -> Iterator[str]:
    """Yield plain-text documents without end. split: "train" or "val"; parts: names out of PARTS, None = all."""
    chosen = _choose("part", parts, PARTS)
    rng, held = _start(seed, split, "documents")
    mixture = layouts.weighted({part: layouts.PART_WEIGHTS[part] for part in chosen})
    return (layouts.document(rng, held, rng.pick(mixture)) for _ in itertools.repeat(None))


def conversations(
    seed: int = 0, *, split: str = "train", skills: Sequence[str] | None = None
) -> Iterator[Conversation]:
    """Yield chat conversations without end. skills: names out of SKILLS and TALK, None = all."""
    chosen = _choose("skill", skills, tuple(layouts.DRAWS))
    rng, held = _start(seed, split, "conversations")
    mixture = layouts.weighted({skill: layouts.SKILL_WEIGHTS[skill] for skill in chosen})
    return (layouts.conversation(rng, held, mixture) for _ in itertools.repeat(None))


def questions(skill: str, n: int, seed: int = 0, *, split: str = "val") -> list[Question]:
    """Return n questions of a skill, no two alike, held out of all training text unless split is "train"."""
    _choose("skill", [skill], SKILLS)
    rng, held = _start(seed, split, f"questions:{skill}")
    found: dict[str, Question] = {}
    misses = 0  # in a row: small skills run out of distinct questions
    while len(found) < n:
        item = layouts.DRAWS[skill](rng, held)
        text = layouts.ask_text(rng, item)
        key = "\n".join((*item.history, text))
        misses = misses + 1 if key in found else 0
        if misses > MISSES_MAX:
            raise ValueError(f"skill {skill!r} ran out of questions after {len(found)}; ask for fewer than n={n}")
        said = zip(itertools.cycle(("user", "assistant")), (*item.history, text))  # ends with the question
        asked = tuple(Message(role, content) for role, content in said)
        found.setdefault(key, Question(item.skill, asked, item.answer, item.answerable, item.chance, make_check(item)))
    return list(found.values())
