"""The arithmetic tool: walks the syntax tree of one expression, never evaluates code, works in any thread.

Numbers with + - * / // % ** and parentheses (× ÷ （ ） too), and a few questions about text: "草莓莓".count("莓"),
.find, .upper, .lower, .replace, len("草莓"), "草莓"[::-1].
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

MAX_CHARS, MAX_NODES, MAX_BITS, MAX_EXPONENT, MAX_TEXT = 500, 100, 4096, 1000, 2000
WRITTEN = str.maketrans("×÷（）＋－＊／，．＝−０１２３４５６７８９", "*/()+-*/,.=-0123456789")
BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
METHODS = ("count", "find", "upper", "lower", "replace")


def calculate(expression: str) -> str:
    """Return the value as text: integers exactly, others to 12 digits.

    Raises ValueError with one line for anything that is not such an expression, or too large.
    """
    if len(expression) > MAX_CHARS:
        raise ValueError(f"the expression has {len(expression)} characters, at most {MAX_CHARS} are allowed")
    try:
        tree = ast.parse(expression.translate(WRITTEN).rstrip("= \n").strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{expression!r} is not an expression") from None
    if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
        raise ValueError(f"the expression has more than {MAX_NODES} parts")
    try:
        value = _value(tree.body)
    except (ArithmeticError, TypeError) as error:
        raise ValueError(f"{expression!r} has no value: {error}") from None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else f"{value:.12g}"
    return str(value)


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=bool() | None):
            pass
        case ast.Constant(value=int() | float() | str() as value):
            return _small(value)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_number(_value(inner))
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return _number(_value(inner))
        case ast.BinOp(left=a, op=op, right=b) if type(op) in BINARY:
            x, y = _number(_value(a)), _number(_value(b))
            if isinstance(op, ast.Pow):
                _check_power(x, y)
            return _small(BINARY[type(op)](x, y))
        case ast.Call(func=ast.Name(id="len"), args=[inner], keywords=[]):
            return len(_text(_value(inner)))
        case ast.Call(func=ast.Attribute(value=inner, attr=name), args=args, keywords=[]) if name in METHODS:
            text, given = _text(_value(inner)), [_text(_value(a)) for a in args]
            if name == "replace" and len(given) == 2 and len(text) * len(given[1]) > MAX_TEXT:
                raise ValueError(f"text longer than {MAX_TEXT} characters is not allowed")
            return _small(getattr(text, name)(*given))
        case ast.Subscript(value=inner, slice=ast.Slice(lower=None, upper=None, step=ast.expr() as step)):
            if _value(step) == -1:
                return _text(_value(inner))[::-1]
    raise ValueError(f"{ast.unparse(node)!r} is not something the calculator knows")


def _check_power(base: float, exponent: float) -> None:
    if abs(exponent) > MAX_EXPONENT or (isinstance(base, int) and base.bit_length() * abs(exponent) > MAX_BITS):
        raise ValueError(f"the power {base} ** {exponent} is too large")


def _number(value: Any) -> Any:
    if not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is not a number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def _small(value: Any) -> Any:
    """Return the value, or raise ValueError if it is too large or not a real number."""
    if isinstance(value, complex):
        raise ValueError("the result is not a real number")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError(f"numbers of more than {MAX_BITS} bits are not allowed")
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise ValueError(f"text longer than {MAX_TEXT} characters is not allowed")
    return value
