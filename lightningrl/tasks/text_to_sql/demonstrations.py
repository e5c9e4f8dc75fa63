"""The imperfect demonstrator: runs of the text-to-SQL agent by someone who is right some of the time on every kind of question.

Imitating it gives a policy that reinforcement learning can improve: right sometimes on most questions, rather than always
on some and never on the rest. Its mistakes are habits, one favourite for each kind of question, so that what it does most
often is wrong and what it does sometimes is right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from lightningrl.tasks.habits import choose, fondness, right_share
from lightningrl.tasks.text_to_sql.questions import Question
from lightningrl.tasks.text_to_sql.sql_tool import as_text, run_query
from lightningrl.types import DemonstratedCall


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What the agent says to each role, `{…}` to be filled in; an experiment takes it from the agent that it trains."""

    writer_system: str
    writer_request: str  # {schema}, {question}
    checker_system: str
    checker_request: str  # {question}, {sql}, {result}
    rewriter_request: str  # {result}
    correct: str = "CORRECT"
    incorrect: str = "INCORRECT"
    max_drafts: int = 3


@dataclasses.dataclass(frozen=True)
class Habits:
    """How often the demonstrator is right, and what it does otherwise. Probabilities, each in [0, 1]."""

    draft_right: tuple[float, float] = (0.2, 0.5)  # of a first draft, by kind of question: drawn from this range
    favourite: float = 0.90  # of the wrong drafts, those with the kind's favourite mistake; the other mistakes share the rest
    check_right: float = 0.80
    rewrite_right: float = 0.25
    rewrite_repeats: float = 0.65  # the rewriter gives the same query again; otherwise it draws another mistake
    seed: int = 0  # which mistake is whose favourite


def run_as_text(database: str, sql: str) -> str:
    """The SQL tool as the agent has it: a query's result, or its error, as short text."""
    return as_text(run_query(database, sql))


def demonstrate(
    question: Question,
    prompts: Prompts,
    rng: np.random.Generator,
    habits: Habits | None = None,
    execute: Callable[[str, str], str] = run_as_text,
) -> list[DemonstratedCall]:
    """One run of the agent: write, execute, check, and rewrite while the check says so, up to `prompts.max_drafts` drafts.

    Every draft but the last is really run by `execute(database, sql)`. All chance comes from `rng`. The question needs
    at least one mistake in `wrong`, as those of `generate_questions` have; raises `ValueError` otherwise.
    """
    if not question.wrong:
        raise ValueError(f"question {question.id} has no mistakes to demonstrate")
    habits = habits or Habits()
    request = prompts.writer_request.format(schema=question.schema, question=question.question)
    conversation: tuple[Mapping[str, str], ...] = (_message("system", prompts.writer_system), _message("user", request))
    sql = _first_draft(question, habits, rng)
    calls = [DemonstratedCall("writer", conversation, sql)]
    for _ in range(prompts.max_drafts - 1):
        result = execute(question.database, sql)
        asked = prompts.checker_request.format(question=question.question, sql=sql, result=result)
        truthful = rng.random() < habits.check_right
        verdict = prompts.correct if (sql == question.gold) == truthful else prompts.incorrect
        calls.append(DemonstratedCall("checker", (_message("system", prompts.checker_system), _message("user", asked)), verdict))
        if verdict == prompts.correct:
            break
        conversation += (_message("assistant", sql), _message("user", prompts.rewriter_request.format(result=result)))
        sql = _next_draft(question, sql, habits, rng)
        calls.append(DemonstratedCall("rewriter", conversation, sql))
    return calls


def favourites(question: Question, seed: int) -> list[str]:
    """The mistakes that the question leaves room for, the dearest to the demonstrator of its kind first."""
    return [sql for _, sql in sorted(question.wrong, key=lambda pair: fondness(question.kind, pair[0], seed))]


def _first_draft(question: Question, habits: Habits, rng: np.random.Generator) -> str:
    right = right_share(question.kind, habits.draft_right, habits.seed)
    return choose(question.gold, favourites(question, habits.seed), right, habits.favourite, rng)


def _next_draft(question: Question, previous: str, habits: Habits, rng: np.random.Generator) -> str:
    others = [sql for sql in favourites(question, habits.seed) if sql != previous]
    draw = rng.random()
    if draw < habits.rewrite_right:
        return question.gold
    if draw < habits.rewrite_right + habits.rewrite_repeats or not others:
        return previous
    return others[rng.integers(len(others))]


def _message(role: str, content: str) -> Mapping[str, str]:
    return {"role": role, "content": content}
