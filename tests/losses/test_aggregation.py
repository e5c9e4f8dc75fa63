"""Aggregations against a loop over units in float64, and their indifference to where edges stand."""

from __future__ import annotations

import functools

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl import losses
from tests.batches import EDGES, SIZE, batches, make_inputs, make_rollout, make_table, make_tokens

AGGREGATIONS = (losses.token_mean, losses.sequence_mean, losses.sequence_sum, losses.rollout_mean, losses.group_mean)
EACH = pytest.mark.parametrize("aggregation", AGGREGATIONS)
COUNT = jax.jit(losses.count_units)
JITTED = {aggregation: jax.jit(aggregation) for aggregation in AGGREGATIONS}


def loop(aggregation, table, tokens, loss):
    """(sum, denominator) from a dictionary of units."""
    unit_of = {
        losses.token_mean: lambda e, n: e,
        losses.sequence_mean: lambda e, n: n,
        losses.sequence_sum: lambda e, n: n,
        losses.rollout_mean: lambda e, n: table.rollout[n],
        losses.group_mean: lambda e, n: table.group[n],
    }[aggregation]
    units: dict[int, list[float]] = {}
    for e, n in enumerate(tokens.transition):
        if tokens.mask[e]:
            units.setdefault(int(unit_of(e, n)), []).append(float(loss[e]))
    per_unit = [sum(x) if aggregation is losses.sequence_sum else sum(x) / len(x) for x in units.values()]
    return sum(per_unit), len(units)


@pytest.mark.slow
@EACH
@settings(max_examples=25, deadline=None)
@given(rollouts=batches(), seed=st.integers(0, 9))
def test_is_that_of_a_loop(aggregation, rollouts, seed):
    table = make_table(*rollouts, size=SIZE)
    tokens = make_tokens(table, EDGES)
    loss = np.random.default_rng(seed).normal(size=EDGES).astype(np.float32)
    actual = JITTED[aggregation](np.where(tokens.mask, loss, np.nan).astype(np.float32), tokens.mask, COUNT(table, tokens))
    np.testing.assert_allclose(actual, loop(aggregation, table, tokens, loss), rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(rollouts=batches())
def test_counts_are_those_of_a_loop(rollouts):
    table = make_table(*rollouts, size=SIZE)
    tokens = make_tokens(table, EDGES)
    counts = COUNT(table, tokens)
    for name, unit in (("sequence", np.arange(SIZE)), ("rollout", table.rollout), ("group", table.group)):
        units = unit[tokens.transition]
        expected = [int(np.sum((units == units[e]) & tokens.mask)) if tokens.mask[e] else 0 for e in range(EDGES)]
        assert getattr(counts, f"{name}_tokens").tolist() == expected


@EACH
def test_an_empty_mask_gives_zero_over_zero(aggregation):
    table = make_table(make_rollout("a", 1.0, [0.0, 0.0], trainable=[False, False]))
    inputs = make_inputs(table, make_tokens(table))
    assert [float(x) for x in aggregation(inputs.logp, inputs.tokens.mask, inputs.counts)] == [0.0, 0.0]


@EACH
@settings(max_examples=15, deadline=None)
@given(rollouts=batches(integers=True), seed=st.integers(0, 99))
def test_edges_may_stand_anywhere(aggregation, rollouts, seed):
    """Packing into other rows permutes the edges: not a unit's count nor its loss depends on it."""
    table = make_table(*rollouts, size=SIZE)
    tokens = make_tokens(table, EDGES)
    order = np.random.default_rng(seed).permutation(EDGES)
    moved = jax.tree.map(lambda x: x[order], tokens)
    counts = COUNT(table, tokens)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[order], counts), COUNT(table, moved))
    loss = np.random.default_rng(seed).integers(-8, 8, EDGES).astype(np.float32)
    one = JITTED[aggregation](loss, tokens.mask, counts)
    other = JITTED[aggregation](loss[order], moved.mask, COUNT(table, moved))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


class ByHandTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_by_hand(self):
        """Group a: a rollout of calls with 1 and 3 tokens, one of a call with 4; group b: a rollout of 8 tokens. The calls'
        losses are 1, 3, 2 and 4."""
        table = make_table(
            make_rollout("a", 0.0, [0.0, 0.0], lengths=[1, 3]),
            make_rollout("a", 0.0, lengths=[4]),
            make_rollout("b", 0.0, lengths=[8]),
        )
        tokens = make_tokens(table)
        loss = np.array([1.0, 3.0, 2.0, 4.0], np.float32)[tokens.transition]
        counts = losses.count_units(table, tokens)
        expected = {
            losses.token_mean: (50.0, 16.0),
            losses.sequence_mean: (10.0, 4.0),
            losses.sequence_sum: (50.0, 4.0),
            losses.rollout_mean: (8.5, 3.0),
            losses.group_mean: (6.25, 2.0),
        }
        for aggregation, pair in expected.items():
            actual = self.variant(functools.partial(aggregation))(loss, tokens.mask, counts)
            np.testing.assert_allclose(actual, pair, rtol=1e-6)
        normalised = self.variant(functools.partial(losses.sequence_sum, length=8.0))(loss, tokens.mask, counts)
        np.testing.assert_allclose(normalised, (50.0, 32.0), rtol=1e-6)


def test_counts_keep_the_shape_of_micro_batches():
    table = make_table(make_rollout("a", 0.0, [0.0, 0.0], lengths=[2, 4]))
    tokens = jax.tree.map(lambda x: x.reshape(2, 3), make_tokens(table))
    counts = losses.count_units(table, tokens)
    assert counts.sequence_tokens.tolist() == [[2, 2, 4], [4, 4, 4]]
    assert counts.rollout_tokens.tolist() == [[6] * 3] * 2
