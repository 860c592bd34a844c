"""Ask a chat model the questions of a task and judge the answers; scores come with their uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanozhchat.chat import Chat
from nanozhchat.compute import Compute
from nanozhchat.conversation import Task
from nanozhchat.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=256)
Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Answer:
    """One question, what was expected, what came, and whether it passed."""

    question: str
    expected: str
    given: str
    correct: bool


@dataclass(frozen=True)
class Score:
    """Share of correct answers with its 95 % interval (Wilson), beside the score of blind guessing."""

    score: float
    chance: float
    low: float
    high: float
    n: int


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927), sound for small n and at 0 and 1."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = correct / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def run_task(chat: Chat, task: Task, compute: Compute, params: SamplingParams = GREEDY) -> list[Answer]:
    """Answer every question; ranks share the questions, and every rank gets all answers in order."""
    mine = range(compute.rank, len(task), compute.world_size)
    prompts = [chat.prompt_ids(task.prompt(i)) for i in mine]
    given = dict(zip(mine, chat.engine.complete(prompts, params), strict=True))
    merged: dict[int, str] = {}
    for part in compute.gather(given):
        merged.update(part)  # type: ignore[call-overload]
    return [
        Answer(task.prompt(i)[-1].content, task.expected(i), merged[i], task.check(i, merged[i]))
        for i in range(len(task))
    ]


def summarize(answers: list[Answer], chance: float) -> Score:
    """Return the score of a task's answers."""
    correct = sum(a.correct for a in answers)
    low, high = wilson(correct, len(answers))
    return Score(correct / max(1, len(answers)), chance, low, high, len(answers))
