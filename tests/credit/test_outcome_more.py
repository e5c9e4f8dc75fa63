"""Outcome splits, potential shaping and MT-GRPO against loops in float64."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl.credit.outcome import last_only, uniform_split
from lightningrl.credit.returns import mt_grpo, potential_difference, reward_to_go
from lightningrl.segments import joint_ids
from lightningrl.table import Evidence
from tests.batches import SIZE, batches, by_rollout, make_rollout, make_table
from tests.credit.checks import check_loop, check_order, check_padding, flat, named, nothing, per_call, relative_loop

GAMMA, LAMBDA = 0.5, 0.25


def potentials(rollouts, size):
    return Evidence(potential=per_call(rollouts, size, 2))


def chained(rollouts, size):
    """Φ after a call is Φ before the next one."""
    before, after = per_call(rollouts, size), np.zeros(size, np.float32)
    after[:-1] = before[1:]
    return Evidence(potential=np.stack([before, after], 1))


def last_only_loop(rollouts):
    return [x for r in rollouts for x in [0.0] * (len(r.transitions) - 1) + [r.reward]]


def uniform_split_loop(rollouts):
    return [r.reward / len(r.transitions) for r in rollouts for _ in r.transitions]


def potential_loop(rollouts, lambda_=1.0, terminal_zero=True):
    given_, result, row = potentials(rollouts, SIZE).potential.astype(np.float64), [], 0
    for r in rollouts:
        shaped = []
        for t, call in enumerate(r.transitions):
            last = t == len(r.transitions) - 1
            after = 0.0 if last and terminal_zero else given_[row + t, 1]
            shaped.append(call.reward + (r.reward if last else 0.0) + GAMMA * after - given_[row + t, 0])
        result += [sum((GAMMA * lambda_) ** (s - t) * shaped[s] for s in range(t, len(shaped))) for t in range(len(shaped))]
        row += len(r.transitions)
    return result


def mt_grpo_loop(rollouts):
    result: dict = {}
    for group in {r.group for r in rollouts}:
        members = [i for i, r in enumerate(rollouts) if r.group == group]
        outcomes = relative_loop([rollouts[i].reward for i in members], [1.0] * len(members))
        for i, advantage in zip(members, outcomes, strict=True):
            result.update({(i, t): advantage for t in range(len(rollouts[i].transitions))})
        for t in range(4):
            early = [i for i in members if t < len(rollouts[i].transitions) - 1]
            if early:
                rewards = [rollouts[i].transitions[t].reward for i in early]
                for i, advantage in zip(early, relative_loop(rewards, [1.0] * len(early)), strict=True):
                    result[i, t] += 0.5 * advantage
    return flat(rollouts, result)


ASSIGNERS: dict[str, tuple[Any, ...]] = {
    "last_only": (last_only, nothing, last_only_loop),
    "uniform_split": (uniform_split, nothing, uniform_split_loop),
    "potential": (functools.partial(potential_difference, gamma=GAMMA), potentials, potential_loop),
    "potential, own turn": (
        functools.partial(potential_difference, gamma=GAMMA, lambda_=LAMBDA, terminal_zero=False),
        potentials,
        functools.partial(potential_loop, lambda_=LAMBDA, terminal_zero=False),
    ),
    "mt_grpo": (functools.partial(mt_grpo, turn_weight=0.5), nothing, mt_grpo_loop),
}
JITTED = {name: jax.jit(assigner) for name, (assigner, _, _) in ASSIGNERS.items()}
NAMES = pytest.mark.parametrize("name", list(ASSIGNERS))
SHAPED, TO_GO = jax.jit(potential_difference), jax.jit(reward_to_go)


@pytest.mark.slow
@NAMES
@settings(max_examples=15, deadline=None)
@given(rollouts=batches(integers=True))
def test_is_that_of_a_loop(name, rollouts):
    check_loop(JITTED[name], rollouts, ASSIGNERS[name][1], ASSIGNERS[name][2](rollouts))


@pytest.mark.slow
@NAMES
@settings(max_examples=8, deadline=None)
@given(rollouts=batches(integers=True), data=st.data())
def test_the_order_of_rollouts_does_not_matter(name, rollouts, data):
    check_order(JITTED[name], rollouts, data.draw(st.permutations(rollouts)), ASSIGNERS[name][1])


@pytest.mark.slow
@NAMES
def test_padding_reaches_nothing(name):
    rollouts = named(make_rollout("a", 1.0, [0.5, 0.0, 0.25]), make_rollout("a", 0.0, [0.25, 1.0]), make_rollout("b", 2.0))
    check_padding(JITTED[name], rollouts, ASSIGNERS[name][1])


@settings(max_examples=15, deadline=None)
@given(rollouts=batches())
def test_parts_sum_to_the_outcome(rollouts):
    table = make_table(*rollouts, size=SIZE)
    for name in ("last_only", "uniform_split"):
        credits = by_rollout(rollouts, np.asarray(JITTED[name](table, Evidence()).value))
        np.testing.assert_allclose([sum(credits[r.id]) for r in rollouts], [r.reward for r in rollouts], rtol=1e-5, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(rollouts=batches())
def test_shaping_telescopes(rollouts):
    """Undiscounted, a chained potential leaves the reward-to-go less Φ before the call: a baseline, whatever Φ is."""
    table, evidence = make_table(*rollouts, size=SIZE), chained(rollouts, SIZE)
    expected = TO_GO(table, Evidence()).value - evidence.potential[:, 0]
    np.testing.assert_allclose(SHAPED(table, evidence).value, expected, rtol=1e-5, atol=2e-6)


def test_mt_grpo_by_hand():
    """Two rollouts of two calls: outcomes 1 and 0 are ±1/√2, turn rewards 0 and 2 the other way round."""
    table = make_table(make_rollout("a", 1.0, [0.0, 9.0]), make_rollout("a", 0.0, [2.0, -9.0]), make_rollout("b", 5.0, [1.0, 1.0]))
    half = 1 / np.sqrt(2)
    credit = jax.jit(mt_grpo)(table, Evidence())
    np.testing.assert_allclose(credit.value, [0, half, 0, -half, 0, 0], atol=1e-5)
    assert credit.value[4:].tolist() == [0.0, 0.0]
    assert credit.kind == "advantage"


def test_joint_ids():
    mask = np.array([True, True, False, True, True, False])
    first, second = np.array([3, 0, 7, 3, 2**31 - 1, -1], np.int32), np.array([-1, 5, 7, -1, -1, 2], np.int32)
    ids = jax.jit(joint_ids)(mask, first, second)
    assert ids.tolist() == [1, 0, 0, 1, 2, 0]
    assert joint_ids(np.zeros(3, bool), np.arange(3, dtype=np.int32)).tolist() == [0, 0, 0]


def test_no_gradient_flows_into_the_potential_and_it_is_asked_for():
    table = make_table(make_rollout("a", 1.0, [0.5, 0.0]))
    gradient = jax.grad(lambda p: SHAPED(table, Evidence(potential=p)).value.sum())(np.ones((2, 2), np.float32))
    assert not gradient.any()
    with pytest.raises(ValueError, match="needs evidence.potential"):
        potential_difference(table, Evidence())
