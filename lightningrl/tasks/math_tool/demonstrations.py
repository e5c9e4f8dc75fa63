"""The imperfect demonstrator: runs of the calculating agent by someone who is right some of the time on every kind of problem.

As with text-to-SQL, a policy that imitates it is right sometimes on most problems, which leaves room that reinforcement
learning can use. Its mistakes are habits, one favourite for each kind of problem.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lightningrl.tasks.habits import choose, fondness, right_share
from lightningrl.tasks.math_tool.calculator import calculate
from lightningrl.tasks.math_tool.chains import Chain
from lightningrl.tasks.math_tool.problems import Problem
from lightningrl.types import DemonstratedCall


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What the agent says, and the tool it offers; an experiment takes them from the agent that it trains."""

    system: str
    tool: Mapping[str, Any]  # OpenAI's definition of a function
    argument: str  # the parameter that takes the expression
    answer: str  # {answer}
    role: str = "policy"

    @property
    def tool_name(self) -> str:
        return str(self.tool["function"]["name"])


@dataclasses.dataclass(frozen=True)
class Habits:
    """How often the demonstrator is right, and what it does otherwise. Probabilities, each in [0, 1]."""

    right: tuple[float, float] = (0.25, 0.55)  # by kind of problem: drawn from this range
    favourite: float = 0.90  # of the wrong runs, those with the kind's favourite mistake; the other mistakes share the rest
    seed: int = 0  # which mistake is whose favourite


def demonstrate(
    problem: Problem,
    prompts: Prompts,
    rng: np.random.Generator,
    habits: Habits | None = None,
    tool: Callable[[str], str] = calculate,
) -> list[DemonstratedCall]:
    """One run of the agent: a calculator call for every step, then the last result as the answer.

    Every call is really run by `tool(expression)`. All chance comes from `rng`. A problem without mistakes is done right.
    Raises `ValueError` for one without gold calls.
    """
    if not problem.chain:
        raise ValueError(f"problem {problem.id} has no calls to demonstrate")
    conversation: tuple[Mapping[str, Any], ...] = (_message("system", prompts.system), _message("user", problem.question))
    calls = []
    result = ""
    for expression, _ in _chosen_chain(problem, rng, habits or Habits()):
        said = call_text(prompts, expression)
        calls.append(DemonstratedCall(prompts.role, conversation, said, (prompts.tool,)))
        result = tool(expression)
        conversation += (_message("assistant", said), _message("tool", result))
    calls.append(DemonstratedCall(prompts.role, conversation, prompts.answer.format(answer=result), (prompts.tool,)))
    return calls


def call_text(prompts: Prompts, expression: str) -> str:
    """A calculator call as the policy writes it."""
    call = json.dumps({"name": prompts.tool_name, "arguments": {prompts.argument: expression}})
    return f"<tool_call>{call}</tool_call>"


def favourites(problem: Problem, seed: int) -> list[Chain]:
    """The mistakes that the problem leaves room for, the dearest to the demonstrator of its kind first.

    Wrong numbers come last: a policy that had them for a habit would learn not to copy.
    """

    def rank(mistake: str) -> tuple[bool, bytes]:
        return mistake.startswith("number"), fondness(problem.kind, mistake, seed)

    return [chain for _, chain in sorted(problem.wrong, key=lambda pair: rank(pair[0]))]


def _chosen_chain(problem: Problem, rng: np.random.Generator, habits: Habits) -> Chain:
    if not problem.wrong:
        return problem.chain
    right = right_share(problem.kind, habits.right, habits.seed)
    return choose(problem.chain, favourites(problem, habits.seed), right, habits.favourite, rng)


def _message(role: str, content: str) -> Mapping[str, Any]:
    return {"role": role, "content": content}
