"""SALT and RewardFlow against loops over the group's graph in float64, and by hand."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl.credit.graph import rewardflow, salt, state_values
from lightningrl.table import Evidence
from tests.batches import SIZE, batches, make_rollout, make_table
from tests.credit.checks import check_loop, check_order, check_padding, flat, group_calls, named, nothing, relative_loop

GAMMA = 0.5


def edge(rollouts, i, t):
    """In drawn batches a state is the role that is asked, and an action that role's number of tokens."""
    calls = rollouts[i].transitions
    following = calls[t + 1].role if t + 1 < len(calls) else None
    return calls[t].role, len(calls[t].response_ids), following


def episode_loop(rollouts, calls, values, scale):
    units = [i for i, _ in calls]
    return relative_loop(values, [1 / len(rollouts[i].transitions) for i in units], units=units, scale=scale)


def salt_loop(rollouts):
    result: dict = {}
    for calls in group_calls(rollouts).values():
        advantages = episode_loop(rollouts, calls, [rollouts[i].reward for i, _ in calls], "std")
        steps: dict = {}
        for (i, t), advantage in zip(calls, advantages, strict=True):
            steps.setdefault(edge(rollouts, i, t), []).append(advantage)
        result.update({(i, t): np.mean(steps[edge(rollouts, i, t)]) for i, t in calls})
    return flat(rollouts, result)


def rewardflow_loop(rollouts, scale="none"):
    result: dict = {}
    for calls in group_calls(rollouts).values():
        earned = {(i, t): rollouts[i].transitions[t].reward for i, t in calls}
        ends = {(i, t) for i, t in calls if edge(rollouts, i, t)[2] is None}
        for i, t in ends:
            earned[i, t] += rollouts[i].reward
        states = {edge(rollouts, i, t)[0] for i, t in calls}
        arrivals = {s: [earned[c] for c in calls if c not in ends and edge(rollouts, *c)[2] == s] for s in states}
        value = {s: max(arrivals[s], default=0.0) for s in states}
        floor = dict(value)
        for _ in range(30):
            ahead = {c: GAMMA * (earned[c] if c in ends else value[edge(rollouts, *c)[2]]) for c in calls}
            value = {s: max([floor[s]] + [ahead[c] for c in calls if edge(rollouts, *c)[0] == s]) for s in states}
        gains = {c: (earned[c] if c in ends else value[edge(rollouts, *c)[2]]) - value[edge(rollouts, *c)[0]] for c in calls}
        totals = [sum(c.reward for c in rollouts[i].transitions) + rollouts[i].reward for i, _ in calls]
        result.update(zip(calls, episode_loop(rollouts, calls, totals, scale), strict=True))
        for state in states:
            same = [c for c in calls if edge(rollouts, *c)[0] == state]
            for c, advantage in zip(same, relative_loop([gains[c] for c in same], [1.0] * len(same), scale=scale), strict=True):
                result[c] += 2 * advantage
    return flat(rollouts, result)


ASSIGNERS: dict[str, tuple[Any, ...]] = {
    "salt": (salt, salt_loop),
    "rewardflow": (functools.partial(rewardflow, gamma=GAMMA, step_weight=2.0), rewardflow_loop),
    "rewardflow, std": (
        functools.partial(rewardflow, gamma=GAMMA, step_weight=2.0, scale="std"),
        functools.partial(rewardflow_loop, scale="std"),
    ),
}
JITTED = {name: jax.jit(assigner) for name, (assigner, _) in ASSIGNERS.items()}
NAMES = pytest.mark.parametrize("name", list(ASSIGNERS))


@pytest.mark.slow
@NAMES
@settings(max_examples=15, deadline=None)
@given(rollouts=batches(integers=True))
def test_is_that_of_a_loop(name, rollouts):
    check_loop(JITTED[name], rollouts, nothing, ASSIGNERS[name][1](rollouts))


@pytest.mark.slow
@NAMES
@settings(max_examples=8, deadline=None)
@given(rollouts=batches(integers=True), data=st.data())
def test_the_order_of_rollouts_does_not_matter(name, rollouts, data):
    check_order(JITTED[name], rollouts, data.draw(st.permutations(rollouts)), nothing)


@pytest.mark.slow
@NAMES
def test_padding_reaches_nothing(name):
    check_padding(JITTED[name], named(make_rollout("a", 1.0, [0.5, 0.0, 0.25]), make_rollout("a", 0.0, [0.25, 1.0])), nothing)


@pytest.mark.slow
@NAMES
def test_constant_groups_and_groups_of_one(name):
    same = [make_rollout("a", 0.1, [0.0, 0.0], roles=["w", "c"]) for _ in range(7)]
    for rollouts in (same, [make_rollout("a", 3.0, [1.0, 2.0], roles=["w", "c"])]):
        assert not np.asarray(JITTED[name](make_table(*rollouts), Evidence()).value).any()


@settings(max_examples=10, deadline=None)
@given(rollouts=batches(integers=True))
def test_merging_moves_credit_and_makes_none(rollouts):
    table = make_table(*rollouts, size=SIZE)
    merged = np.asarray(JITTED["salt"](table, Evidence()).value)
    apart = dataclasses.replace(table, action=np.arange(SIZE, dtype=np.int32))
    distinct = np.asarray(JITTED["salt"](apart, Evidence()).value)
    for group in set(table.group.tolist()):
        mine = table.valid & (table.group == group)
        np.testing.assert_allclose(merged[mine].sum(), distinct[mine].sum(), atol=1e-5)


def test_salt_by_hand():
    """The first step is shared by a success and a failure: 0; the second is each one's own."""
    table = make_table(
        make_rollout("a", 1.0, [0.0, 0.0], roles=["w", "c"], lengths=[2, 1]),
        make_rollout("a", 0.0, [0.0, 0.0], roles=["w", "c"], lengths=[2, 3]),
    )
    credit = salt(table, Evidence(), scale="none")
    assert credit.value.tolist() == [0.0, 0.5, 0.0, -0.5]
    assert credit.kind == "advantage"


@pytest.mark.slow
def test_values_flow_back_through_shared_states_and_cycles():
    """w → c → success; w → w → c → failure: V(c) = γ, V(w) = γ², whichever rollout one was in, and the cycle at w adds nothing."""
    table = make_table(
        make_rollout("a", 1.0, [0.0, 0.0], roles=["w", "c"]), make_rollout("a", 0.0, [0.0, 0.0, 0.0], roles=["w", "w", "c"]), size=6
    )
    value = jax.jit(functools.partial(state_values, gamma=GAMMA))(table)
    assert value[table.anchor[:5, 0]].tolist() == [0.25, 0.5, 0.25, 0.25, 0.5]
    # gains: ¼, ½ | 0, ¼, -½; at w the mean is 1/6, at c 0; episodes ±½.
    expected = [0.5 + 1 / 12, 1.0, -0.5 - 1 / 6, -0.5 + 1 / 12, -1.0, 0.0]
    np.testing.assert_allclose(rewardflow(table, Evidence(), gamma=GAMMA).value, expected, rtol=1e-5)


def test_too_few_sweeps_fall_short():
    table = make_table(make_rollout("a", 1.0, [0.0] * 3, roles=["x", "y", "z"]))
    first = table.anchor[0, 0]
    assert state_values(table, gamma=1.0, sweeps=2)[first] == 0.0
    assert state_values(table, gamma=1.0, sweeps=3)[first] == 1.0
