"""Generated problems hold what they promise, and are split without overlap."""

from __future__ import annotations

import collections
import dataclasses
import re

import pytest

from lightningrl.errors import UserError
from lightningrl.tasks.math_tool.calculator import calculate
from lightningrl.tasks.math_tool.metric import numeric_match
from lightningrl.tasks.math_tool.problems import MAX_VALUE, Problem, generate_problems, split_problems
from lightningrl.tasks.math_tool.stories import EVENTS, KINDS, OPENINGS


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return generate_problems(seed=0, count=440)


def test_gold_chains_hold(problems: list[Problem]) -> None:
    for problem in problems:
        assert all(calculate(expression) == value for expression, value in problem.chain)
        assert problem.chain[-1][1] == problem.answer
        assert all(1 <= int(value) <= MAX_VALUE for _, value in problem.chain)


def test_wrong_chains_are_wrong(problems: list[Problem]) -> None:
    for problem in problems:
        chains = [chain for _, chain in problem.wrong]
        assert len(chains) >= 2 and len(set(chains)) == len(chains)
        for chain in chains:
            assert all(calculate(expression) == value for expression, value in chain)
            assert not numeric_match(chain[-1][1], problem.answer)


def test_every_number_of_a_chain_is_in_the_text_or_calculated(problems: list[Problem]) -> None:
    for problem in problems:
        known = set(re.findall(r"\d+", problem.question))
        for expression, value in problem.chain:
            assert set(re.findall(r"\d+", expression)) <= known
            known.add(value)


def test_the_text_is_whole(problems: list[Problem]) -> None:
    assert not any("{" in p.question or "  " in p.question or not p.question.endswith("?") for p in problems)
    assert len({p.question for p in problems}) == len({p.id for p in problems}) == len(problems)


def test_kinds_come_in_equal_shares_from_one_to_five_steps(problems: list[Problem]) -> None:
    assert collections.Counter(p.kind for p in problems) == dict.fromkeys(KINDS, 20)
    assert {len(p.chain) for p in problems} == {1, 2, 3, 4, 5}
    assert {name for kind in KINDS for name in kind.split("+")} == {*OPENINGS, *EVENTS}
    for kind in KINDS:  # a kind is a chain of operations
        assert len({re.sub(r"\d+", "", " ".join(e for e, _ in p.chain)) for p in problems if p.kind == kind}) == 1


def test_the_seed_decides(problems: list[Problem]) -> None:
    assert generate_problems(seed=0, count=40) == problems[:40]
    assert not {p.question for p in generate_problems(seed=1, count=40)} & {p.question for p in problems}


def test_what_cannot_be_made_is_said() -> None:
    with pytest.raises(UserError, match="ask for at least 1"):
        generate_problems(0, 0)
    with pytest.raises(LookupError):
        generate_problems(0, 1, kinds=["have+nothing"])


def test_the_split_shares_no_text_and_no_chain(problems: list[Problem]) -> None:
    train, heldout = split_problems(problems, 88, seed=0)
    assert len(heldout) == 88 and set(collections.Counter(p.kind for p in heldout).values()) == {4}
    assert not {p.question for p in train} & {p.question for p in heldout}
    assert not {p.chain for p in train} & {p.chain for p in heldout}
    assert split_problems(problems, 88, seed=0) == (train, heldout) != split_problems(problems, 88, seed=1)


def test_problems_with_a_heldout_ones_calls_are_on_neither_side(problems: list[Problem]) -> None:
    twins = [dataclasses.replace(p, id=p.id + "'", question="Say: " + p.question) for p in problems]
    train, heldout = split_problems([*problems, *twins], 88, seed=0)
    assert not {p.chain for p in train} & {p.chain for p in heldout}
    assert len(train) < 2 * len(problems) - 88


def test_too_few_problems_to_split(problems: list[Problem]) -> None:
    with pytest.raises(UserError, match="too few to hold out 20"):
        split_problems(problems[:20], 20, seed=0)
