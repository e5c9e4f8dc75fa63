"""CISPO, SAPO, DRO, GPG and decoupled PPO against float64 loops, in value and gradient."""

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

from lightningrl.losses import policy, soft
from tests.batches import batches
from tests.losses import oracles


def each_token(formula):
    def loop(c, logp, fixed):
        loss = np.zeros_like(logp)
        for e in c.used:
            loss[e] = formula(logp[e], fixed[e], c.old[e], c.behaviour[e], c.advantage[e])
        return loss

    return loop


def cispo(logp, fixed, old, behaviour, advantage):
    return -min(max(np.exp(fixed - old), 0.7), 1.3) * advantage * logp


def sapo(logp, fixed, old, behaviour, advantage):
    tau = 0.8 if advantage > 0 else 1.5
    return -4 / tau / (1 + np.exp(-tau * (np.exp(logp - old) - 1))) * advantage


def dro(logp, fixed, old, behaviour, advantage):
    return -(advantage * logp - 0.5 * 0.3 * (logp - old) ** 2)


def gpg(logp, fixed, old, behaviour, advantage):
    return -advantage * logp


def decoupled(logp, fixed, old, behaviour, advantage):
    ratio = np.exp(logp - old)
    return np.exp(old - behaviour) * max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.25))


LOSSES: dict[str, tuple[Any, ...]] = {
    "cispo": (functools.partial(soft.cispo, lower=0.7, upper=1.3), cispo),
    "sapo": (functools.partial(soft.sapo, tau_pos=0.8, tau_neg=1.5), sapo),
    "dro": (functools.partial(soft.dro, beta=0.3), dro),
    "gpg": (soft.gpg, gpg),
    "decoupled_ppo": (functools.partial(soft.decoupled_ppo, clip_high=0.25, max_weight=1.2), decoupled),
}
JITTED = {name: jax.jit(loss) for name, (loss, _) in LOSSES.items()}
EACH = pytest.mark.parametrize("name", list(LOSSES))


@EACH
@settings(max_examples=10, deadline=None)
@given(rollouts=batches(), seed=st.integers(0, 99))
def test_is_that_of_a_loop(name, rollouts, seed):
    inputs = oracles.per_token(oracles.draw(rollouts, seed), seed)
    _, keep, _ = oracles.check_values(JITTED[name], each_token(LOSSES[name][1]), inputs)
    c = oracles.columns(inputs)
    kept = c.mask & (np.exp(c.old - c.behaviour) <= 1.2) if name == "decoupled_ppo" else c.mask
    assert keep.tolist() == kept.tolist()


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_that_of_the_loop(name, seed):
    oracles.check_gradient(JITTED[name], each_token(LOSSES[name][1]), oracles.per_token(oracles.draw(seed=seed), seed))


@EACH
def test_invariances(name):
    oracles.check_invariances(JITTED[name])


@pytest.mark.slow
@EACH
def test_on_policy_the_gradient_is_the_policy_gradient(name):
    inputs = oracles.draw()
    tokens = dataclasses.replace(inputs.tokens, old_logp=inputs.logp, behaviour_logp=inputs.logp)

    def total(logp):
        return jnp.sum(LOSSES[name][0](dataclasses.replace(inputs, logp=logp, tokens=tokens))[0])

    np.testing.assert_allclose(jax.grad(total)(inputs.logp), np.where(tokens.mask, -inputs.advantage, 0.0), rtol=1e-6, atol=1e-6)


def test_sapo_gradient_by_hand():
    """-4 σ(1 - σ) ρ A, σ = sigmoid(τ (ρ - 1))."""
    inputs = oracles.draw()
    c = oracles.columns(inputs)
    gradient = jax.grad(lambda logp: jnp.sum(soft.sapo(dataclasses.replace(inputs, logp=logp))[0]))(inputs.logp)
    ratio = np.exp(c.logp - c.old)
    gate = 1 / (1 + np.exp(-np.where(c.advantage > 0, 1.0, 1.05) * (ratio - 1)))
    np.testing.assert_allclose(gradient, np.where(c.mask, -4 * gate * (1 - gate) * ratio * c.advantage, 0), rtol=1e-5, atol=1e-6)


def test_cispo_bounds_are_of_the_ratio_and_a_clipped_token_keeps_its_gradient():
    inputs = oracles.draw()
    far = dataclasses.replace(inputs, logp=inputs.tokens.old_logp + np.float32(np.log(8.0)))
    loss, _, aux = soft.cispo(far)
    c = oracles.columns(far)
    np.testing.assert_allclose(loss, np.where(c.mask, -5 * c.advantage * c.logp, 0), rtol=1e-5, atol=1e-6)
    assert float(aux["clip_fraction_high"][0]) == len(c.used)
    gradient = jax.grad(lambda logp: jnp.sum(soft.cispo(dataclasses.replace(far, logp=logp))[0]))(far.logp)
    np.testing.assert_allclose(gradient, np.where(c.mask, -5 * c.advantage, 0), rtol=1e-6)


def test_decoupled_ppo_with_a_sampler_that_is_the_policy_is_ppo():
    inputs = oracles.draw()
    inputs = dataclasses.replace(inputs, tokens=dataclasses.replace(inputs.tokens, behaviour_logp=inputs.tokens.old_logp))
    loss, keep, aux = soft.decoupled_ppo(inputs)
    np.testing.assert_array_equal(loss, policy.ppo_clip(inputs, clip_high=0.2, dual_clip=None)[0])
    assert keep.tolist() == inputs.tokens.mask.tolist() and float(aux["dropped_fraction"][0]) == 0.0
    assert soft.decoupled_ppo(oracles.draw(), max_weight=None)[1].tolist() == inputs.tokens.mask.tolist()


@pytest.mark.parametrize(
    "loss, setting, sentence",
    [
        (soft.cispo, {"lower": -0.1}, "CISPO's bounds are -0.1 and 5.0"),
        (soft.cispo, {"lower": 0.0, "upper": 0.0}, "a positive upper"),
        (soft.cispo, {"lower": 2.0, "upper": 1.0}, "0 ≤ lower ≤ upper"),
        (soft.sapo, {"tau_neg": 0.0}, "temperatures are 1.0 and 0.0"),
        (soft.dro, {"beta": 0.0}, "beta is 0.0: it must be positive"),
        (soft.decoupled_ppo, {"max_weight": 0.0}, "max_weight is 0.0"),
        (soft.decoupled_ppo, {"clip_low": 1.0}, "clip_low is 1.0"),
    ],
)
def test_settings_are_checked(loss, setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        loss(oracles.draw(), **setting)
