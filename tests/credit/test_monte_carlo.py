"""VinePPO and the counterfactual against loops in float64."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl.credit.monte_carlo import counterfactual, vineppo
from lightningrl.table import Evidence
from tests.batches import SIZE, batches, by_rollout, make_rollout, make_table
from tests.credit.checks import check_loop, check_order, check_padding, named, per_call

GAMMA = 0.5


def branches(rollouts, size):
    count = np.maximum(per_call(rollouts, size, 2, low=-1, high=4, seed=1).round(), 0).astype(np.float32)
    return Evidence(branch_value=per_call(rollouts, size, 2), branch_count=count)


def loop(rollouts, name):
    evidence, result, row = branches(rollouts, SIZE), [], 0
    for rollout in rollouts:
        rewards = [call.reward for call in rollout.transitions]
        rewards[-1] += rollout.reward
        for t in range(len(rewards)):
            (before, after), (known, known_after) = evidence.branch_value[row + t], evidence.branch_count[row + t]
            last = t == len(rewards) - 1
            if name == "counterfactual":
                credit = sum(GAMMA ** (s - t) * rewards[s] for s in range(t, len(rewards))) - before
            else:
                credit = rewards[t] + (0 if last else GAMMA * after) - before
                known = known and (last or known_after)
            result.append(credit if known else 0.0)
        row += len(rewards)
    return result


JITTED = {f.__name__: jax.jit(functools.partial(f, gamma=GAMMA)) for f in (vineppo, counterfactual)}
NAMES = pytest.mark.parametrize("name", list(JITTED))


@NAMES
@settings(max_examples=15, deadline=None)
@given(rollouts=batches())
def test_is_that_of_a_loop(name, rollouts):
    check_loop(JITTED[name], rollouts, branches, loop(rollouts, name))


@NAMES
@settings(max_examples=8, deadline=None)
@given(rollouts=batches(), data=st.data())
def test_the_order_of_rollouts_does_not_matter(name, rollouts, data):
    check_order(JITTED[name], rollouts, data.draw(st.permutations(rollouts)), branches)


@NAMES
def test_padding_reaches_nothing(name):
    check_padding(JITTED[name], named(make_rollout("a", 1.0, [0.5, 0.0, 0.25]), make_rollout("a", 0.0, [0.25, 1.0])), branches)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(rollouts=batches())
def test_vineppo_telescopes(rollouts):
    table = make_table(*rollouts, size=SIZE)
    before, after = per_call(rollouts, SIZE), np.zeros(SIZE, np.float32)
    after[:-1] = before[1:]
    credits = by_rollout(rollouts, np.asarray(vineppo(table, Evidence(branch_value=np.stack([before, after], 1))).value))
    values = by_rollout(rollouts, before)
    for r in rollouts:
        expected = r.reward + sum(t.reward for t in r.transitions) - values[r.id][0]
        np.testing.assert_allclose(sum(credits[r.id]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_by_hand():
    """Outcome 1; chances of it ¼ before, ¾ between, and what is given for after the end is not read."""
    table = make_table(make_rollout("a", 1.0, [0.0, 0.0]), size=3)
    evidence = Evidence(branch_value=np.array([[0.25, 0.75], [0.75, 9.0], [0, 0]], np.float32))
    assert vineppo(table, evidence).value.tolist() == [0.5, 0.25, 0]
    assert counterfactual(table, evidence).value.tolist() == [0.75, 0.25, 0]
    assert vineppo(table, evidence).kind == counterfactual(table, evidence).kind == "advantage"


@NAMES
def test_the_evidence_is_asked_for_and_gets_no_gradient(name):
    table = make_table(make_rollout("a", 1.0))
    with pytest.raises(ValueError, match=f"{name} needs evidence.branch_value"):
        JITTED[name](table, Evidence())
    gradient = jax.grad(lambda v: JITTED[name](table, Evidence(branch_value=v)).value.sum())(np.ones((1, 2), np.float32))
    assert not gradient.any()
