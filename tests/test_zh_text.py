"""Rules for scoring: what counts as the same number, the chosen letter, the overlap of two spans."""

from fractions import Fraction

import pytest

from nanozhchat.zh_text import chosen, final_number, fold, span_f1

FOUR = ("苹果", "香蕉", "不是苹果", "都不是")


@pytest.mark.parametrize(("answer", "number"), [
    ("一共有 5,600 个。", 5600), ("他先买了3个，又买了４个，共７个", 7), ("3+4=7\n#### 7", 7), ("1/0", None),
    ("答案是12%。因为一共25个", Fraction(12, 100)), ("\\boxed{\\frac{3}{4}}", Fraction(3, 4)),
    ("三分之一", Fraction(1, 3)), ("百分之二十五", Fraction(1, 4)), ("百分之25", Fraction(1, 4)),
    ("答案：二百零五只", 205), ("2/6", Fraction(1, 3)), ("The answer is -3.50.", Fraction(-7, 2)), ("我不知道", None),
    ("", None), ("答案：3+4=7。还剩 2", 7), ("十", 10), ("十五", 15), ("三百二十五", 325), ("一千零二", 1002),
    ("一亿零五万", 100_050_000), ("答案是2万", 20_000), ("1.5 万元", 15_000), ("一点五万", 15_000), ("3亿", 3 * 10**8),
     ("三万亿", 3 * 10**12), ("二〇二六", 2026), ("万", 10_000),
    ("三点一四", Fraction(314, 100)), ("零", 0),
])  # fmt: skip
def test_the_number_an_answer_ends_in_is_found_in_digits_or_chinese(answer, number):
    assert final_number(answer) == number


@pytest.mark.parametrize(("answer", "index"), [
    ("B", 1), ("b.", 1), ("B，因为 A 不对", 1), ("Ｂ．", 1), ("（C）", 2), ("答案是 B，因为 A 不对", 1),
     ("故选：D", 3),
    ("The answer is (C).", 2), ("\\boxed{A}", 0), ("香蕉", 1), ("我想是香蕉吧。", 1), ("不是苹果", 2),
    ("A 和 B 都行", None), ("答案：E", None), ("不知道", None), ("", None),
])  # fmt: skip
def test_the_chosen_letter_text_or_set_of_letters_is_found(answer, index):
    assert chosen(answer, FOUR) == index
    sets = (("BD", 3), ("答案：D、B", 3), ("选B", 1), ("A", 0), ("ABC", None))
    assert [chosen(letters, ("A", "B", "C", "BD")) for letters, _ in sets] == [i for _, i in sets]


@pytest.mark.parametrize(("answer", "reference", "f1"), [
    ("４分钟。", "4分钟", 1.0), ("是踢爆", "踢爆", 0.8), ("Nexon 公司", "nexon", 0.5), ("", "踢", 0), ("甲", "丙", 0),
])  # fmt: skip
def test_spans_are_compared_by_their_longest_common_run_and_width_and_case_do_not_count(answer, reference, f1):
    assert span_f1(answer, reference) == pytest.approx(f1)
    assert fold(" ＡＢＣ，１２３ ") == "abc,123"
