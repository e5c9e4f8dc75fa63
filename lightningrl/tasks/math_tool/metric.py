"""Numeric exact match: whether an answer is the right number, however it is written.

GSM8K's evaluation (arXiv 2110.14168) compares the final number after taking out commas. Calc-X (arXiv 2305.15017) and the calculator
example of arXiv 2508.03680 let an answer be off by a hundredth of the right one, which takes 99 for 100; that is an option here.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

CALC_X_TOLERANCE = Fraction(1, 100)

_MAX_CHARS = 100
_NUMBER = re.compile(
    r"""(?P<sign>[-+]?)\s*[$€£]?\s*(?P<inner>[-+]?)
        (?:(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?P<decimals>\.[0-9]*)?
         |(?:(?P<units>[0-9]+)\s+)?(?P<numerator>[0-9]+)\s*/\s*(?P<denominator>[0-9]+))
        \s*(?:%|[$€£])?\.?""",
    re.VERBOSE,
)


def numeric_match(answer: Any, gold: str, *, relative_tolerance: Fraction | float = 0) -> bool:
    """Whether |answer − gold| ≤ relative_tolerance · |gold|; with the default 0, whether the numbers are equal.

    Args:
      answer: text, or anything else, which is no number. gold: text of a number.
      relative_tolerance: at least 0; `CALC_X_TOLERANCE` is the loose metric.

    Raises `ValueError` for a gold that is no number or a negative tolerance. A gold of 0 is matched by 0 alone.
    """
    right = read_number(gold)
    if right is None:
        raise ValueError(f"the gold answer {gold!r} is not a number")
    if relative_tolerance < 0:
        raise ValueError(f"relative_tolerance is {relative_tolerance}: it must be at least 0")
    given = read_number(answer) if isinstance(answer, str) else None
    return given is not None and abs(given - right) <= Fraction(relative_tolerance) * abs(right)


def read_number(text: str) -> Fraction | None:
    """The number that the text is, or None for anything else, also for a number among words.

    Read are `1,234`, `12.0`, `.5`, `-3`, `3/4`, `1 1/2`, a currency sign on either side, and a per cent sign, which changes
    nothing: 20% is 20, as data sets write it. A full stop may follow.
    """
    text = text.strip() if len(text) <= _MAX_CHARS else ""
    match = _NUMBER.fullmatch(text)
    if match is None or (match["sign"] and match["inner"]):
        return None
    if match["numerator"]:
        if not int(match["denominator"]):
            return None
        value = int(match["units"] or 0) + Fraction(int(match["numerator"]), int(match["denominator"]))
    else:
        digits = (match["whole"] or "").replace(",", "") + (match["decimals"] or "")
        if not digits.strip("."):
            return None
        value = Fraction("0" + digits)
    return -value if "-" in (match["sign"], match["inner"]) else value
