"""Scoring tasks: who knows the answers gets them all, and intervals are honest."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from nanozhchat.compute import Compute
from nanozhchat.conversation import Message
from nanozhchat.sampling import SamplingParams
from nanozhchat.task_eval import Answer, run_task, summarize, wilson

CPU = Compute(torch.device("cpu"))


class Sums:
    """n additions."""

    name, chance = "sums", 0.1

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def prompt(self, index: int) -> Sequence[Message]:
        return (Message("user", f"{index}+1"),)

    def expected(self, index: int) -> str:
        return str(index + 1)

    def check(self, index: int, answer: str) -> bool:
        return answer.strip() == self.expected(index)


class KnowingChat:
    """Stands for Chat and its engine: adds, except where told to fail; asked greedily and in batches."""

    def __init__(self, wrong: Sequence[int] = ()) -> None:
        self.engine, self.wrong = self, wrong

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        return [int(prompt[-1].content.split("+")[0])]

    def complete(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[str]:
        assert params.temperature == 0
        return ["不知道" if ids[0] in self.wrong else f" {ids[0] + 1}\n" for ids in prompts]


def test_a_chat_that_knows_every_answer_scores_one() -> None:
    answers = run_task(KnowingChat(), Sums(7), CPU)  # type: ignore[arg-type]
    assert [(a.question, a.expected, a.given, a.correct) for a in answers[:2]] == [
        ("0+1", "1", " 1\n", True),
        ("1+1", "2", " 2\n", True),
    ]
    assert summarize(answers, 0.1).score == 1.0


def test_wrong_answers_are_counted_where_they_were_given() -> None:
    answers = run_task(KnowingChat(wrong=[1, 4]), Sums(5), CPU)  # type: ignore[arg-type]
    assert [a.correct for a in answers] == [True, False, True, True, False]
    score = summarize(answers, 0.1).to_dict()
    assert (score["score"], score["chance"], score["n"]) == (0.6, 0.1, 5)
    assert score["low"] < 0.6 < score["high"]


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [  # by Wilson's formula, to four places
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 4, 0.0456, 0.6994),
        (81, 263, 0.2553, 0.3662),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_the_interval_is_wilsons(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=1e-4)


def test_no_questions_tell_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert summarize([], 0.25).n == 0


def test_more_questions_narrow_the_interval() -> None:
    widths = [high - low for low, high in (wilson(n // 2, n) for n in (4, 16, 64, 256))]
    assert widths == sorted(widths, reverse=True)


def test_an_answer_keeps_what_people_want_to_see() -> None:
    assert vars(Answer("问", "答", "猜", False)) == {
        "question": "问",
        "expected": "答",
        "given": "猜",
        "correct": False,
    }
