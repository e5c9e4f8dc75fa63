"""Segment reductions and scans against float64 loops, and against NaN in unused entries."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl import segments

SEGMENTS = 4
LENGTH = 12

SCAN = jax.jit(segments.reverse_affine_scan)
NEXT = jax.jit(functools.partial(segments.next_in_segment, end=9.0))
LAST = jax.jit(segments.last_in_segment)


@st.composite
def entries(draw):
    floats = st.lists(st.floats(-3, 3, width=32), min_size=LENGTH, max_size=LENGTH)
    values = np.array(draw(floats), np.float32)
    weights = np.abs(np.array(draw(floats), np.float32))
    ids = np.array(draw(st.lists(st.integers(0, SEGMENTS - 1), min_size=LENGTH, max_size=LENGTH)), np.int32)
    mask = np.array(draw(st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH)))
    return values, weights, ids, mask


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected, np.float64), rtol=1e-5, atol=1e-5)


def members(segment, ids, mask):
    return [t for t in range(LENGTH) if mask[t] and ids[t] == segment]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(entries())
def test_segment_reductions_are_those_of_a_loop(data):
    values, weights, ids, mask = data
    poisoned = np.where(mask, values, np.nan).astype(np.float32)
    kwargs = dict(mask=mask, weights=np.where(mask, weights, np.nan).astype(np.float32))
    sums, means = (f(poisoned, ids, SEGMENTS, **kwargs) for f in (segments.segment_sum, segments.segment_mean))
    low, high = (f(poisoned, ids, SEGMENTS, mask=mask) for f in (segments.segment_min, segments.segment_max))
    weight = segments.segment_count(ids, SEGMENTS, **kwargs)
    count = segments.segment_count(ids, SEGMENTS, mask=mask)
    for s in range(SEGMENTS):
        rows = members(s, ids, mask)
        x = np.array([values[t] for t in rows], np.float64)
        w = np.array([weights[t] for t in rows], np.float64)
        total = float(np.sum(w))
        mean = float(np.sum(w * x)) / total if total > 0 else 0.0
        close(sums[s], np.sum(w * x))
        close(weight[s], total)
        assert count[s] == len(rows)
        if total == 0 or total > 1e-2:  # a mean of almost no weight is rounding
            close(means[s], mean)
        assert (low[s], high[s]) == ((min(x), max(x)) if rows else (0.0, 0.0))


@settings(max_examples=25, deadline=None)
@given(entries(), st.sampled_from([0.0, 1.0]))
def test_variances_are_those_of_a_loop(data, ddof):
    values, _, ids, mask = data
    poisoned = np.where(mask, values, np.nan).astype(np.float32)
    actual = segments.segment_var(poisoned, ids, SEGMENTS, mask=mask, ddof=ddof)
    for s in range(SEGMENTS):
        x = values[members(s, ids, mask)].astype(np.float64)
        close(actual[s], x.var(ddof=int(ddof)) if len(x) > ddof else 0.0)
    x = values[mask].astype(np.float64)
    close(segments.masked_var(poisoned, mask, ddof=ddof), x.var(ddof=int(ddof)) if len(x) > ddof else 0.0)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(entries())
def test_masked_reductions_are_those_of_a_loop(data):
    values, _, _, mask = data
    poisoned = np.where(mask, values, np.nan).astype(np.float32).reshape(3, 4)
    x = values[mask].astype(np.float64)
    mask = mask.reshape(3, 4)
    close(segments.masked_sum(poisoned, mask), x.sum())
    close(segments.masked_mean(poisoned, mask), x.mean() if len(x) else 0.0)
    assert segments.masked_count(mask) == len(x)
    assert segments.masked_min(poisoned, mask) == (x.min() if len(x) else 0.0)
    assert segments.masked_max(poisoned, mask) == (x.max() if len(x) else 0.0)


def test_min_and_max_keep_integers():
    ids, values = np.array([0, 0, 1], np.int32), np.array([7, -3, 5], np.int32)
    mask = np.array([True, True, False])
    low = segments.segment_min(values, ids, 2, mask=mask)
    high = segments.segment_max(values, ids, 2, mask=mask)
    assert low.dtype == jnp.int32 and low.tolist() == [-3, 0]
    assert high.dtype == jnp.int32 and high.tolist() == [7, 0]


def test_an_entry_of_weight_zero_is_not_read():
    values, ids = np.array([1.0, np.nan, 3.0], np.float32), np.zeros(3, np.int32)
    weights = np.array([1.0, 0.0, 1.0], np.float32)
    assert segments.segment_mean(values, ids, 1, weights=weights).tolist() == [2.0]
    assert segments.segment_var(values, ids, 1, weights=weights, ddof=1.0).tolist() == [2.0]


def test_weights_of_one_over_n_count_a_unit():
    """Two units, of one entry of 1 and of four entries of 0: mean ½, unbiased variance ½, as for two single entries."""
    values, ids = np.array([1, 0, 0, 0, 0], np.float32), np.zeros(5, np.int32)
    weights = np.array([1, 0.25, 0.25, 0.25, 0.25], np.float32)
    assert segments.segment_mean(values, ids, 1, weights=weights).tolist() == [0.5]
    assert segments.segment_var(values, ids, 1, weights=weights, ddof=1.0).tolist() == [0.5]


def scan_loop(factors, terms, ids, mask):
    """xₜ = aₜ xₜ₊₁ + bₜ, by looking for the next unmasked entry."""
    x = np.zeros(len(ids), np.float64)
    for t in reversed(range(len(ids))):
        following = [s for s in range(t + 1, len(ids)) if mask[s]]
        after = x[following[0]] if following and (not mask[t] or ids[following[0]] == ids[t]) else 0.0
        x[t] = terms[t] + factors[t] * after if mask[t] else after
    return x


@settings(max_examples=30, deadline=None)
@given(entries())
def test_scan_is_that_of_a_loop(data):
    values, weights, ids, mask = data
    ids = np.sort(ids)
    factors = np.minimum(weights, 1.0)
    actual = SCAN(
        np.where(mask, factors, np.nan).astype(np.float32),
        np.where(mask, values, np.nan).astype(np.float32),
        np.where(mask, ids, -7).astype(np.int32),
        mask,
    )
    close(actual, scan_loop(factors, values, ids, mask))


@settings(max_examples=30, deadline=None)
@given(entries())
def test_next_in_segment_is_that_of_a_loop(data):
    values, _, ids, mask = data
    ids = np.sort(ids)
    actual = NEXT(values, ids, mask)
    last = LAST(ids, mask)
    for t in range(LENGTH):
        later = [s for s in range(t + 1, LENGTH) if mask[s] and ids[s] == ids[t]]
        assert actual[t] == (values[later[0]] if mask[t] and later else 9.0)
        assert last[t] == (mask[t] and not later)


class ScanTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_a_masked_entry_carries_and_never_resets(self):
        """γ = ½, reward 8 at the end: the masked middle entry consumes no discount and ends no segment, whatever its id."""
        half, rewards = np.full(4, 0.5, np.float32), np.array([0, 99, 0, 8], np.float32)
        ids, mask = np.array([0, 3, 0, 0], np.int32), np.array([True, False, True, True])
        scan = self.variant(segments.reverse_affine_scan)
        assert scan(half, rewards, ids, mask).tolist() == [2.0, 4.0, 4.0, 8.0]

    @chex.variants(with_jit=True, without_jit=True)
    def test_a_new_segment_resets(self):
        ones, rewards = np.ones(4, np.float32), np.array([1, 2, 4, 8], np.float32)
        scan = self.variant(segments.reverse_affine_scan)
        assert scan(ones, rewards, np.array([0, 0, 1, 1], np.int32), np.ones(4, bool)).tolist() == [3.0, 2.0, 12.0, 8.0]


def test_scan_maps_over_rows():
    rewards = np.arange(8, dtype=np.float32).reshape(2, 4)
    ids, mask, ones = np.zeros((2, 4), np.int32), np.ones((2, 4), bool), np.ones((2, 4), np.float32)
    expected = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
    assert jax.vmap(segments.reverse_affine_scan)(ones, rewards, ids, mask).tolist() == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "reduce",
    [
        lambda x, ids, mask: segments.segment_sum(x, ids, 2, mask=mask),
        lambda x, ids, mask: segments.segment_mean(x, ids, 2, mask=mask),
        lambda x, ids, mask: segments.segment_var(x, ids, 2, mask=mask, ddof=1.0),
        lambda x, ids, mask: segments.safe_sqrt(segments.segment_var(x, ids, 2, mask=mask)),
        lambda x, ids, mask: segments.segment_max(x, ids, 2, mask=mask),
        lambda x, ids, mask: segments.segment_min(x, ids, 2, mask=mask),
        lambda x, ids, mask: segments.reverse_affine_scan(x, x, ids, mask),
        lambda x, ids, mask: segments.next_in_segment(x, ids, mask),
        lambda x, ids, mask: segments.masked_mean(x, mask),
        lambda x, ids, mask: segments.masked_var(x, mask),
        lambda x, ids, mask: segments.masked_max(x, mask),
    ],
)
def test_no_nan_crosses_backwards(reduce):
    x = np.array([1.0, np.nan, 1.0, 2.0, np.inf], np.float32)
    ids, mask = np.array([0, 0, 0, 1, 1], np.int32), np.array([True, False, True, True, False])
    gradient = jax.grad(lambda x: jnp.sum(reduce(x, ids, mask)))(x)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[~mask] == 0).all()


def test_safe_division_and_root_have_finite_gradients_at_zero():
    assert jax.grad(lambda d: segments.safe_divide(1.0, d))(0.0) == 0.0
    assert jax.grad(segments.safe_sqrt)(0.0) == 0.0
    assert segments.safe_divide(jnp.ones(()), jnp.zeros(()), otherwise=3.0) == 3.0
    assert segments.safe_sqrt(jnp.asarray(-1.0)) == 0.0


def test_a_segment_is_constant_by_comparison():
    values = np.array([0.1, 0.1, 0.1, np.nan, 0.2, 5.0], np.float32)
    ids = np.array([0, 0, 1, 1, 1, 2], np.int32)
    mask = np.array([True, True, True, False, True, True])
    assert segments.segment_constant(values, ids, 4, mask=mask).tolist() == [True, False, True, True]


def test_a_hair_is_a_difference():
    """The next float32 after 1, and 1e-9 after 0: no tolerance stands between equal and unequal."""
    values = np.array([1.0, np.nextafter(np.float32(1), np.float32(2)), 0.0, 1e-9, 0.1, 0.1], np.float32)
    ids = np.array([0, 0, 1, 1, 2, 2], np.int32)
    assert segments.segment_constant(values, ids, 3).tolist() == [False, False, True]


def test_reductions_of_no_entries_at_all():
    nothing, mask = np.zeros(0, np.float32), np.zeros(0, bool)
    for reduce in (segments.masked_sum, segments.masked_mean, segments.masked_var, segments.masked_min, segments.masked_max):
        assert reduce(nothing, mask) == 0.0
