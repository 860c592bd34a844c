"""Judging answers: one rule per kind of answer, strict about the value and deaf to the wording."""

import re
from collections.abc import Callable

from nanozhchat.builtin.reading import THEREFORE
from nanozhchat.builtin.stories import STORY_CHARS_MIN
from nanozhchat.builtin.world import Item

REFUSAL_HEAD_CHARS = 40  # a refusal says so at once; later text may mention that somebody does not know something
REFUSAL = re.compile(
    r"不知道|不清楚|无法知道|没法知道|不能知道|无从知道|没有提到|没提到|没听说过|没有听说过|不认识|无法回答|没法回答|不了解|不确定|无法预测"
)
LONGER_CHARS = 4  # an expanded sentence gains at least that much
NUMBER = re.compile(r"\d+(?:\.\d+)?")
SENTENCE = re.compile(r"[^。！？…]+[。！？…]?[”’]?")
LISTED = "(?:[、/]|或者?|还是)[“”\"' ]*{0}|{0}[“”\"' ]*(?:[、/]|或者?|还是)"  # one of several, right by chance


def is_refusal(answer: str) -> bool:
    """Say whether an answer declines to answer."""
    return REFUSAL.search(answer[:REFUSAL_HEAD_CHARS]) is not None


def _is_story(answer: str, name: str, aim: str) -> bool:
    text = answer.strip()
    sentences = [s.strip() for s in SENTENCE.findall(text) if s.strip("。！？…”’ \n")]
    # The aim is "mentioned" when most of its characters are: 学会游泳 may well be told as 终于会游泳了.
    told = name in text and len(set(aim) & set(text)) >= 0.7 * len(set(aim))
    whole = len(text) >= STORY_CHARS_MIN and text.endswith(("。", "！", "？", "”", "…"))
    return told and whole and len(set(sentences)) == len(sentences) >= 3


def make_check(item: Item) -> Callable[[str], bool]:
    """Return the judge of answers to an item.

    "contains": all of right, none of wrong. "any": one of right. "number": the last number is the result. "value": the
    number is there. "longer": all of right but the last, which the answer outgrows. "refusal": declines. "story": see
    `_is_story`. Answerable questions must not be declined. Where a conclusion is due, it alone counts.
    """
    rule, right, wrong = item.rule, item.right, item.wrong

    def check(answer: str) -> bool:
        if rule == "refusal":
            return is_refusal(answer)
        if rule == "story":
            return _is_story(answer, *right)
        if is_refusal(answer) and not is_refusal(item.answer):
            return False
        if THEREFORE in item.answer:
            answer = answer.rsplit(THEREFORE, 1)[-1]
        if len(right) == 1 and re.search(LISTED.format(re.escape(right[0]) + r"(?!.*\d)" * (rule == "number")), answer):
            return False
        numbers = NUMBER.findall(answer)
        if rule == "number":
            return numbers[-1:] == [right[0]]
        if rule == "value":
            return right[0] in numbers and not any(w in numbers for w in wrong)
        if rule == "any":
            return any(r in answer for r in right)
        if rule == "longer":
            return all(r in answer for r in right[:-1]) and len(answer) >= len(right[-1]) + LONGER_CHARS
        assert rule == "contains", rule
        return all(r in answer for r in right) and not any(w in answer for w in wrong)

    return check
