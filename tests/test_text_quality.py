"""Repetition: what counts as a loop, and what the figures are."""

import pytest

from nanozhchat.text_quality import distinct, loops, quality

STORY = "从前有一只小猫，名叫小白。小白想学会钓鱼。它每天去河边练习，终于钓到了一条大鱼。大家都为它高兴。"


@pytest.mark.parametrize(("text", "caught"), [
    (STORY, False), (STORY + "好" * 5, False), ("他一步一步一步走上山。", False), ("哈哈哈哈哈哈", False),
    (STORY + "他很高兴，" * 3, True), ("小猫去河边。天黑了。小猫去河边。下雨了。小猫去河边。", True), ("", False),
    ("呜" * 60, True),
])  # fmt: skip
def test_loops_are_told_from_emphasis_and_figures_are_those_of_the_text(text, caught):
    assert loops(text) is caught
    assert [distinct("春夏春夏", 1), distinct("春夏春夏", 2), distinct("春", 2)] == [0.5, 2 / 3, 1.0]
    assert 0 < quality(["春夏春夏春夏", STORY])["repetition_rate"] < 0.5
    assert quality([])["loop_rate"] == 0.0
