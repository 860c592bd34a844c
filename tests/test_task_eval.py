"""Scoring tasks: who knows the answers gets them all, and intervals are honest."""

from unittest.mock import Mock

import pytest

from nanozhchat.task_eval import run_task, summarize, wilson
from tests.conftest import CPU
from tests.fakes import ToyTask


@pytest.mark.parametrize(("wrong", "score"), [([], 1.0), ([1, 4], 0.6)])
def test_wrong_answers_are_counted_where_they_were_given(wrong, score):
    def complete(prompts, params, bar=""):
        assert params.temperature == 0
        return ["不知道" if ids[0] in wrong else f" {ids[0] + 1}\n" for ids in prompts]

    adding = Mock(context=512, complete=complete)
    chat = Mock(engine=adding, prompt_ids=lambda prompt: [int(prompt[-1].content.split("+")[0])])
    answers = run_task(chat, ToyTask([(f"{i}+1", str(i + 1)) for i in range(5)]), CPU)
    assert vars(answers[0]) == {"question": "0+1", "expected": "1", "given": " 1\n", "correct": True,
                                "credit": 1.0, "cut": False}  # fmt: skip
    assert [a.correct for a in answers] == [i not in wrong for i in range(5)]
    total = vars(summarize(answers, 0.1))
    assert (total["score"], total["chance"], total["n"]) == (score, 0.1, 5)
    assert total["low"] < 0.6 < total["high"] or not wrong


@pytest.mark.parametrize(("correct", "n", "low", "high"), [  # by Wilson's formula, to four places
    (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (1, 4, 0.0456, 0.6994),
    (81, 263, 0.2553, 0.3662), (50, 100, 0.4038, 0.5962), (0, 0, 0.0, 1.0),
])  # fmt: skip
def test_the_interval_is_wilsons(correct, n, low, high):
    assert wilson(correct, n) == pytest.approx((low, high), abs=1e-4)
