"""The calculator: what it computes, and that nothing else gets through it."""

import threading

import pytest

from nanozhchat.calculator import calculate
from tests.conftest import refused


@pytest.mark.parametrize(("expression", "value"), [
    ("37+48", "85"), ("（3 + 4）× 5 ÷ 2 =", "17.5"), ("2**100", str(2**100)), ("-7//2", "-4"), ("7 % 3", "1"),
    ("6/2", "3"), ("0.1+0.2", "0.3"), ("１２＋１", "13"), ('"草莓莓".count("莓")', "2"), ('len("春天来了")', "4"),
    ('"你好"[::-1]', "好你"), ('"草莓".find("莓")', "1"),
])  # fmt: skip
def test_it_computes(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize("expression", [
    "", "1/0", "1+", "abc", "True", "None", "__import__('os')", "(1).__class__", "'a'.__class__", "[1]",
    "1 if 1 else 2", "9**9**9", "2**10000", "10.0**400", "(-8)**0.5", "'a'*9", "-'a'", "1+'a'", "'a'.format('b')",
    "'a'.count(1)", "'a'.count()", "'{0.__class__}'.format(1)", "lambda: 1", "(" * 400, "1+" * 200 + "1", "1" * 501,
    "'a'[0]", "'a'.upper()", "10**400 + 0.5", "len(1)", "f'{1}'", "1; 2", "x:=1", "\0",
])  # fmt: skip
def test_all_else_is_refused_in_one_line(expression):
    assert "\n" not in str(refused(None, calculate, expression))


def test_it_works_in_any_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(calculate("12*12")))
    thread.start()
    thread.join()
    assert found == ["144"]
