"""The demonstrator follows the agent's conversation and is right as often as its habits say."""

from __future__ import annotations

import collections
import json
from typing import Any

import numpy as np
import pytest

from lightningrl.tasks.habits import right_share
from lightningrl.tasks.math_tool.calculator import calculate
from lightningrl.tasks.math_tool.chains import Chain
from lightningrl.tasks.math_tool.demonstrations import Habits, Prompts, demonstrate, favourites
from lightningrl.tasks.math_tool.problems import Problem, generate_problems
from lightningrl.types import DemonstratedCall

TOOL = {"type": "function", "function": {"name": "calc", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}}
PROMPTS = Prompts(system="Count.", tool=TOOL, argument="x", answer="It is {answer}.", role="solver")


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return generate_problems(seed=0, count=66)


def chain_of(calls: list[DemonstratedCall]) -> Chain:
    """(expression, result) of every call, from the text of the demonstration."""
    results = [message["content"] for message in calls[-1].messages if message["role"] == "tool"]
    said = [json.loads(call.response.removeprefix("<tool_call>").removesuffix("</tool_call>")) for call in calls[:-1]]
    assert all(call["name"] == "calc" for call in said)
    return tuple((call["arguments"]["x"], result) for call, result in zip(said, results, strict=True))


def test_every_call_is_the_agents_next_one(problems: list[Problem]) -> None:
    for i, problem in enumerate(problems):
        calls = demonstrate(problem, PROMPTS, np.random.default_rng(i))
        conversation: list[Any] = [{"role": "system", "content": "Count."}, {"role": "user", "content": problem.question}]
        result = ""
        for call, (expression, _) in zip(calls, chain_of(calls), strict=False):
            assert (call.role, list(call.messages), call.tools) == ("solver", conversation, (TOOL,))
            result = calculate(expression)
            conversation += [{"role": "assistant", "content": call.response}, {"role": "tool", "content": result}]
        assert list(calls[-1].messages) == conversation and calls[-1].response == f"It is {result}."
        assert chain_of(calls) in {problem.chain, *dict(problem.wrong).values()}


def test_chance_comes_from_the_generator_alone(problems: list[Problem]) -> None:
    first, again = (demonstrate(problems[9], PROMPTS, np.random.default_rng(7)) for _ in range(2))
    assert first == again


def test_habits_of_certainty(problems: list[Problem]) -> None:
    sure, wrong = Habits(right=(1.0, 1.0)), Habits(right=(0.0, 0.0), favourite=1.0)
    for problem in problems:
        assert chain_of(demonstrate(problem, PROMPTS, np.random.default_rng(0), sure)) == problem.chain
        assert chain_of(demonstrate(problem, PROMPTS, np.random.default_rng(0), wrong)) == favourites(problem, 0)[0]


def test_the_demonstrator_is_right_sometimes_on_every_problem(problems: list[Problem]) -> None:
    rng, habits = np.random.default_rng(0), Habits()
    wrong = favourite = 0
    for problem in problems:
        found = collections.Counter(chain_of(demonstrate(problem, PROMPTS, rng, habits)) for _ in range(100))
        rate = right_share(problem.kind, habits.right, habits.seed)
        assert habits.right[0] <= rate <= habits.right[1]
        assert 0 < found[problem.chain] < 100 and abs(found[problem.chain] - 100 * rate) < 5 * 100**0.5 / 2  # five standard errors
        wrong += 100 - found[problem.chain]
        favourite += found[favourites(problem, habits.seed)[0]]
    assert abs(favourite / wrong - habits.favourite) < 5 * 0.5 / wrong**0.5


def test_a_kind_has_one_favourite_mistake(problems: list[Problem]) -> None:
    kinds = collections.defaultdict(set)
    for problem in problems:
        names = {chain: name for name, chain in problem.wrong}
        kinds[problem.kind, frozenset(names.values())].add(names[favourites(problem, 0)[0]])
    assert all(len(favourite) == 1 for favourite in kinds.values())
    assert any(favourites(problem, 0)[0] != favourites(problem, 1)[0] for problem in problems)


def test_wrong_numbers_come_last(problems: list[Problem]) -> None:
    for problem in problems:
        names = {chain: name for name, chain in problem.wrong}
        numbers = [names[chain].startswith("number") for chain in favourites(problem, 0)]
        assert numbers == sorted(numbers) and not all(numbers)


def test_the_tool_is_handed_in(problems: list[Problem]) -> None:
    calls = demonstrate(problems[0], PROMPTS, np.random.default_rng(0), tool=lambda expression: "42")
    assert calls[1].messages[-1]["content"] == "42" and calls[-1].response == "It is 42."


def test_a_problem_without_mistakes_is_done_right_and_one_without_calls_not_at_all() -> None:
    problem = Problem("p", "What is 1 + 2?", "3", (("1+2", "3"),), "gsm8k")
    for seed in range(20):
        assert chain_of(demonstrate(problem, PROMPTS, np.random.default_rng(seed))) == problem.chain
    with pytest.raises(ValueError, match="no calls"):
        demonstrate(Problem("p", "?", "3", (), "gsm8k"), PROMPTS, np.random.default_rng(0))
