"""Clip-Cov and KL-Cov: selections and losses against float64 loops, and their indifference to packing."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightningrl.losses import covariance, policy
from tests.batches import batches, make_rollout
from tests.losses import oracles

KEY = jax.random.key(7)
LIMITS: dict[str, Any] = {"fraction": 0.3, "cov_low": -0.2, "cov_high": 0.8}
LONG = tuple(make_rollout(f"g{i % 3}", float(i), [0.0, 0.0], lengths=[5, 5]) for i in range(9))


def covariances(c):
    if not c.used:
        return {}
    a, b = np.mean(c.advantage[c.used]), np.mean(c.logp[c.used])
    return {e: (c.advantage[e] - a) * (c.logp[e] - b) for e in c.used}


def eligible(c):
    free, ratio = -c.advantage * np.exp(c.logp - c.old), np.exp(c.logp - c.old)
    clipped = -c.advantage * np.clip(ratio, 0.8, 1.2) > free
    return {e for e, cov in covariances(c).items() if LIMITS["cov_low"] < cov < LIMITS["cov_high"] and not clipped[e]}


def number(c, fraction):
    return max(1, int(fraction * len(c.used)))


def largest(c, fraction):
    covs = covariances(c)
    return set(sorted(c.used, key=lambda e: -covs[e])[: number(c, fraction)])


def ppo_loop(c, logp, fixed):
    ratio = np.exp(logp - c.old)
    return np.maximum(-c.advantage * ratio, -c.advantage * np.clip(ratio, 0.8, 1.2))


def kl_loop(c, logp, fixed):
    logs = logp - c.old
    penalised = largest(c, 0.25)
    return np.array(
        [-a * np.exp(d) + (0.7 * abs(d) if e in penalised else 0) for e, (a, d) in enumerate(zip(c.advantage, logs, strict=True))]
    )


CLIP = jax.jit(functools.partial(covariance.clip_cov, key=KEY, **LIMITS))
KL = jax.jit(functools.partial(covariance.kl_cov, fraction=0.25, kl_coef=0.7))


@settings(max_examples=15, deadline=None)
@given(rollouts=batches(), seed=st.integers(0, 99))
def test_clip_cov_is_that_of_a_loop(rollouts, seed):
    """The draw takes as many as the loop would, of those that the loop would draw from."""
    inputs = oracles.per_token(oracles.draw(rollouts, seed), seed)
    _, keep, aux = oracles.check_values(CLIP, ppo_loop, inputs)
    c = oracles.columns(inputs)
    drawn = {e for e in c.used if not keep[e]}
    assert drawn <= eligible(c)
    assert len(drawn) == (min(number(c, LIMITS["fraction"]), len(eligible(c))) if c.used else 0)
    assert float(aux["cov_clip_fraction"][0]) == len(drawn)


@settings(max_examples=15, deadline=None)
@given(rollouts=batches(), seed=st.integers(0, 99))
def test_kl_cov_is_that_of_a_loop(rollouts, seed):
    inputs = oracles.per_token(oracles.draw(rollouts, seed), seed)
    assume(inputs.tokens.mask.sum() != 2)  # the covariances of two tokens are equal, and rounding decides in the loop
    _, keep, aux = oracles.check_values(KL, kl_loop, inputs)
    c = oracles.columns(inputs)
    assert keep.tolist() == c.mask.tolist()
    assert float(aux["cov_kl_fraction"][0]) == (number(c, 0.25) if c.used else 0)


@settings(max_examples=10, deadline=None)
@given(rollouts=batches(), seed=st.integers(0, 99))
def test_covariance_is_that_of_a_loop(rollouts, seed):
    inputs = oracles.draw(rollouts, seed)
    covs = covariances(oracles.columns(inputs))
    actual = covariance.covariance(inputs)
    np.testing.assert_allclose(actual, [covs.get(e, 0.0) for e in range(len(actual))], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss, loop", [(CLIP, ppo_loop), (KL, kl_loop)])
def test_gradient_is_that_of_the_loop(loss, loop, seed):
    """The selection has no gradient, so the loop may select anew at each step: none of its ranks changes within one."""
    oracles.check_gradient(loss, loop, oracles.per_token(oracles.draw(seed=seed), seed))


@pytest.mark.slow
@pytest.mark.parametrize("loss", [CLIP, KL])
def test_invariances(loss):
    """Among them: the draw goes with the token, wherever it is packed."""
    oracles.check_invariances(loss)


@pytest.mark.slow
def test_the_draw_is_fair_and_follows_the_key():
    inputs = oracles.per_token(oracles.draw(LONG, 1))
    pool = eligible(oracles.columns(inputs))
    select = jax.jit(jax.vmap(lambda key: covariance.clip_cov_selection(inputs, key=key, fraction=0.1, cov_low=-0.2, cov_high=0.8)))
    drawn = np.asarray(select(jax.random.split(jax.random.key(0), 2000)))
    taken = int(0.1 * inputs.tokens.mask.sum())
    assert 10 < len(pool) and (drawn.sum(1) == taken).all()
    shares = drawn.mean(0)[sorted(pool)]
    expected = taken / len(pool)
    assert np.abs(shares - expected).max() < 5 * np.sqrt(expected / 2000)
    np.testing.assert_array_equal(select(KEY[None]), select(KEY[None]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "kl"])
def test_micro_batches_share_one_selection(name):
    """The selection of [2, E] edges, handed on, gives each half what it has in the whole."""
    inputs = oracles.per_token(oracles.draw(LONG, 2))
    halves = jax.tree.map(lambda x: np.asarray(x).reshape(2, -1), inputs)
    if name == "clip":
        chosen = covariance.clip_cov_selection(halves, key=KEY, **LIMITS)
        parts = [covariance.clip_cov(jax.tree.map(lambda x, i=i: x[i], halves), selected=chosen[i], **LIMITS) for i in range(2)]
        whole = CLIP(inputs)
    else:
        chosen = covariance.kl_cov_selection(halves, fraction=0.25)
        parts = [covariance.kl_cov(jax.tree.map(lambda x, i=i: x[i], halves), selected=chosen[i], kl_coef=0.7) for i in range(2)]
        whole = KL(inputs)
    assert chosen.shape == halves.logp.shape and chosen.any(1).all()
    np.testing.assert_allclose(np.concatenate([p[0] for p in parts]), whole[0], rtol=1e-6)
    np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), whole[1])


@pytest.mark.slow
@pytest.mark.parametrize("constant", [1.0, 0.1, -0.7])
def test_without_a_signal_nothing_is_drawn_and_ties_go_to_the_first_tokens(constant):
    """A constant advantage has covariance 0: outside Clip-Cov's bounds; KL-Cov takes the earliest tokens, however they stand.

    Also where rounding sets the mean of equal numbers apart from them, as it does those of 0.1.
    """
    inputs = dataclasses.replace(oracles.draw(), advantage=np.full(oracles.EDGES, constant, np.float32))
    assert not np.asarray(covariance.covariance(inputs)).any()
    assert not covariance.clip_cov_selection(inputs, key=KEY, fraction=1.0).any()
    order = np.random.default_rng(0).permutation(oracles.EDGES)
    moved = jax.tree.map(lambda x: np.asarray(x)[order], inputs)
    chosen = np.asarray(covariance.kl_cov_selection(moved, fraction=0.3))
    assert sorted(zip(moved.tokens.transition[chosen], moved.tokens.k[chosen], strict=True)) == [(0, 0), (0, 1), (0, 2), (1, 0)]


def test_clip_cov_that_draws_nothing_is_ppo():
    inputs = oracles.draw()
    loss, keep, _ = covariance.clip_cov(inputs, selected=np.zeros(oracles.EDGES, bool))
    np.testing.assert_array_equal(loss, policy.ppo_clip(inputs, clip_high=0.2, dual_clip=None)[0])
    assert keep.tolist() == inputs.tokens.mask.tolist()


@pytest.mark.parametrize(
    "loss, setting, sentence",
    [
        (covariance.clip_cov, {}, "give it a key, or the tokens selected"),
        (covariance.clip_cov, {"key": KEY, "fraction": 0.0}, r"The fraction is 0.0: it must lie in \(0, 1\]"),
        (covariance.clip_cov, {"key": KEY, "cov_low": 5.0}, "the first must be smaller"),
        (covariance.kl_cov, {"fraction": 1.5}, "The fraction is 1.5"),
        (covariance.kl_cov, {"kl_coef": -1.0}, "kl_coef is -1.0"),
    ],
)
def test_settings_are_checked(loss, setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        loss(oracles.draw(), **setting)
