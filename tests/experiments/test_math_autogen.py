"""The word-problem agent: against the gateway, recorded token by token as its demonstrations are encoded, and on its own."""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.agents import math_autogen
from experiments.agents.math_autogen import MAX_CALLS, answer, answer_in, arithmetic
from experiments.math_tool import PROMPTS, reward, task_of
from lightningrl.gateway import Gateway
from lightningrl.gateway.rendering import Renderer
from lightningrl.runtime import Runner, RunnerSettings, rollout_requests, tool_error
from lightningrl.tasks.math_tool.calculator import calculate
from lightningrl.tasks.math_tool.demonstrations import call_text, demonstrate
from lightningrl.tasks.math_tool.problems import Problem, generate_problems
from lightningrl.tokenizer import train_tokenizer
from lightningrl.types import DemonstratedCall, Transition
from lightningrl.warm_start import encode
from tests.gateway.scripted_sampler import ScriptedSampler

Stage = tuple[Gateway, ScriptedSampler, Any]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    texts = [p.question for p in generate_problems(0, 46)] + [math_autogen.SYSTEM, call_text(PROMPTS, "48/2")] * 10
    tokenizer = train_tokenizer(texts, 500)
    sampler = ScriptedSampler(tokenizer, [])
    with Gateway(sampler, tokenizer) as gateway:
        yield gateway, sampler, tokenizer


def play(stage: Stage, script: Any, question: str = "How many?", **options: Any) -> tuple[str, tuple[Transition, ...]]:
    gateway, sampler, _ = stage
    math_autogen.connections.cache_clear()  # those of another event loop
    sampler.restart(script)
    key = gateway.open("rollout", seed=0)
    said = asyncio.run(answer({"question": question}, gateway.base_url, key, **{"calculate": calculate, **options}))
    return said, gateway.close(key).transitions


def results(transition: Transition) -> list[str]:
    return [message["content"] for message in transition.messages if message["role"] == "tool"]


def test_it_calculates_and_answers(stage: Stage) -> None:
    said, calls = play(stage, [call_text(PROMPTS, "48/2"), call_text(PROMPTS, "48+24"), "### ANSWER: 72 ###"])
    assert said == "72"
    assert [call.continues for call in calls] == [None, 0, 1]
    assert results(calls[-1]) == ["24", "72"]


def test_errors_are_results_that_it_goes_on_from(stage: Stage) -> None:
    other = '<tool_call>{"name": "calculator", "arguments": {"sum": "1"}}</tool_call>'
    said, calls = play(stage, [call_text(PROMPTS, "1/0"), other, call_text(PROMPTS, "48/2"), "### ANSWER: 24 ###"])
    assert said == "24"
    assert results(calls[-1]) == ["error: division by zero", "error: give an expression", "24"]


def test_two_calls_at_once(stage: Stage) -> None:
    said, calls = play(stage, [call_text(PROMPTS, "1+1") + call_text(PROMPTS, "2+2"), "### ANSWER: 4 ###"])
    assert said == "4" and results(calls[-1]) == ["2", "4"]


@pytest.mark.parametrize("reply", ["I do not know.", "", "<tool_call>{", '<tool_call>{"name": "search", "arguments": {}}</tool_call>'])
def test_without_an_answer_line_there_is_no_answer(stage: Stage, reply: str) -> None:
    said, calls = play(stage, [reply])
    assert (said, len(calls)) == ("", 1)


def test_it_does_not_calculate_for_ever(stage: Stage) -> None:
    said, calls = play(stage, lambda prompt: call_text(PROMPTS, "1+1"))
    assert (said, len(calls)) == ("", MAX_CALLS)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("### ANSWER: 24 ###", "24"),
        ("So\n### ANSWER: 24", "24"),
        ("### ANSWER: 1 ### No: ### Answer: 1,024.5 ###", "1,024.5"),
        ("### ANSWER:  ###", ""),
        ("24", ""),
        ("", ""),
    ],
)
def test_the_answer_in_a_reply(text: str, answer: str) -> None:
    assert answer_in(text) == answer


def script(calls: list[DemonstratedCall]) -> list[str]:
    return [call.response for call in calls]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_demonstrations_are_encoded_as_the_agent_is_recorded(stage: Stage, seed: int) -> None:
    for problem in generate_problems(seed, 22)[seed::6]:
        calls = demonstrate(problem, PROMPTS, np.random.default_rng(seed))
        _, recorded = play(stage, script(calls), problem.question)
        encoded = encode(calls, Renderer(stage[2]))
        assert [each.continues for each in encoded] == [None, *range(len(calls) - 1)]
        for ours, theirs in zip(encoded, recorded, strict=True):
            np.testing.assert_array_equal(ours.prompt_ids, theirs.prompt_ids)
            np.testing.assert_array_equal(ours.response_ids, theirs.response_ids)
            assert (ours.role, ours.continues) == (theirs.role, theirs.continues)


def test_errors_are_encoded_as_recorded_too(stage: Stage) -> None:
    problem = Problem("p", "What is 1 / 0?", "0", (("1/0", "0"), ("é", "0")), "real")
    calls = demonstrate(problem, PROMPTS, np.random.default_rng(0))
    _, recorded = play(stage, script(calls), problem.question)
    for ours, theirs in zip(encode(calls, Renderer(stage[2])), recorded, strict=True):
        np.testing.assert_array_equal(ours.prompt_ids, theirs.prompt_ids)


def test_under_the_runner_the_right_answer_is_rewarded(stage: Stage) -> None:
    gateway, sampler, _ = stage
    problem = generate_problems(0, 1)[0]

    def say(prompt: str) -> str:
        asked = prompt.count("<tool_response>")
        if not asked:
            return call_text(PROMPTS, "1/0")
        return call_text(PROMPTS, "2+2") if asked == 1 else f"### ANSWER: {problem.answer} ###"

    sampler.restart(say)
    math_autogen.connections.cache_clear()
    agent = functools.partial(answer, calculate=calculate)
    runner = Runner(gateway, agent, reward, RunnerSettings(concurrency=4), (tool_error,))
    for iteration in range(2):  # clients and tools that are kept between runs outlive a batch
        rollouts = runner.run(
            rollout_requests([task_of(problem)], phase="train", iteration=iteration, samples=4), phase="train", iteration=iteration, seed=0
        )
        for rollout in rollouts:
            assert (rollout.status, rollout.reward, rollout.answer) == ("ok", 1.0, problem.answer), rollout.error
            assert [call.reward for call in rollout.transitions] == [-0.1, 0.0, 0.0]
            assert all(call.trainable for call in rollout.transitions)


# On its own, against any endpoint


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("48/2", "24"),
        ("(2 + 3) * -4", "-20"),
        ("1/3", "0.333333"),
        ("2*3-4/2", "4"),
        ("1/0", "error: division by zero"),
        ("2**3", "error: this is not arithmetic"),
        ("2 3", "error: this is not arithmetic"),
        ("(1", "error: this is not arithmetic"),
        ("__import__('os')", "error: this is not arithmetic"),
        ("", "error: this is not arithmetic"),
        ("(" * 10_000, "error: the expression is too long"),
        ("(" * 100, "error: this is not arithmetic"),
    ],
    ids=lambda text: text[:20],
)
def test_the_agents_own_calculator(expression: str, value: str) -> None:
    assert arithmetic(expression) == value


def test_the_own_calculator_agrees_with_the_tasks() -> None:
    for problem in generate_problems(1, 44):
        for expression, value in problem.chain:
            assert "%" in expression or arithmetic(expression) == value


def test_it_imports_nothing_of_lightningrl() -> None:
    assert "import lightningrl" not in (source := Path(math_autogen.__file__).read_text()) and "from lightningrl" not in source


@pytest.mark.slow
def test_the_agent_as_a_command(stage: Stage) -> None:
    gateway, sampler, _ = stage
    sampler.restart([call_text(PROMPTS, "48/2"), "### ANSWER: 24 ###"])
    key = gateway.open("rollout", seed=0)
    command = [sys.executable, "-m", "experiments.agents.math_autogen", "--base_url", gateway.base_url, "--api_key", key, "Half of 48?"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60)
    assert (done.stdout, done.returncode) == ("24\n", 0), done.stderr
    assert gateway.close(key).transitions[0].messages[1]["content"] == "Half of 48?"
