"""Judged credit against a loop in float64."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl.credit.judged import judged
from lightningrl.table import Evidence
from tests.batches import SIZE, batches, make_rollout, make_table
from tests.credit.checks import check_loop, check_order, check_padding, flat, group_calls, named, per_call, relative_loop

JUDGED = jax.jit(functools.partial(judged, outcome_weight=0.5))


def scores(rollouts, size):
    return Evidence(judge=per_call(rollouts, size, low=0, high=8).round())


def loop(rollouts):
    given_, result = scores(rollouts, SIZE).judge, {}
    of_call = dict(zip([(i, t) for i, r in enumerate(rollouts) for t in range(len(r.transitions))], given_, strict=False))
    for calls in group_calls(rollouts).values():
        units = [i for i, _ in calls]
        standing = functools.partial(relative_loop, weights=[1 / len(rollouts[i].transitions) for i in units], units=units)
        pairs = zip(standing([float(of_call[c]) for c in calls]), standing([rollouts[i].reward for i in units]), strict=True)
        result.update({c: j + 0.5 * r for c, (j, r) in zip(calls, pairs, strict=True)})
    return flat(rollouts, result)


@settings(max_examples=15, deadline=None)
@given(rollouts=batches(integers=True))
def test_is_that_of_a_loop(rollouts):
    check_loop(JUDGED, rollouts, scores, loop(rollouts))


@settings(max_examples=8, deadline=None)
@given(rollouts=batches(integers=True), data=st.data())
def test_the_order_of_rollouts_does_not_matter(rollouts, data):
    check_order(JUDGED, rollouts, data.draw(st.permutations(rollouts)), scores)


def test_padding_reaches_nothing():
    check_padding(JUDGED, named(make_rollout("a", 1.0, [0.5, 0.0, 0.25]), make_rollout("a", 0.0, [0.25, 1.0])), scores)


def test_by_hand():
    """One call scored 3 against two scored 1 and 2: the mean counts rollouts, (3 + 1.5) / 2."""
    table = make_table(make_rollout("a", 0.0), make_rollout("a", 0.0, [0.0, 0.0]), make_rollout("b", 0.0))
    credit = judged(table, Evidence(judge=np.array([3, 1, 2, 9], np.float32)), scale="none")
    assert credit.value.tolist() == [0.75, -1.25, -0.25, 0.0]
    assert credit.kind == "advantage"


def test_a_judge_whose_scale_drifts_between_groups():
    """Ten times the scores and a hundred more: the same credit."""
    table = make_table(make_rollout("a", 0.0), make_rollout("a", 0.0, [0.0, 0.0]))
    one, other = (judged(table, Evidence(judge=np.array(j, np.float32))).value for j in ([3, 1, 2], [130, 110, 120]))
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_equal_scores_get_exactly_0_and_missing_ones_are_asked_for():
    table = make_table(*[make_rollout("a", 0.0) for _ in range(7)])
    assert not judged(table, Evidence(judge=np.full(7, 0.1, np.float32))).value.any()
    with pytest.raises(ValueError, match="judged needs evidence.judge"):
        judged(table, Evidence())
    gradient = jax.grad(lambda j: judged(table, Evidence(judge=j)).value.sum())(np.arange(7, dtype=np.float32))
    assert not gradient.any()
