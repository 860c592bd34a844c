"""The arithmetic tool: walks the syntax tree of one expression, never evaluates code, works in any thread.

Numbers with + - * / // % ** and parentheses (× ÷ （ ） too), and questions about text: "草莓莓".count("莓"),
"草莓".find("莓"), len("草莓"), "草莓"[::-1].
"""

import ast
import operator
from collections.abc import Callable
from typing import Any

MAX_CHARS, MAX_NODES, MAX_BITS, MAX_EXPONENT = 500, 100, 4096, 1000
WRITTEN = str.maketrans("×÷（）＋－＊／，．＝−０１２３４５６７８９", "*/()+-*/,.=-0123456789")
BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip


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
    except ArithmeticError as error:
        raise ValueError(f"{expression!r} has no value: {error}") from None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else f"{value:.12g}"
    return str(value)


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() | float() | str() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_number(inner)
        case ast.BinOp(left=a, op=op, right=b) if type(op) in BINARY:
            x, y = _number(a), _number(b)
            bits = x.bit_length() if isinstance(x, int) else 1
            if isinstance(op, ast.Pow) and (abs(y) > MAX_EXPONENT or bits * abs(y) > MAX_BITS):
                raise ValueError(f"the power {x} ** {y} is too large")
            value = BINARY[type(op)](x, y)
            if isinstance(value, complex) or (isinstance(value, int) and value.bit_length() > MAX_BITS):
                raise ValueError(f"{ast.unparse(node)} is not a real number of at most {MAX_BITS} bits")
            return value
        case ast.Call(func=ast.Name(id="len"), args=[inner], keywords=[]):
            return len(_text(inner))
        case ast.Call(func=ast.Attribute(value=inner, attr="count" | "find" as name), args=[part], keywords=[]):
            return getattr(_text(inner), name)(_text(part))
        case ast.Subscript(value=inner, slice=ast.Slice(lower=None, upper=None, step=ast.expr() as step)):
            if _value(step) == -1:
                return _text(inner)[::-1]
    raise ValueError(f"{ast.unparse(node)!r} is not something the calculator knows")


def _number(node: ast.expr) -> Any:
    if not isinstance(value := _value(node), (int, float)):
        raise ValueError(f"{value!r} is not a number")
    return value


def _text(node: ast.expr) -> str:
    if not isinstance(value := _value(node), str):
        raise ValueError(f"{value!r} is not text")
    return value
