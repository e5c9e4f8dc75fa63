"""A calculator for agents: text in, text out, at once, whatever the text is.

    sum     = product  (("+" | "-") product)*
    product = signed   (("*" | "/" | "//" | "%") signed)*
    signed  = ("+" | "-") signed | power
    power   = atom ("**" signed)?
    atom    = number | "(" sum ")"
    number  = digits, with commas between thousands or without, and a decimal point somewhere or nowhere

It means what Python's operators mean (`-2**2` is -4, `//` and `%` round down), on exact fractions. Nothing is evaluated that
this grammar does not know. Operators wait on a stack, not in recursion, so that no nesting exhausts anything.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from fractions import Fraction

MAX_CHARS = 200
MAX_DEPTH = 20  # parentheses open at once
MAX_DIGITS = 30  # of a number, and of the numerator and denominator of every value on the way
MAX_EXPONENT = 100
DECIMALS = 6  # of a result that is no integer

_LIMIT = 10**MAX_DIGITS
_TOKEN = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?(?![0-9,])|[0-9]+(?:\.[0-9]*)?|\.[0-9]+|\*\*|//|[-+*/%()]")


class CalculatorError(ValueError):
    """Why an expression has no value, as a few words for whoever wrote it."""


def calculate(expression: str) -> str:
    """The value as text: an integer, or a decimal rounded to `DECIMALS` places. What has no value gives `error: …`.

    Decimals smaller than one are rounded to as many significant digits, so that only 0 prints as 0.
    """
    try:
        return as_text(evaluate(expression))
    except CalculatorError as error:
        return f"error: {error}"


def evaluate(expression: str) -> Fraction:
    """The exact value, except of powers with a fractional exponent, which are right to 12 digits.

    Raises `CalculatorError` for an expression of more than `MAX_CHARS` characters, `MAX_DEPTH` open parentheses or
    `MAX_DIGITS` digits, for an exponent beyond ±`MAX_EXPONENT`, for a division by zero, and for what is no expression.
    """
    stacks = _Stacks()
    operand_next = True
    depth = 0
    for token in _tokens(expression):
        if operand_next:
            if token in ("+", "-"):
                stacks.operators.append(_SIGNS[token])
            elif token == "(":
                depth += 1
                if depth > MAX_DEPTH:
                    raise CalculatorError(f"more than {MAX_DEPTH} open parentheses")
                stacks.operators.append(_OPEN)
            elif token in _BINARY or token == ")":
                raise CalculatorError(f"a number is missing before {token}")
            else:
                stacks.values.append(_number(token))
                operand_next = False
        elif token in _BINARY:
            operator = _BINARY[token]
            stacks.apply_down_to(operator.rank + operator.from_the_right)
            stacks.operators.append(operator)
            operand_next = True
        elif token == ")":
            depth -= 1
            if depth < 0:
                raise CalculatorError(") without (")
            stacks.apply_down_to(_OPEN.rank + 1)
            stacks.operators.pop()
        else:
            raise CalculatorError(f"an operator is missing before {token[:MAX_DIGITS]}")
    if operand_next:
        raise CalculatorError("a number is missing at the end")
    if depth:
        raise CalculatorError("( without )")
    stacks.apply_down_to(0)
    return stacks.values[0]


def as_text(value: Fraction) -> str:
    """An integer in full, or a decimal without trailing zeros."""
    if value.denominator == 1:
        return str(value.numerator)
    places = DECIMALS
    while abs(value) * 10**places < 10 ** (DECIMALS - 1) and abs(value) < 1:
        places += 1
    scaled = round(abs(value) * 10**places)
    digits = str(scaled).rjust(places + 1, "0")
    decimal = f"{digits[:-places]}.{digits[-places:]}".rstrip("0").rstrip(".")
    return f"-{decimal}" if value < 0 else decimal


def _tokens(expression: str) -> Iterator[str]:
    if len(expression) > MAX_CHARS:
        raise CalculatorError(f"more than {MAX_CHARS} characters")
    at = 0
    while at < len(expression):
        if expression[at] in " \t\n":
            at += 1
            continue
        match = _TOKEN.match(expression, at)
        if match is None:
            raise CalculatorError(f"{ascii(expression[at])} is not part of a number or an operator")
        yield match[0]
        at = match.end()


def _number(token: str) -> Fraction:
    digits = token.replace(",", "")
    if len(digits) > MAX_DIGITS:
        raise CalculatorError(f"a number of more than {MAX_DIGITS} digits")
    return Fraction(digits if digits[0] != "." else "0" + digits)


def _checked(value: Fraction) -> Fraction:
    if abs(value.numerator) >= _LIMIT or value.denominator >= _LIMIT:
        raise CalculatorError(f"a value of more than {MAX_DIGITS} digits")
    return value


def _nonzero(value: Fraction) -> Fraction:
    if not value:
        raise CalculatorError("division by zero")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if abs(exponent) > MAX_EXPONENT:
        raise CalculatorError(f"an exponent of more than {MAX_EXPONENT}")
    if exponent < 0:
        _nonzero(base)
    if exponent.denominator == 1:
        digits = max(len(str(abs(base.numerator))), len(str(base.denominator))) - 1
        if digits * abs(exponent) > MAX_DIGITS:  # known before it is computed
            raise CalculatorError(f"a value of more than {MAX_DIGITS} digits")
        return Fraction(base ** int(exponent))
    if base < 0:
        raise CalculatorError("a root of a negative number")
    try:
        root = Fraction(f"{float(base) ** float(exponent):.12g}")
    except OverflowError:
        root = Fraction(0)
    if base and not root:  # too large for a float, or too small
        raise CalculatorError(f"a value of more than {MAX_DIGITS} digits")
    return root


@dataclasses.dataclass(frozen=True)
class _Operator:
    rank: int  # what binds tighter has more
    apply: Callable[..., Fraction]
    operands: int = 2
    from_the_right: bool = False


_OPEN = _Operator(-1, _checked, 0)
_SIGNS = {"-": _Operator(3, lambda a: -a, 1), "+": _Operator(3, lambda a: a, 1)}
_BINARY = {
    "+": _Operator(1, lambda a, b: a + b),
    "-": _Operator(1, lambda a, b: a - b),
    "*": _Operator(2, lambda a, b: a * b),
    "/": _Operator(2, lambda a, b: a / _nonzero(b)),
    "//": _Operator(2, lambda a, b: Fraction(a // _nonzero(b))),
    "%": _Operator(2, lambda a, b: a % _nonzero(b)),
    "**": _Operator(4, _power, from_the_right=True),
}


class _Stacks:
    """Values, and the operators that wait for the right-hand side to be whole."""

    def __init__(self) -> None:
        self.values: list[Fraction] = []
        self.operators: list[_Operator] = []

    def apply_down_to(self, rank: int) -> None:
        """Applies the waiting operators of at least this rank, the last first."""
        while self.operators and self.operators[-1].rank >= rank:
            operator = self.operators.pop()
            operands = self.values[-operator.operands :]
            self.values[-operator.operands :] = [_checked(operator.apply(*operands))]
