"""The imperfect demonstrator: runs of the question-answering agent by someone who is right some of the time on every kind of question.

Imitating it gives a policy that reinforcement learning can improve: right sometimes on most questions, rather than always
on some and never on the rest. Its mistakes are habits, one favourite for each kind of question, so that what it does most
often may be wrong and what it does sometimes is right.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lightningrl.tasks.habits import choose, fondness, right_share
from lightningrl.tasks.multi_hop_qa.questions import Attempt, Question
from lightningrl.types import DemonstratedCall


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What the agent says, `{question}` and `{answer}` to be filled in; an experiment takes it from the agent that it trains."""

    system: str
    request: str  # {question}
    answer: str  # {answer}, as the agent is told to write it
    tool: Mapping[str, Any]  # OpenAI definition of the search tool, with one argument
    role: str = "agent"


@dataclasses.dataclass(frozen=True)
class Habits:
    """How often the demonstrator is right, and what it does otherwise. Probabilities, each in [0, 1]."""

    # By kind of question, drawn from this range. More would leave no room: searches are chosen one by one, so that greedily the policy
    # is right wherever the right search is likelier than each wrong one, though whole runs mostly are not. From 0.15 to 0.45, it began
    # with 0.75 on held-out questions.
    right: tuple[float, float] = (0.05, 0.25)
    favourite: float = 0.85  # of the wrong runs, those with the kind's favourite mistake; the other mistakes share the rest
    seed: int = 0  # which mistake is whose favourite


def demonstrate(
    question: Question,
    prompts: Prompts,
    rng: np.random.Generator,
    habits: Habits | None = None,
    *,
    search: Callable[[str, str], str],
) -> list[DemonstratedCall]:
    """One run of the agent: the searches of an attempt, right or not, each really made by `search(corpus, query)`, and its answer.

    All chance comes from `rng`. Raises `ValueError` for a question without a known attempt or without mistakes.
    """
    if question.gold is None or not question.wrong:
        raise ValueError(f"question {question.id} has no attempts to demonstrate")
    attempt = _attempt(question, question.gold, habits or Habits(), rng)
    messages: tuple[Mapping[str, Any], ...] = (
        {"role": "system", "content": prompts.system},
        {"role": "user", "content": prompts.request.format(question=question.question)},
    )
    calls = []
    for query in attempt.searches:
        response = search_call(prompts.tool, query)
        calls.append(DemonstratedCall(prompts.role, messages, response, (prompts.tool,)))
        found = {"role": "tool", "content": search(question.corpus, query)}
        messages = (*messages, {"role": "assistant", "content": response}, found)
    return [*calls, DemonstratedCall(prompts.role, messages, prompts.answer.format(answer=attempt.answer), (prompts.tool,))]


def search_call(tool: Mapping[str, Any], query: str) -> str:
    """A search as the policy writes it."""
    function = tool["function"]
    (argument,) = function["parameters"]["properties"]
    call = {"name": function["name"], "arguments": {argument: query}}
    return f"<tool_call>{json.dumps(call, ensure_ascii=False)}</tool_call>"


def favourites(question: Question, seed: int) -> list[Attempt]:
    """The mistakes that the question leaves room for, the dearest to the demonstrator of its kind first."""
    return sorted(question.wrong, key=lambda attempt: fondness(question.kind, attempt.kind, seed))


def _attempt(question: Question, gold: Attempt, habits: Habits, rng: np.random.Generator) -> Attempt:
    right = right_share(question.kind, habits.right, habits.seed)
    return choose(gold, favourites(question, habits.seed), right, habits.favourite, rng)
