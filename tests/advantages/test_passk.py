"""Pass@k against a loop over groups."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl import credit
from lightningrl.advantages.passk import pass_at_k
from lightningrl.segments import EPSILON
from lightningrl.table import Credit, Evidence
from tests.batches import SIZE, batches, by_rollout, make_rollout, make_table, poison_table

SCALES = pytest.mark.parametrize("scale", ["std", "none"])
PASS = jax.jit(lambda t, scale: pass_at_k(t, credit.identical(t, Evidence()), Evidence(), scale=scale), static_argnums=1)


def loop(rollouts, scale):
    result = []
    for rollout in rollouts:
        rewards = sorted((r.reward for r in rollouts if r.group == rollout.group), reverse=True)
        best = len(rewards) > 1 and rollout.reward == rewards[0]
        gap = rewards[0] - rewards[1] if best else 0.0
        divisor = np.std(rewards, ddof=1) + EPSILON if scale == "std" and gap > 0 else 1.0
        result += [gap / divisor] * len(rollout.transitions)
    return result


@pytest.mark.slow
@SCALES
@settings(max_examples=20, deadline=None)
@given(rollouts=batches(integers=True))
def test_is_that_of_a_loop(scale, rollouts):
    actual = PASS(make_table(*rollouts, size=SIZE), scale)
    assert actual.dtype == jnp.float32
    expected = loop(rollouts, scale)
    np.testing.assert_allclose(actual[: len(expected)], expected, rtol=1e-5, atol=1e-6)
    assert (np.asarray(actual)[len(expected) :] == 0).all()


@SCALES
@settings(max_examples=10, deadline=None)
@given(rollouts=batches(), data=st.data())
def test_the_order_of_rollouts_does_not_matter(scale, rollouts, data):
    one, other = (
        by_rollout(order, np.asarray(PASS(make_table(*order, size=SIZE), scale)))
        for order in (rollouts, data.draw(st.permutations(rollouts)))
    )
    for rollout in one:
        np.testing.assert_allclose(one[rollout], other[rollout], rtol=1e-5, atol=1e-6)


def test_only_the_best_is_credited():
    table = make_table(make_rollout("a", 1.0), make_rollout("a", 4.0, [0.0, 0.0]), make_rollout("a", 3.0), make_rollout("b", 9.0))
    assert PASS(table, "none").tolist() == [0, 1, 1, 0, 0]


@SCALES
def test_ties_are_zero_whatever_the_length(scale):
    """The mean of three rewards of 0.1 is not 0.1 in float32."""
    table = make_table(make_rollout("a", 0.1, [0.0] * 3), make_rollout("a", 0.1), make_rollout("a", 0.1, [0.0] * 7), make_rollout("a", 0.0))
    assert PASS(table, scale).tolist() == [0.0] * 12


@pytest.mark.slow
@SCALES
def test_nan_in_padding_reaches_nothing(scale):
    table = make_table(make_rollout("a", 1.0, [0.0, 0.0]), make_rollout("a", 0.0), make_rollout("b", 2.0), make_rollout("b", 0.0), size=9)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(values, table):
        result = pass_at_k(table, Credit(value=values, kind="return"), Evidence(), scale=scale)
        return jnp.sum(result**2), result

    values = np.where(table.valid, table.outcome[:, 0], np.nan).astype(np.float32)
    (_, result), gradient = jax.jit(total)(values, poison_table(table))
    assert result.tolist() == PASS(table, scale).tolist()
    assert np.isfinite(gradient).all()


def test_what_is_wrong_is_said():
    table = make_table(make_rollout("a", 1.0), make_rollout("a", 0.0))
    with pytest.raises(ValueError, match="pass_at_k takes a baseline off"):
        pass_at_k(table, Credit(value=np.ones(2, np.float32), kind="advantage"), Evidence())
    with pytest.raises(ValueError, match="pass_at_k has no scale 'max'"):
        pass_at_k(table, credit.identical(table, Evidence()), Evidence(), scale="max")
