"""Word problems in AutoGen: one `AssistantAgent` that calls a calculator, step by step, until it knows the answer.

Nothing here knows that the endpoint may be learning:

    python -m experiments.agents.math_autogen --base_url URL --api_key KEY "Tom has 3 boxes of 16 eggs. How many eggs has he?"
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import httpx2
import openai
from autogen_agentchat.agents import AssistantAgent
from autogen_core import CancellationToken
from autogen_core.models import ModelInfo
from autogen_core.tools import BaseTool, ToolSchema
from autogen_ext.models.openai import OpenAIChatCompletionClient
from pydantic import BaseModel, ValidationError

MODEL = "policy"
SYSTEM = "Calculate step by step. Then say ### ANSWER: number ###"
ANSWER = "### ANSWER: {answer} ###"

MAX_CALLS = 8  # of the model that ask for the calculator; the run ends with the last one's results
MAX_TOKENS = 64

Calculate = Callable[[str], str]  # an expression -> its value, or what is wrong with it

INFO: ModelInfo = {"vision": False, "function_calling": True, "json_output": False, "structured_output": False, "family": "unknown"}


class Arguments(BaseModel):
    expression: str


class Calculator(BaseTool[Arguments, str]):  # type: ignore[type-var]  # a result may be a text, too
    """The tool that the model sees. A call of it is so short that it need not leave the event loop."""

    def __init__(self, calculate: Calculate) -> None:
        super().__init__(Arguments, str, "calculator", "Calculates.")
        self.calculate = calculate

    @functools.cached_property
    def schema(self) -> ToolSchema:  # asked for with every call, a tenth of the client's time
        return super().schema

    async def run_json(self, args: Mapping[str, Any], cancellation_token: CancellationToken, call_id: str | None = None) -> Any:
        try:
            return await super().run_json(args, cancellation_token, call_id)
        except ValidationError:  # its own words are many
            return "error: give an expression"

    async def run(self, args: Arguments, cancellation_token: CancellationToken) -> str:
        return self.calculate(args.expression)


@functools.lru_cache(maxsize=16)
def tool(calculate: Calculate) -> Calculator:
    """One for all runs: it holds no state."""
    return Calculator(calculate)


def arithmetic(expression: str) -> str:
    """The value of sums and products of numbers, with parentheses."""
    if len(expression) > 100:
        return "error: the expression is too long"
    tokens = re.findall(r"[0-9.]+|\S", expression)

    def atom() -> Fraction:
        token = tokens.pop(0)
        if token == "-":
            return -atom()
        if token == "(":
            value = total()
            if tokens.pop(0) != ")":
                raise ValueError
            return value
        return Fraction(token)

    def product() -> Fraction:
        value = atom()
        while tokens[:1] in (["*"], ["/"]):
            value = value * atom() if tokens.pop(0) == "*" else value / atom()
        return value

    def total() -> Fraction:
        value = product()
        while tokens[:1] in (["+"], ["-"]):
            value = value + product() if tokens.pop(0) == "+" else value - product()
        return value

    try:
        value = total()
        if tokens:
            raise ValueError
        return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"
    except ZeroDivisionError:
        return "error: division by zero"
    except (ValueError, IndexError, OverflowError):
        return "error: this is not arithmetic"


@functools.lru_cache(maxsize=16)
def connections(base_url: str) -> openai.DefaultAsyncHttpxClient:
    """One pool for all runs against an endpoint: setting up TLS takes longer than a call.

    Few idle connections are kept, because the pool looks at every one of them on every request.
    """
    return openai.DefaultAsyncHttpxClient(limits=httpx2.Limits(max_connections=1000, max_keepalive_connections=4))


async def answer(task: dict[str, Any], base_url: str, api_key: str, calculate: Calculate = arithmetic, model: str = MODEL) -> str:
    """Answers `task["question"]` with a number, as the model writes it; nothing if it never comes to an answer."""
    client = OpenAIChatCompletionClient(
        model=model,
        base_url=base_url,
        api_key=api_key,
        model_info=INFO,
        temperature=1.0,
        max_tokens=MAX_TOKENS,
        http_client=connections(base_url),  # type: ignore[call-arg]  # handed on to openai.AsyncOpenAI
    )
    agent = AssistantAgent("solver", client, tools=[tool(calculate)], system_message=SYSTEM, max_tool_iterations=MAX_CALLS)
    result = await agent.run(task=task["question"])
    return answer_in(getattr(result.messages[-1], "content", ""))


def answer_in(text: str) -> str:
    """What the last answer line of a reply says."""
    found = re.findall(r"###\s*ANSWER:\s*(.*?)\s*(?:###|$)", text, re.IGNORECASE | re.MULTILINE)
    return found[-1] if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer a word problem with a calculator.")
    parser.add_argument("--base_url", required=True, help="an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--api_key", required=True)
    parser.add_argument("--model", default=MODEL, help="the endpoint's name of the model")
    parser.add_argument("question")
    args = parser.parse_args()
    print(asyncio.run(answer({"question": args.question}, args.base_url, args.api_key, model=args.model)))


if __name__ == "__main__":
    main()
