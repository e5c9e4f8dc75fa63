"""Numeric exact match, however numbers are written, and the loose metric that is an option."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from lightningrl.tasks.math_tool.metric import CALC_X_TOLERANCE, numeric_match, read_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("24", 24),
        (" 24 ", 24),
        ("24.", 24),
        ("24.0", 24),
        ("1,234.50", Fraction("1234.5")),
        ("1234567", 1234567),
        ("$1,234", 1234),
        ("-$3", -3),
        ("$-3", -3),
        ("5€", 5),
        ("20%", 20),
        ("+5", 5),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("-1/2", Fraction(-1, 2)),
        ("1 1/2", Fraction(3, 2)),
        ("007", 7),
    ],
)
def test_how_a_number_may_be_written(text: str, number: Fraction | int) -> None:
    assert read_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "$",
        ".",
        "-",
        "%",
        "--3",
        "-$-3",
        "1,2",
        "12,34",
        "1 2",
        "24 apples",
        "x = 24",
        "1e3",
        "nan",
        "inf",
        "5/0",
        "1.5/2",
        "٣",
        "²",
    ]
    + ["1" * 101, "9" * 10_000_000, "1/" + "3" * 200],
    ids=lambda text: text[:12],
)
def test_what_is_no_number(text: str) -> None:
    assert read_number(text) is None
    assert not numeric_match(text, "24")


@pytest.mark.parametrize(
    ("answer", "gold", "match"),
    [
        ("24", "24.00", True),
        ("$24", "24", True),
        ("0.5", "1/2", True),
        ("0.333333", "1/3", False),
        ("99", "100", False),
        ("100.0000001", "100", False),
        ("-24", "24", False),
        ("0", "0.0", True),
        (24, "24", False),  # an answer is text
        (None, "24", False),
        (["24"], "24", False),
    ],
)
def test_exact_match(answer: Any, gold: str, match: bool) -> None:
    assert numeric_match(answer, gold) is match


@pytest.mark.parametrize(
    ("answer", "gold", "match"),
    [("99", "100", True), ("98.9", "100", False), ("101", "100", True), ("-99", "-100", True), ("0.001", "0", False), ("x", "1", False)],
)
def test_the_loose_metric(answer: str, gold: str, match: bool) -> None:
    assert numeric_match(answer, gold, relative_tolerance=CALC_X_TOLERANCE) is match


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="gold answer 'many' is not a number"):
        numeric_match("1", "many")
    with pytest.raises(ValueError, match="must be at least 0"):
        numeric_match("1", "1", relative_tolerance=-0.1)
