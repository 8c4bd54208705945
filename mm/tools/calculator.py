"""Arithmetic as text, evaluated without running it: Python's own syntax tree, of which only numbers and sums are read.

The cost is bounded before a step is taken: the length of the text, the depth of the tree, the digits of whole numbers.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

LONGEST = 1_000  # characters of an expression
DEEPEST = 50  # levels of its tree
DIGITS = 1_000  # of a whole number, at any step
Number = int | float
_GLUED = re.compile(r"\d(?:and|else|for|if|in|is|not|or)")  # "1if": Python's parser warns of it on stderr

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_NAMES: dict[str, float] = {"pi": math.pi, "e": math.e, "tau": math.tau}
# name -> (function, fewest and most arguments)
_FUNCTIONS: dict[str, tuple[Callable[..., Any], int, int]] = {
    **{name: (getattr(math, name), 1, 1) for name in ("sqrt", "exp", "sin", "cos", "tan", "asin", "acos", "atan")},
    **{name: (getattr(math, name), 1, 1) for name in ("floor", "ceil", "log2", "log10", "degrees", "radians")},
    "log": (math.log, 1, 2),
    "abs": (abs, 1, 1),
    "round": (lambda x, digits=None: _rounded(x, digits), 1, 2),
    "min": (min, 2, 100),
    "max": (max, 2, 100),
    "factorial": (lambda n: _factorial(n), 1, 1),
    "gcd": (math.gcd, 2, 2),
}
KNOWN = f"+ - * / // % ** ( ) {' '.join(_FUNCTIONS)} {' '.join(_NAMES)}"


def calculate(expression: str) -> str:
    """The value of an expression as text: + - * / // % ** and ( ), ^ as a power, x and ÷ as signs, a few functions.

    Whole numbers stay exact; others have up to 12 digits. Raises ValueError saying what cannot be read, is not
    arithmetic, has no value, or is too large.
    """
    return written(evaluate(expression))


def written(value: Number) -> str:
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def evaluate(expression: str) -> Number:
    """As `calculate`, as a number."""
    text = expression.strip().rstrip("=").strip().replace("\u00d7", "*").replace("\u00f7", "/").replace("\u2212", "-")
    text = text.replace("^", "**")
    if _GLUED.search(text):
        raise ValueError(f"calculator: {text[:80]!r} is not an expression: a number runs into a word")
    if not text:
        raise ValueError("calculator: the expression is empty")
    if len(text) > LONGEST:
        raise ValueError(f"calculator: an expression of {len(text):,} characters; at most {LONGEST:,} are read")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else "it is nested too deeply, or has too long a number"
        raise ValueError(f"calculator: {text[:80]!r} is not an expression: {reason}") from None
    try:
        return _checked(_value(tree.body, DEEPEST))
    except (ZeroDivisionError, OverflowError, TypeError) as error:
        raise ValueError(f"calculator: {text[:80]!r} has no value: {error}") from None


def _value(node: ast.expr, depth: int) -> Number:
    if depth == 0:
        raise ValueError(f"calculator: the expression is nested more than {DEEPEST} deep")
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _checked(number)
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _UNARY:
            return _UNARY[type(sign)](_value(operand, depth - 1))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left, depth - 1), _value(right, depth - 1))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _BINARY:
            return _checked(_BINARY[type(sign)](_value(left, depth - 1), _value(right, depth - 1)))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _call(name, [_value(argument, depth - 1) for argument in arguments])
    raise ValueError(f"calculator: no arithmetic at character {node.col_offset + 1}; it knows {KNOWN}")


def _call(name: str, arguments: list[Number]) -> Number:
    function, fewest, most = _FUNCTIONS[name]
    if not fewest <= len(arguments) <= most:
        raise ValueError(f"calculator: {name} takes {fewest} to {most} numbers, not {len(arguments)}")
    try:
        return _checked(function(*arguments))
    except ValueError as error:  # "math domain error"
        shown = ", ".join(map(written, arguments))
        raise ValueError(f"calculator: {name}({shown[:80]}) has no value: {error}") from None


def _power(base: Number, exponent: Number) -> Number:
    """Refuses before it multiplies: the digits of a power are known from its logarithm."""
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        if abs(base) > 1 and exponent * math.log10(abs(base)) > DIGITS:
            raise ValueError(f"calculator: a power of more than {DIGITS:,} digits")
    value: Any = base**exponent
    return _checked(value)


def _factorial(n: Number) -> int:
    if not isinstance(n, int) or not 0 <= n <= 400:  # 400! has 869 digits
        raise ValueError("factorial takes a whole number from 0 to 400")
    return math.factorial(n)


def _rounded(x: Number, digits: Number | None) -> Number:
    if digits is None:
        return round(x)
    if not isinstance(digits, int) or abs(digits) > DIGITS:  # Python would make a number of so many digits
        raise ValueError(f"round takes at most {DIGITS:,} digits")
    return round(x, digits)


def _checked(value: Number | complex) -> Number:
    if isinstance(value, complex):
        raise ValueError("calculator: a root of a negative number has no real value")
    if isinstance(value, int):
        if value.bit_length() > DIGITS * math.log2(10):
            raise ValueError(f"calculator: a number of more than {DIGITS:,} digits")
    elif not math.isfinite(value):
        raise ValueError("calculator: the value is too large, or no number")
    return value
