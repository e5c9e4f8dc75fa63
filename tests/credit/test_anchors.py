"""GiGPO and HGPO against loops in float64, and by hand."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl.credit.anchors import gigpo, hgpo
from lightningrl.table import Evidence
from tests.batches import batches, make_rollout, make_table
from tests.credit.checks import check_loop, check_order, check_padding, flat, group_calls, named, nothing, relative_loop

GAMMA = 0.5


def to_go(rollout, t):
    rewards = [call.reward for call in rollout.transitions]
    rewards[-1] += rollout.reward
    return sum(GAMMA ** (s - t) * rewards[s] for s in range(t, len(rewards)))


def history(rollout, t, depth):
    """In drawn batches all prompts are equal: a state is the role that is asked."""
    return tuple(call.role for call in rollout.transitions[max(0, t - depth + 1) : t + 1])


def by_state(rollouts, calls, depth):
    states: dict = {}
    for i, t in calls:
        states.setdefault(history(rollouts[i], t, depth), []).append((i, t))
    return states.values()


def gigpo_loop(rollouts, baseline="paper", scale="none"):
    result: dict = {}
    for calls in group_calls(rollouts).values():
        total = [sum(c.reward for c in rollouts[i].transitions) + rollouts[i].reward for i, _ in calls]
        paper = {"weights": [1 / len(rollouts[i].transitions) for i, _ in calls], "units": [i for i, _ in calls]}
        counted = paper if baseline == "paper" else {"weights": [1.0] * len(calls), "raw": True}
        result.update(zip(calls, relative_loop(total, scale=scale, **counted), strict=True))
        for same in by_state(rollouts, calls, 1):
            returns = [to_go(rollouts[i], t) for i, t in same]
            for call, advantage in zip(same, relative_loop(returns, [1.0] * len(same), scale=scale), strict=True):
                result[call] += 2 * advantage
    return flat(rollouts, result)


def hgpo_loop(rollouts, levels="paper", alpha=1.0):
    top: dict = {}
    bottom: dict = {}
    for calls in group_calls(rollouts).values():
        for k in range(3):
            for same in by_state(rollouts, calls, k + 1):
                returns = [to_go(rollouts[i], t) for i, t in same]
                for call, advantage in zip(same, relative_loop(returns, [1.0] * len(same), ddof=0.0), strict=True):
                    counts = len(same) > 1 and (levels == "paper" or advantage != 0)
                    top[call] = top.get(call, 0.0) + (counts and (k + 1) ** alpha * advantage)
                    bottom[call] = bottom.get(call, 0.0) + (counts and (k + 1) ** alpha)
    return flat(rollouts, {call: top[call] / bottom[call] if bottom[call] else 0.0 for call in top})


ASSIGNERS: dict[str, tuple[Any, ...]] = {
    "gigpo": (functools.partial(gigpo, step_weight=2.0, gamma=GAMMA), gigpo_loop),
    "gigpo, std": (functools.partial(gigpo, step_weight=2.0, gamma=GAMMA, scale="std"), functools.partial(gigpo_loop, scale="std")),
    "gigpo, code": (
        functools.partial(gigpo, step_weight=2.0, gamma=GAMMA, baseline="code"),
        functools.partial(gigpo_loop, baseline="code"),
    ),
    "hgpo": (functools.partial(hgpo, gamma=GAMMA), hgpo_loop),
    "hgpo, α = 2": (functools.partial(hgpo, gamma=GAMMA, alpha=2.0), functools.partial(hgpo_loop, alpha=2.0)),
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


def test_gigpo_by_hand():
    """A success of one call and a failure of three in the same state: baseline ½ by rollouts, ¼ by calls; G is 1, 0, 0, 0."""
    table = make_table(make_rollout("a", 1.0), make_rollout("a", 0.0, [0.0] * 3))
    of_step = np.array([0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(gigpo(table, Evidence()).value, np.array([0.5, -0.5, -0.5, -0.5]) + of_step, rtol=1e-6)
    np.testing.assert_allclose(gigpo(table, Evidence(), baseline="code").value, 2 * of_step, rtol=1e-6)
    assert gigpo(table, Evidence()).kind == "advantage"


@pytest.mark.slow
def test_groups_of_one_call():
    table = make_table(make_rollout("a", 3.0), size=2)
    assert gigpo(table, Evidence()).value.tolist() == [0.0, 0.0]
    assert gigpo(table, Evidence(), baseline="code").value.tolist() == [3.0, 0.0]
    assert hgpo(table, Evidence()).value.tolist() == [0.0, 0.0]


@pytest.mark.slow
def test_constant_groups_get_exactly_0():
    table = make_table(*[make_rollout("a", 0.1) for _ in range(7)])
    for assign in (gigpo, functools.partial(gigpo, scale="std"), hgpo, functools.partial(hgpo, levels="code")):
        assert not np.asarray(assign(table, Evidence()).value).any()


@pytest.mark.slow
def test_hgpo_by_hand():
    """State c: returns 2, 0, 1, so ±1/σ with σ² = 2/3; history (w, c): 2 and 0, so ±1, at k = 1 and, as it begins there, at k = 2."""
    roles = ["w", "c"], ["w", "c"], ["c"]
    rollouts = [make_rollout("a", x, [0.0] * len(r), roles=r) for x, r in zip((2.0, 0.0, 1.0), roles, strict=True)]
    value = np.asarray(hgpo(make_table(*rollouts), Evidence(), gamma=1.0).value)
    verdict = (1 / np.sqrt(2 / 3) + 2 + 3) / 6
    np.testing.assert_allclose(value, [1, verdict, -1, -verdict, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_average_verdict_keeps_its_weight_in_the_papers_levels():
    """A call that is average in its state, and the worse of two with its history."""
    rollouts = [
        make_rollout("a", 2.0, roles=["c"]),
        make_rollout("a", 0.0, roles=["c"]),
        make_rollout("a", 0.0, [0.0, 1.0], roles=["w", "c"]),
        make_rollout("a", 1.5, [0.0, 0.0], roles=["w", "c"]),
        make_rollout("a", 0.5, roles=["c"]),
    ]
    table = make_table(*rollouts)
    paper, code = (np.asarray(hgpo(table, Evidence(), levels=levels, gamma=1.0).value)[3] for levels in ("paper", "code"))
    # returns in state c: 2, 0, 1, 1.5, 0.5, mean 1, so k = 0 says 0; in (w, c): 1 against 1.5, so k = 1 and 2 say -1.
    np.testing.assert_allclose(paper, -5 / 6, rtol=1e-5)
    np.testing.assert_allclose(code, -1.0, rtol=1e-5)


def test_unknown_variants_are_named():
    table = make_table(make_rollout("a", 1.0))
    with pytest.raises(ValueError, match="gigpo has no baseline 'mean'"):
        gigpo(table, Evidence(), baseline="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hgpo has no levels 'all'"):
        hgpo(table, Evidence(), levels="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no scale 'var'"):
        gigpo(table, Evidence(), scale="var")  # type: ignore[arg-type]
