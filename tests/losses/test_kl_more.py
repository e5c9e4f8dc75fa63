"""k3+ and the unbiased k3, in value and gradient, and what they average to."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl.losses import kl
from tests.batches import batches
from tests.losses import oracles


def k3(d):
    return np.exp(-d) - 1 + d


def plus_loop(c, logp, fixed):
    """Only differences of it are a gradient: those of k2, around the value of k3."""
    return k3(fixed - c.reference) + (logp - c.reference) ** 2 / 2 - (fixed - c.reference) ** 2 / 2


def unbiased_loop(c, logp, fixed):
    return k3(logp - c.reference) * np.exp(logp - c.old)


def as_loss(estimator):
    return jax.jit(lambda inputs: (estimator(inputs), inputs.tokens.mask, {}))


ESTIMATORS: dict[str, tuple[Any, ...]] = {"k3_plus": (kl.k3_plus, plus_loop), "k3_unbiased": (kl.k3_unbiased, unbiased_loop)}
JITTED = {name: as_loss(estimator) for name, (estimator, _) in ESTIMATORS.items()}
EACH = pytest.mark.parametrize("name", list(ESTIMATORS))


@EACH
@settings(max_examples=15, deadline=None)
@given(rollouts=batches(), seed=st.integers(0, 99))
def test_is_that_of_a_loop(name, rollouts, seed):
    values, _, _ = oracles.check_values(
        lambda i: (*JITTED[name](i)[:1], np.asarray(i.tokens.mask), {}), ESTIMATORS[name][1], oracles.draw(rollouts, seed)
    )
    assert (np.asarray(values) >= 0).all()


@EACH
@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_that_of_the_loop(name, seed):
    oracles.check_gradient(JITTED[name], ESTIMATORS[name][1], oracles.draw(seed=seed))


@EACH
def test_nan_outside_the_mask_and_the_order_of_edges(name):
    oracles.check_invariances(JITTED[name])


def test_k3_plus_has_the_value_of_k3_and_the_gradient_of_k2_exactly():
    inputs = oracles.draw()

    def gradient(estimator):
        return jax.grad(lambda logp: jnp.sum(estimator(dataclasses.replace(inputs, logp=logp))))(inputs.logp)

    np.testing.assert_array_equal(kl.k3_plus(inputs), kl.k3(inputs))
    np.testing.assert_array_equal(gradient(kl.k3_plus), gradient(kl.k2))


def categoricals(size: int):
    """π, the policy that sampled, and the reference, over the same actions; an edge an action."""
    logits, old, reference = np.random.default_rng(3).normal(size=(3, size)).astype(np.float32)
    return logits, np.asarray(jax.nn.log_softmax(old)), np.asarray(jax.nn.log_softmax(reference))


@pytest.mark.slow
@pytest.mark.parametrize("name, sampled_from_old", [("k3_plus", False), ("k3_unbiased", True), ("k3_unbiased", False)])
def test_averages_to_the_kl_and_its_gradient_to_the_gradient(name, sampled_from_old):
    """Over all actions, weighted by who sampled. On samples of π itself π_old is π, and the unbiased one is still right."""
    base = oracles.draw(size=None)
    logits, old, reference = categoricals(len(base.logp))
    everywhere = np.ones(len(logits), bool)
    sampler = old if sampled_from_old else np.asarray(jax.nn.log_softmax(logits))
    tokens = dataclasses.replace(base.tokens, old_logp=sampler, ref_logp=reference, mask=everywhere)

    def exact(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logp) * (logp - reference))

    def expected(logits):
        return jnp.sum(np.exp(sampler) * ESTIMATORS[name][0](dataclasses.replace(base, tokens=tokens, logp=jax.nn.log_softmax(logits))))

    np.testing.assert_allclose(expected(logits), exact(logits), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(expected)(logits), jax.grad(exact)(logits), rtol=1e-5, atol=1e-6)
