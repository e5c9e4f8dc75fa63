"""The demonstrator follows the agent's conversation and is right as often as its habits say."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest

from lightningrl.tasks.habits import right_share
from lightningrl.tasks.text_to_sql.demonstrations import Habits, Prompts, demonstrate, favourites, run_as_text
from lightningrl.tasks.text_to_sql.questions import Question, generate_questions

PROMPTS = Prompts(
    writer_system="Write.",
    writer_request="{schema}\n{question}",
    checker_system="Check.",
    checker_request="{question}\n{sql}\nResult: {result}",
    rewriter_request="Result: {result}\nAgain.",
)


@pytest.fixture(scope="module")
def questions(own_databases: list[Path]) -> list[Question]:
    return generate_questions(own_databases[1], seed=0, count=64)


def test_every_call_is_the_agents_next_one(questions: list[Question]) -> None:
    seen: collections.Counter[int] = collections.Counter()
    for i, question in enumerate(questions):
        calls = demonstrate(question, PROMPTS, np.random.default_rng(i))
        seen[len(calls)] += 1
        conversation = [
            {"role": "system", "content": "Write."},
            {"role": "user", "content": f"{question.schema}\n{question.question}"},
        ]
        assert calls[0].role == "writer" and list(calls[0].messages) == conversation
        sql = calls[0].response
        for check, rewrite in zip(calls[1::2], [*calls[2::2], None], strict=False):
            result = run_as_text(question.database, sql)
            assert check.role == "checker"
            assert list(check.messages) == [
                {"role": "system", "content": "Check."},
                {"role": "user", "content": f"{question.question}\n{sql}\nResult: {result}"},
            ]
            if rewrite is None:
                assert check.response == "CORRECT"
                break
            assert (check.response, rewrite.role) == ("INCORRECT", "rewriter")
            conversation += [
                {"role": "assistant", "content": sql},
                {"role": "user", "content": f"Result: {result}\nAgain."},
            ]
            assert list(rewrite.messages) == conversation
            sql = rewrite.response
        assert {call.response for call in calls if call.role != "checker"} <= {question.gold, *dict(question.wrong).values()}
    assert set(seen) == {2, 4, 5}  # right at once or taken to be; after one rewrite; three drafts, the last unchecked


def test_chance_comes_from_the_generator_alone(questions: list[Question]) -> None:
    runs = [demonstrate(questions[3], PROMPTS, np.random.default_rng(7)) for _ in range(2)]
    assert runs[0] == runs[1]


def test_habits_of_certainty(questions: list[Question]) -> None:
    sure = Habits(draft_right=(1.0, 1.0), check_right=1.0)
    wrong = Habits(draft_right=(0.0, 0.0), favourite=1.0, check_right=1.0, rewrite_right=0.0, rewrite_repeats=1.0)
    for question in questions:
        right = demonstrate(question, PROMPTS, np.random.default_rng(0), sure)
        assert [(call.role, call.response) for call in right] == [("writer", question.gold), ("checker", "CORRECT")]
        calls = demonstrate(question, PROMPTS, np.random.default_rng(0), wrong)
        favourite = favourites(question, 0)[0]
        assert [call.response for call in calls] == [favourite, "INCORRECT", favourite, "INCORRECT", favourite]


@pytest.mark.slow
def test_the_demonstrator_is_right_sometimes_on_every_question(questions: list[Question]) -> None:
    rng = np.random.default_rng(0)
    habits = Habits()
    first: dict[str, collections.Counter[str]] = {question.id: collections.Counter() for question in questions}
    verdicts: collections.Counter[bool] = collections.Counter()
    for question in questions:
        for _ in range(100):
            calls = demonstrate(question, PROMPTS, rng, habits)
            first[question.id][calls[0].response] += 1
            verdicts[(calls[0].response == question.gold) == (calls[1].response == "CORRECT")] += 1
    right = favourite = wrong = 0
    for question in questions:
        rate = right_share(question.kind, habits.draft_right, habits.seed)
        assert habits.draft_right[0] <= rate <= habits.draft_right[1]
        count = first[question.id][question.gold]
        assert 0 < count < 100 and abs(count - 100 * rate) < 5 * 100**0.5 / 2  # five standard errors
        right += count
        wrong += 100 - count
        favourite += first[question.id][favourites(question, habits.seed)[0]]
    expected = sum(100 * right_share(q.kind, habits.draft_right, habits.seed) for q in questions)
    assert abs(right - expected) < 5 * (100 * len(questions)) ** 0.5 / 2
    assert abs(favourite / wrong - habits.favourite) < 5 * 0.5 / wrong**0.5
    assert abs(verdicts[True] / 6400 - habits.check_right) < 0.02


def test_a_kind_has_one_favourite_mistake(questions: list[Question]) -> None:
    kinds = collections.defaultdict(set)
    for question in questions:
        mistakes = {sql: mistake for mistake, sql in question.wrong}
        kinds[question.kind, frozenset(mistakes.values())].add(mistakes[favourites(question, 0)[0]])
    assert all(len(favourite) == 1 for favourite in kinds.values())
    assert any(favourites(question, 0)[0] != favourites(question, 1)[0] for question in questions)


def test_the_tool_is_handed_in(questions: list[Question]) -> None:
    asked: list[tuple[str, str]] = []

    def execute(database: str, sql: str) -> str:
        asked.append((database, sql))
        return "42"

    calls = demonstrate(questions[0], PROMPTS, np.random.default_rng(0), execute=execute)
    assert asked[0] == (questions[0].database, calls[0].response)
    assert calls[1].messages[1]["content"].endswith("Result: 42")


def test_a_question_without_mistakes_cannot_be_demonstrated() -> None:
    question = Question("q", "a.sqlite", "?", "SELECT 1", "count", "easy", "")
    with pytest.raises(ValueError, match="no mistakes"):
        demonstrate(question, PROMPTS, np.random.default_rng(0))
