"""Chains of calculator calls as steps that refer to one another, and plausible mistakes about them, of named kinds.

Each mistake can be read off the text of a problem, its numbers in order, so that it can be learned as a habit. Whether one
changes the answer is for whoever uses it to say.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

from lightningrl.tasks.math_tool.calculator import calculate
from lightningrl.tasks.math_tool.metric import read_number

Chain = tuple[tuple[str, str], ...]  # (expression, value) of every call, in order
Operand = str | int  # a number as text, or which earlier step's value


@dataclasses.dataclass(frozen=True)
class Step:
    """One calculator call with two operands."""

    left: Operand
    operator: str  # one of + - * / %
    right: Operand


_CONFUSED = {"+": "-", "-": "+", "*": "+", "/": "*", "%": "/"}
_BINARY = re.compile(r"\(*\s*([0-9.]+)\s*([-+*/%])\s*([0-9.]+)\s*\)*")


def solved(steps: Sequence[Step]) -> Chain:
    """What the calculator gives for each step. A value may be an error, and then so are those that use it."""
    values: list[str] = []
    chain = []
    for step in steps:
        left, right = (operand if isinstance(operand, str) else values[operand] for operand in (step.left, step.right))
        expression = f"{left}{step.operator}{right}"
        values.append(calculate(expression))
        chain.append((expression, values[-1]))
    return tuple(chain)


def steps_of(chain: Chain) -> tuple[Step, ...] | None:
    """The steps of a chain of which only the text is known; None if a call has not exactly two operands.

    An operand that is equal to an earlier value is taken for it, the latest if there are several.
    """
    values: list[str] = []
    steps = []
    for expression, value in chain:
        match = _BINARY.fullmatch(expression)
        if match is None:
            return None
        left, right = (_operand(text, values) for text in (match[1], match[3]))
        steps.append(Step(left, match[2], right))
        values.append(value)
    return tuple(steps)


def mistakes(steps: Sequence[Step]) -> Iterator[tuple[str, tuple[Step, ...]]]:
    """(kind, steps) of the mistakes that there is room for; a kind names the step that it is about, counted from 1.

    - `operation`: another operator than the right one;
    - `swapped`: the operands of a subtraction, division or remainder the other way round;
    - `number`: instead of a number of the problem the next one in it, counted round;
    - `left_out`: a step is not taken, and what needed its value uses its left operand.
    """
    steps = tuple(steps)
    numbers = list(dict.fromkeys(operand for step in steps for operand in (step.left, step.right) if isinstance(operand, str)))
    for i, step in enumerate(steps):
        yield f"operation_{i + 1}", _with(steps, i, dataclasses.replace(step, operator=_CONFUSED[step.operator]))
        if step.operator in "-/%":
            yield f"swapped_{i + 1}", _with(steps, i, dataclasses.replace(step, left=step.right, right=step.left))
        if isinstance(step.right, str) and len(numbers) > 1:
            other = numbers[(numbers.index(step.right) + 1) % len(numbers)]
            yield f"number_{i + 1}", _with(steps, i, dataclasses.replace(step, right=other))
        if len(steps) > 1:
            yield f"left_out_{i + 1}", _without(steps, i)


def _operand(text: str, values: Sequence[str]) -> Operand:
    for i in range(len(values) - 1, -1, -1):
        if read_number(text) == read_number(values[i]):
            return i
    return text


def _with(steps: tuple[Step, ...], i: int, step: Step) -> tuple[Step, ...]:
    return (*steps[:i], step, *steps[i + 1 :])


def _without(steps: tuple[Step, ...], i: int) -> tuple[Step, ...]:
    def moved(operand: Operand) -> Operand:
        if isinstance(operand, str) or operand < i:
            return operand
        return steps[i].left if operand == i else operand - 1

    later = (dataclasses.replace(step, left=moved(step.left), right=moved(step.right)) for step in steps[i + 1 :])
    return (*steps[:i], *later)
