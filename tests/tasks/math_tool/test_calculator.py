"""The calculator means what Python means, exactly, and answers whatever it is given at once."""

from __future__ import annotations

import operator
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl.tasks.math_tool.calculator import CalculatorError, as_text, calculate, evaluate

OPERATORS: dict[str, Any] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": lambda a, b: Fraction(a // b),
    "%": operator.mod,
}
RANKS = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "%": 2}
Tree = Any  # a number as text, ("-", tree) or (tree, operator, tree)

numbers = st.one_of(st.integers(0, 999).map(str), st.decimals(0, 99, places=2).map(str))
trees: st.SearchStrategy[Tree] = st.recursive(
    numbers,
    lambda inner: st.one_of(st.tuples(inner, st.sampled_from(sorted(OPERATORS)), inner), st.tuples(st.just("-"), inner)),
    max_leaves=9,
)


def value_of(tree: Tree) -> Fraction:
    """By Python's fractions, straight from the tree."""
    match tree:
        case ("-", inner):
            return -value_of(inner)
        case (left, sign, right):
            return OPERATORS[sign](value_of(left), value_of(right))
        case _:
            return Fraction(tree)


def written(tree: Tree, rank: int = 0) -> str:
    """With as few parentheses as the operators' ranks allow."""
    match tree:
        case ("-", inner):
            text, own = f"-{written(inner, 3)}", 3
        case (left, sign, right):
            text, own = f"{written(left, RANKS[sign])} {sign} {written(right, RANKS[sign] + 1)}", RANKS[sign]
        case _:
            return str(tree)
    return f"({text})" if own < rank else text


@pytest.mark.slow
@settings(max_examples=400)
@given(trees)
def test_random_expressions_are_what_fractions_say(tree: Tree) -> None:
    try:
        expected = value_of(tree)
    except ZeroDivisionError:
        assert calculate(written(tree)) == "error: division by zero"
        return
    assert evaluate(written(tree)) == expected
    assert evaluate(written(tree).replace(" ", "")) == expected


@given(st.integers(-9, 9), st.integers(-9, 9))
def test_powers_of_integers(base: int, exponent: int) -> None:
    expression = f"({base})**{exponent}"
    if base == 0 and exponent < 0:
        assert calculate(expression) == "error: division by zero"
    else:
        assert evaluate(expression) == Fraction(base) ** exponent


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("48/2", "24"),
        ("( 7.0 - 2.0 )", "5"),
        ("-2**2", "-4"),
        ("2**-1", "0.5"),
        ("2**-1**2", "0.5"),
        ("2**3**2", "512"),
        ("--3", "3"),
        ("+-+3", "-3"),
        ("3--7", "10"),
        ("7//2", "3"),
        ("-7//2", "-4"),
        ("-7%3", "2"),
        ("5.5%2", "1.5"),
        ("8-3-2", "3"),
        ("48/2/3", "8"),
        ("2+3*4", "14"),
        (".5+5.", "5.5"),
        ("1,000*3", "3000"),
        ("1,234,567.50+0", "1234567.5"),
        ("0.1+0.2", "0.3"),
        ("1/3*3", "1"),
        ("1/3", "0.333333"),
        ("200/3", "66.666667"),
        ("-2/3", "-0.666667"),
        ("0-0.5", "-0.5"),
        ("1/3000", "0.000333333"),
        ("2**0.5", "1.414214"),
        ("4**0.5", "2"),
        ("0**0", "1"),
        ("10**29", "1" + "0" * 29),
        ("-0", "0"),
        ("\t1 +\n2 ", "3"),
        ("(" * 20 + "1" + ")" * 20, "1"),
    ],
)
def test_what_an_expression_gives(expression: str, result: str) -> None:
    assert calculate(expression) == result


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("9**9**9", "error: an exponent of more than 100"),
        ("9**99", "error: a value of more than 30 digits"),
        ("2**100*2**100", "error: a value of more than 30 digits"),
        ("((2**99)**99)**99", "error: a value of more than 30 digits"),
        ("9" * 31, "error: a number of more than 30 digits"),
        ("0." + "0" * 40 + "1", "error: a number of more than 30 digits"),
        ("1" * 10_000_000, "error: more than 200 characters"),
        ("1+" * 5_000_000 + "1", "error: more than 200 characters"),
        ("(" * 100_000, "error: more than 200 characters"),
        ("(" * 90 + "1" + ")" * 90, "error: more than 20 open parentheses"),
        ("-" * 199, "error: a number is missing at the end"),
        ("__import__('os')", "error: '_' is not part of a number or an operator"),
        ("nan", "error: 'n' is not part of a number or an operator"),
        ("inf", "error: 'i' is not part of a number or an operator"),
        ("1e5", "error: 'e' is not part of a number or an operator"),
        ("0x10", "error: 'x' is not part of a number or an operator"),
        ("1_000", "error: '_' is not part of a number or an operator"),
        ("٣+1", "error: '\\u0663' is not part of a number or an operator"),
        ("3×4", "error: '\\xd7' is not part of a number or an operator"),
        ("1\x00", "error: '\\x00' is not part of a number or an operator"),
        ("1\u00a0+1", "error: '\\xa0' is not part of a number or an operator"),
        ("1/0", "error: division by zero"),
        ("1//(3-3)", "error: division by zero"),
        ("1%0", "error: division by zero"),
        ("0**-1", "error: division by zero"),
        ("0**-0.5", "error: division by zero"),
        ("(0-8)**0.5", "error: a root of a negative number"),
        ("(10**29)**99.5", "error: a value of more than 30 digits"),
        ("0.0001**99.5", "error: a value of more than 30 digits"),
        ("", "error: a number is missing at the end"),
        ("()", "error: a number is missing before )"),
        ("5%", "error: a number is missing at the end"),
        ("1*/2", "error: a number is missing before /"),
        ("1 2", "error: an operator is missing before 2"),
        ("2(3)", "error: an operator is missing before ("),
        ("1-(2", "error: ( without )"),
        ("1)", "error: ) without ("),
        ("1.2.3", "error: an operator is missing before .3"),
        ("1,00", "error: ',' is not part of a number or an operator"),
        (".", "error: '.' is not part of a number or an operator"),
    ],
    ids=lambda text: text[:20],
)
def test_what_has_no_value_is_one_clear_error(expression: str, complaint: str) -> None:
    assert calculate(expression) == complaint
    with pytest.raises(CalculatorError):
        evaluate(expression)


@given(st.text(max_size=60) | st.text("0123456789.,+-*/%() ", max_size=60))
def test_any_text_gets_one_line(text: str) -> None:
    result = calculate(text)
    assert result.isascii() and "\n" not in result and len(result) < 80


@given(st.fractions(-1000, 1000, max_denominator=10**6))
def test_printed_values_are_read_again_and_near(value: Fraction) -> None:
    text = as_text(value)
    assert calculate(text) == text
    near = Fraction(1, 2 * 10**6) if abs(value) >= Fraction(1, 10) else abs(value) / 10**5
    assert abs(evaluate(text) - value) <= near
    assert (text == "0") == (value == 0) and text != "-0"
