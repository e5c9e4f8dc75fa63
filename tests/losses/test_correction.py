"""Rollout corrections against float64 loops, and what `corrected` does to a loss."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl.losses import aggregation, correction, policy
from tests.batches import batches, make_rollout, poison
from tests.losses import oracles


def by_sequence(c, of_sequence):
    result = np.zeros_like(c.logp)
    for edges in c.sequences:
        result[edges] = of_sequence(c.old[edges] - c.behaviour[edges])
    return result


def inside(value, low, high):
    return (low <= value) & (value <= high)


def token_truncation(c):
    return np.minimum(np.exp(c.old - c.behaviour), 1.3), c.mask


def sequence_truncation(c):
    return by_sequence(c, lambda d: min(np.prod(np.exp(d)), 1.3)), c.mask


def token_masking(c):
    w = np.exp(c.old - c.behaviour)
    return w, inside(w, 0.7, 1.3)


def sequence_masking(c):
    w = by_sequence(c, lambda d: np.prod(np.exp(d)))
    return w, inside(w, 0.5, 1.5)


def geometric(c):
    return np.ones_like(c.old), inside(by_sequence(c, lambda d: np.exp(np.mean(d))), 0.9, 1.15)


def rejection_of(estimator, over, low, high):
    value = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: np.exp(d) - 1 - d}[estimator]

    def loop(c):
        value_of = value(c.old - c.behaviour) if over is None else by_sequence(c, lambda d: over(value(d)))
        return np.ones_like(c.old), inside(value_of, low, high)

    return loop


def rejection(**changed):
    return functools.partial(correction.rejection, **changed)


CORRECTIONS: dict[str, tuple[Any, ...]] = {
    "token_truncation": (functools.partial(correction.token_truncation, cap=1.3), token_truncation),
    "sequence_truncation": (functools.partial(correction.sequence_truncation, cap=1.3), sequence_truncation),
    "token_masking": (functools.partial(correction.token_masking, low=0.7, high=1.3), token_masking),
    "sequence_masking": (functools.partial(correction.sequence_masking, low=0.5, high=1.5), sequence_masking),
    "geometric": (functools.partial(correction.geometric, low=0.9, high=1.15), geometric),
    "k1 token": (rejection(estimator="k1", low=0.8, high=1.5), rejection_of("k1", None, np.log(0.8), np.log(1.5))),
    "k1 symmetric": (rejection(estimator="k1", high=1.25), rejection_of("k1", None, np.log(0.8), np.log(1.25))),
    "k1 without a lower bound": (
        rejection(estimator="k1", low=0.0, high=1.2, level="sequence_sum"),
        rejection_of("k1", np.sum, -np.inf, np.log(1.2)),
    ),
    "k1 mean": (
        rejection(estimator="k1", low=0.9, high=1.1, level="sequence_mean"),
        rejection_of("k1", np.mean, np.log(0.9), np.log(1.1)),
    ),
    "k2 token": (rejection(estimator="k2", high=0.05), rejection_of("k2", None, 0, 0.05)),
    "k2 maximum": (rejection(estimator="k2", high=0.2, level="sequence_max"), rejection_of("k2", np.max, 0, 0.2)),
    "k3 token": (rejection(high=0.05), rejection_of("k3", None, 0, 0.05)),
    "k3 sum": (rejection(high=0.2, level="sequence_sum"), rejection_of("k3", np.sum, 0, 0.2)),
    "k3 mean": (rejection(high=0.1, level="sequence_mean"), rejection_of("k3", np.mean, 0, 0.1)),
    "k3 maximum": (rejection(high=0.2, level="sequence_max"), rejection_of("k3", np.max, 0, 0.2)),
}
JITTED = {name: jax.jit(f) for name, (f, _) in CORRECTIONS.items()}
EACH = pytest.mark.parametrize("name", list(CORRECTIONS))


@pytest.mark.slow
@EACH
@settings(max_examples=8, deadline=None)
@given(rollouts=batches(), seed=st.integers(0, 99))
def test_is_that_of_a_loop(name, rollouts, seed):
    inputs = oracles.draw(rollouts, seed)
    weight, keep = JITTED[name](inputs)
    c = oracles.columns(inputs)
    expected, inside_bounds = CORRECTIONS[name][1](c)
    kept = c.mask & inside_bounds
    np.testing.assert_array_equal(keep, kept)
    np.testing.assert_allclose(weight, np.where(kept, expected, 0.0), rtol=1e-5, atol=1e-6)
    assert weight.dtype == jnp.float32


@EACH
def test_some_bound_is_met(name):
    """The loops above compare something: over a few batches there are truncated or dropped tokens, and others."""
    outcomes = []
    for seed in range(4):
        c = oracles.columns(oracles.draw(seed=seed))
        weight, kept = CORRECTIONS[name][1](c)
        outcomes += list(weight[c.used] < 1.3) if "truncation" in name else list(np.broadcast_to(kept, c.mask.shape)[c.used])
    assert any(outcomes) and not all(outcomes)


@pytest.mark.slow
@EACH
def test_invariances(name):
    """Of PPO under the correction: NaN outside the mask, the order of edges, padding and an empty mask."""
    oracles.check_invariances(jax.jit(functools.partial(correction.corrected, loss=policy.ppo_clip, correction=CORRECTIONS[name][0])))


@pytest.mark.slow
@EACH
def test_weights_are_never_differentiated(name):
    inputs = oracles.draw()

    def total(old, behaviour):
        tokens = dataclasses.replace(inputs.tokens, old_logp=old, behaviour_logp=behaviour)
        return jnp.sum(CORRECTIONS[name][0](dataclasses.replace(inputs, tokens=tokens))[0])

    for gradient in jax.grad(total, argnums=(0, 1))(inputs.tokens.old_logp, inputs.tokens.behaviour_logp):
        assert not np.asarray(gradient).any()


@pytest.mark.slow
@EACH
def test_a_sampler_that_is_the_policy_needs_no_correction(name):
    inputs = oracles.draw()
    inputs = dataclasses.replace(inputs, tokens=dataclasses.replace(inputs.tokens, behaviour_logp=inputs.tokens.old_logp))
    weight, keep = JITTED[name](inputs)
    np.testing.assert_array_equal(weight, inputs.tokens.mask)
    np.testing.assert_array_equal(keep, inputs.tokens.mask)


@pytest.mark.slow
def test_corrected_weighs_the_loss_its_gradient_and_narrows_keep():
    inputs = oracles.draw()
    plain, _, aux = policy.ppo_clip(inputs)
    weigh = CORRECTIONS["token_masking"][0]
    loss = functools.partial(correction.corrected, loss=policy.ppo_clip, correction=weigh)
    weight, kept = weigh(inputs)
    values, keep, both = loss(inputs)
    np.testing.assert_allclose(values, weight * plain, rtol=1e-6)
    np.testing.assert_array_equal(keep, kept)
    assert both.keys() == aux.keys() | {"correction_weight_mean", "correction_dropped_fraction"}
    assert float(both["correction_dropped_fraction"][0]) == np.sum(inputs.tokens.mask & ~np.asarray(kept)) > 0

    def gradient(f):
        return jax.grad(lambda logp: jnp.sum(f(dataclasses.replace(inputs, logp=logp))[0]))(inputs.logp)

    np.testing.assert_allclose(gradient(loss), weight * gradient(policy.ppo_clip), rtol=1e-5, atol=1e-6)


def test_batch_normalised_weights_average_to_one():
    inputs = oracles.draw()
    mask = inputs.tokens.mask
    tokens, keep = jax.jit(correction.batch_normalised)(inputs)
    np.testing.assert_allclose(np.mean(np.asarray(tokens)[mask]), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(keep, mask)
    c = oracles.columns(inputs)
    w = np.minimum(np.exp(c.old - c.behaviour), 2.0)
    np.testing.assert_allclose(tokens, np.where(mask, w / np.mean(w[c.used]), 0.0), rtol=1e-5, atol=1e-6)

    cut = CORRECTIONS["sequence_truncation"][0]
    sequences, _ = correction.batch_normalised(inputs, correction=cut, aggregation=aggregation.sequence_mean)
    per_sequence = [float(sequences[edges[0]]) for edges in c.sequences]
    np.testing.assert_allclose(np.mean(per_sequence), 1.0, rtol=1e-6)

    # Dropped tokens count as 0 in the mean.
    masked, kept = correction.batch_normalised(inputs, correction=CORRECTIONS["token_masking"][0])
    np.testing.assert_allclose(np.sum(masked), mask.sum(), rtol=1e-6)
    assert kept.sum() < mask.sum()


def test_batch_normalised_by_the_mean_of_all_micro_batches():
    inputs = oracles.draw()
    used = np.flatnonzero(inputs.tokens.mask)
    whole, _ = correction.batch_normalised(inputs)
    parts = [jax.tree.map(lambda x, e=e: np.asarray(x)[e], inputs) for e in (used[:6], used[6:])]
    sums = [aggregation.token_mean(correction.token_truncation(p)[0], p.tokens.mask, p.counts) for p in parts]
    mean = (sums[0][0] + sums[1][0]) / (sums[0][1] + sums[1][1])
    together = np.concatenate([correction.batch_normalised(p, mean=mean)[0] for p in parts])
    np.testing.assert_allclose(together, np.asarray(whole)[used], rtol=1e-6)


def test_batch_normalised_without_weights_or_mask():
    inputs = oracles.draw()
    nothing = functools.partial(correction.token_masking, low=50.0, high=60.0)
    weight, keep = correction.batch_normalised(inputs, correction=nothing)
    assert not np.asarray(weight).any() and not np.asarray(keep).any()
    spoiled = poison(inputs, inputs.tokens.mask)
    np.testing.assert_array_equal(correction.batch_normalised(spoiled)[0], correction.batch_normalised(inputs)[0])


def test_long_products_stay_finite():
    inputs = oracles.draw([make_rollout("a", 1.0, lengths=[30])], spread=0.0)
    tokens = dataclasses.replace(inputs.tokens, behaviour_logp=inputs.tokens.old_logp - 10)
    weight, keep = correction.sequence_masking(dataclasses.replace(inputs, tokens=tokens))
    assert np.isfinite(weight).all() and not keep.any()
    np.testing.assert_array_equal(np.unique(correction.sequence_truncation(dataclasses.replace(inputs, tokens=tokens))[0]), [0.0, 2.0])


@pytest.mark.parametrize(
    "weigh, setting, sentence",
    [
        (correction.token_truncation, {"cap": 0.0}, "The bounds are 0.0 and 0.0"),
        (correction.sequence_truncation, {"cap": -1.0}, "The bounds are 0.0 and -1.0"),
        (correction.token_masking, {"low": 2.0, "high": 1.0}, "The bounds are 2.0 and 1.0"),
        (correction.sequence_masking, {"low": -0.5}, "The bounds are -0.5 and 3.0"),
        (correction.geometric, {"high": 0.5}, "The bounds are 0.99 and 0.5"),
        (correction.rejection, {"high": 0.0}, "high positive"),
        (correction.rejection, {"high": 0.0, "estimator": "k1"}, "high positive"),
        (correction.rejection, {"high": 1.0, "low": 0.1}, "it has no lower bound, but low is 0.1"),
        (correction.rejection, {"high": 1.0, "estimator": "k1", "level": "sequence_max"}, "bounds nothing"),
        (correction.rejection, {"high": 1.0, "estimator": "k4"}, "no rejection by 'k4'"),
        (correction.rejection, {"high": 1.0, "level": "word"}, "per 'word'"),
    ],
)
def test_settings_are_checked(weigh, setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        weigh(oracles.draw(), **setting)
