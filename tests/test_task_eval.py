"""Scoring tasks: who knows the answers gets them all, and intervals are honest."""

import pytest

from nanozhchat.conversation import Message
from nanozhchat.task_eval import run_task, summarize, wilson
from tests.conftest import CPU


class Sums:
    """Five additions."""

    name, chance = "sums", 0.1

    def __len__(self):
        return 5

    def prompt(self, index):
        return (Message("user", f"{index}+1"),)

    def expected(self, index):
        return str(index + 1)

    def check(self, index, answer):
        return answer.strip() == self.expected(index)


class KnowingChat:
    """Stands for Chat and its engine: adds, except where told to fail; asked greedily and in batches."""

    context = 512

    def __init__(self, wrong=()):
        self.engine, self.wrong = self, wrong

    def prompt_ids(self, prompt):
        return [int(prompt[-1].content.split("+")[0])]

    def complete(self, prompts, params):
        assert params.temperature == 0
        return ["不知道" if ids[0] in self.wrong else f" {ids[0] + 1}\n" for ids in prompts]


@pytest.mark.parametrize(("wrong", "score"), [([], 1.0), ([1, 4], 0.6)])
def test_wrong_answers_are_counted_where_they_were_given(wrong, score):
    answers = run_task(KnowingChat(wrong), Sums(), CPU)
    assert vars(answers[0]) == {"question": "0+1", "expected": "1", "given": " 1\n", "correct": True,
                                "credit": 1.0, "cut": False}  # fmt: skip
    assert [a.correct for a in answers] == [i not in wrong for i in range(5)]
    total = vars(summarize(answers, 0.1))
    assert (total["score"], total["chance"], total["n"]) == (score, 0.1, 5)
    assert total["low"] < 0.6 < total["high"] or not wrong


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),  # by Wilson's formula, to four places
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (1, 4, 0.0456, 0.6994),
     (81, 263, 0.2553, 0.3662), (50, 100, 0.4038, 0.5962), (0, 0, 0.0, 1.0)],
)  # fmt: skip
def test_the_interval_is_wilsons(correct, n, low, high):
    assert wilson(correct, n) == pytest.approx((low, high), abs=1e-4)
