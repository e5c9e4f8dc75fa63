"""The demonstrator follows the agent's conversation and is right as often as its habits say."""

from __future__ import annotations

import collections
import functools
import json

import numpy as np
import pytest

from lightningrl.tasks.habits import right_share
from lightningrl.tasks.multi_hop_qa.demonstrations import Habits, Prompts, demonstrate, favourites
from lightningrl.tasks.multi_hop_qa.questions import Question
from lightningrl.tasks.multi_hop_qa.retrieval import search_as_text

PARAMETERS = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
TOOL = {"type": "function", "function": {"name": "search", "description": "Finds passages.", "parameters": PARAMETERS}}
PROMPTS = Prompts(system="Search.", request="Question: {question}", answer="<answer> {answer} </answer>", tool=TOOL)
search = functools.partial(search_as_text, results=2)


def test_every_call_is_the_agents_next_one(questions: list[Question]) -> None:
    for i, question in enumerate(questions):
        calls = demonstrate(question, PROMPTS, np.random.default_rng(i), search=search)
        attempts = {(a.searches, f"<answer> {a.answer} </answer>") for a in (question.gold, *question.wrong) if a}
        conversation = [{"role": "system", "content": "Search."}, {"role": "user", "content": f"Question: {question.question}"}]
        queries = []
        for call in calls:
            assert (call.role, list(call.messages), call.tools) == ("agent", conversation, (TOOL,))
            if call is calls[-1]:
                break
            said = json.loads(call.response.removeprefix("<tool_call>").removesuffix("</tool_call>"))
            assert said["name"] == "search" and set(said["arguments"]) == {"query"}
            queries.append(said["arguments"]["query"])
            found = {"role": "tool", "content": search(question.corpus, queries[-1])}
            conversation += [{"role": "assistant", "content": call.response}, found]
        assert (tuple(queries), calls[-1].response) in attempts


def test_chance_comes_from_the_generator_alone(questions: list[Question]) -> None:
    runs = [demonstrate(questions[3], PROMPTS, np.random.default_rng(7), search=search) for _ in range(2)]
    assert runs[0] == runs[1]


def test_habits_of_certainty(questions: list[Question]) -> None:
    for question in questions:
        sure = demonstrate(question, PROMPTS, np.random.default_rng(0), Habits(right=(1.0, 1.0)), search=search)
        assert sure[-1].response == f"<answer> {question.answer} </answer>" and len(sure) == question.hops + 1
        wrong = demonstrate(question, PROMPTS, np.random.default_rng(0), Habits(right=(0.0, 0.0), favourite=1.0), search=search)
        assert wrong[-1].response == f"<answer> {favourites(question, 0)[0].answer} </answer>"


def test_the_demonstrator_is_right_sometimes_on_every_question(questions: list[Question]) -> None:
    rng, habits = np.random.default_rng(0), Habits()
    wrong = favourite = 0
    for question in questions:
        said = collections.Counter(
            demonstrate(question, PROMPTS, rng, habits, search=lambda corpus, query: "")[-1].response for _ in range(100)
        )
        share = right_share(question.kind, habits.right, habits.seed)
        assert habits.right[0] <= share <= habits.right[1]
        count = said[f"<answer> {question.answer} </answer>"]
        assert 0 < count < 100 and abs(count - 100 * share) < 5 * 100**0.5 / 2  # five standard errors
        wrong += 100 - count
        dearest, *others = favourites(question, habits.seed)
        if dearest.answer not in {other.answer for other in others}:
            favourite += said[f"<answer> {dearest.answer} </answer>"]
        else:
            wrong -= 100 - count
    assert abs(favourite / wrong - habits.favourite) < 5 * 0.5 / wrong**0.5


def test_a_kind_has_one_favourite_mistake(questions: list[Question]) -> None:
    kinds = collections.defaultdict(set)
    for question in questions:
        kinds[question.kind, frozenset(a.kind for a in question.wrong)].add(favourites(question, 0)[0].kind)
    assert all(len(favourite) == 1 for favourite in kinds.values())
    assert any(favourites(question, 0)[0] != favourites(question, 1)[0] for question in questions)


def test_a_question_without_attempts_cannot_be_demonstrated() -> None:
    question = Question("q", "corpus.jsonl", "?", "Mira", "real", 2)
    with pytest.raises(ValueError, match="no attempts"):
        demonstrate(question, PROMPTS, np.random.default_rng(0), search=search)
