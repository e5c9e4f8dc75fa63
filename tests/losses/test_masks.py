"""DPPO, OPSM and M2PO: what is kept against float64 loops, and the loss of what is kept."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl.losses import masks, policy, soft
from tests.batches import batches, make_rollout
from tests.losses import oracles

TV_LOW, TV_HIGH, KL_LOW, KL_HIGH, CAP, DELTA, TAU = 0.05, 0.1, 0.02, 0.05, 1.4, 0.1, 0.05


def weighted_loop(c, logp, fixed):
    loss = np.zeros_like(logp)
    for e in c.used:
        loss[e] = -min(np.exp(fixed[e] - c.old[e]), CAP) * c.advantage[e] * logp[e]
    return loss


def ratio_loop(c, logp, fixed):
    return -c.advantage * np.exp(logp - c.behaviour)


def ppo_loop(c, logp, fixed):
    ratio = np.exp(logp - c.old)
    loss = np.maximum(-c.advantage * ratio, -c.advantage * np.clip(ratio, 0.8, 1.28))
    return np.where(c.advantage < 0, np.minimum(loss, -3 * c.advantage), loss)


def tv_keep(c):
    moved = np.exp(c.logp) - np.exp(c.old)
    return [bool(moved[e] <= TV_HIGH if c.advantage[e] > 0 else moved[e] >= -TV_LOW) for e in c.used]


def kl_keep(c):
    kept = []
    for e in c.used:
        p0, p = np.exp(c.old[e]), np.exp(c.logp[e])
        d = p0 * np.log(p0 / p) + (1 - p0) * np.log((1 - p0) / (1 - p))
        kept.append(bool(d <= KL_HIGH or p <= p0 if c.advantage[e] > 0 else d <= KL_LOW or p >= p0))
    return kept


def opsm_keep(c):
    dropped = set()
    for edges in c.sequences:
        if np.mean(c.advantage[edges]) < 0 and np.mean(c.behaviour[edges] - c.logp[edges]) > DELTA:
            dropped |= set(edges)
    return [e not in dropped for e in c.used]


def m2_keep(c):
    """The largest are taken away one by one until the mean of the rest is small enough."""
    moment = {e: (c.logp[e] - c.behaviour[e]) ** 2 for e in c.used}
    rest = sorted(c.used, key=moment.__getitem__)
    while rest and np.mean([moment[e] for e in rest]) >= TAU:
        rest.pop()
    return [e in rest for e in c.used]


LOSSES: dict[str, tuple[Any, ...]] = {
    "dppo_tv": (functools.partial(masks.dppo_tv, limit_low=TV_LOW, limit_high=TV_HIGH, max_ratio=CAP), weighted_loop, tv_keep),
    "dppo_kl": (functools.partial(masks.dppo_kl, limit_low=KL_LOW, limit_high=KL_HIGH, max_ratio=CAP), weighted_loop, kl_keep),
    "opsm": (functools.partial(masks.opsm, threshold=DELTA), ppo_loop, opsm_keep),
    "m2po": (functools.partial(masks.m2po, threshold=TAU), ratio_loop, m2_keep),
}
JITTED = {name: jax.jit(loss) for name, (loss, _, _) in LOSSES.items()}
EACH = pytest.mark.parametrize("name", list(LOSSES))


@pytest.mark.slow
@EACH
@settings(max_examples=10, deadline=None)
@given(rollouts=batches(), seed=st.integers(0, 99))
def test_is_that_of_a_loop(name, rollouts, seed):
    inputs = oracles.per_token(oracles.draw(rollouts, seed), seed)
    _, keep, aux = oracles.check_values(JITTED[name], LOSSES[name][1], inputs)
    c = oracles.columns(inputs)
    expected = LOSSES[name][2](c)
    assert np.asarray(keep)[c.used].tolist() == expected
    dropped = aux["sequence_dropped_fraction" if name == "opsm" else "dropped_fraction"]
    assert float(dropped[0]) == len(c.used) - sum(expected)


@EACH
def test_some_are_kept_and_some_dropped(name):
    """The loops above compare something: on one batch both happen."""
    kept = np.concatenate([LOSSES[name][2](oracles.columns(oracles.draw(seed=seed))) for seed in range(4)])
    assert kept.any() and not kept.all()


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_that_of_the_loop(name, seed):
    oracles.check_gradient(JITTED[name], LOSSES[name][1], oracles.per_token(oracles.draw(seed=seed), seed))


@pytest.mark.slow
@EACH
def test_invariances(name):
    oracles.check_invariances(JITTED[name])


def two_tokens(logp, old, advantage):
    inputs = oracles.draw([make_rollout("a", 1.0, lengths=[2])], size=None)
    tokens = dataclasses.replace(inputs.tokens, old_logp=np.array(old, np.float32))
    return dataclasses.replace(inputs, tokens=tokens, logp=np.array(logp, np.float32), advantage=np.array(advantage, np.float32))


@pytest.mark.slow
def test_a_certain_token_has_a_divergence_without_nan():
    """p₀ = 1 leaves p₀ log(p₀/p); p = 1 ≠ p₀ is infinitely far; p = p₀ = 1 is no distance."""
    keep = masks.dppo_kl(two_tokens([0.0, 0.0], [-0.5, 0.0], [1, 1]))[1]
    assert keep.tolist() == [False, True]
    keep = masks.dppo_kl(two_tokens([-0.04, -0.06], [0.0, 0.0], [-1, -1]))[1]
    assert keep.tolist() == [True, False]


def test_only_the_side_that_the_advantage_pushes_to_is_bounded():
    near_one, near_zero = np.log(0.9), np.log(0.1)
    for loss in (masks.dppo_tv, masks.dppo_kl):
        assert loss(two_tokens([near_one, near_zero], [near_zero, near_one], [1, 1]))[1].tolist() == [False, True]
        assert loss(two_tokens([near_one, near_zero], [near_zero, near_one], [-1, -1]))[1].tolist() == [True, False]


def test_opsm_goes_around_any_loss_and_spares_what_did_well():
    inputs = oracles.draw()
    values, keep, aux = masks.opsm(inputs, threshold=DELTA, loss=soft.gpg)
    np.testing.assert_array_equal(values, soft.gpg(inputs)[0])
    assert keep.tolist() == masks.opsm(inputs, threshold=DELTA)[1].tolist() and "nll_mean" in aux
    positive = dataclasses.replace(inputs, advantage=np.abs(inputs.advantage))
    assert masks.opsm(positive, threshold=0.0)[1].tolist() == inputs.tokens.mask.tolist()
    old = masks.opsm(inputs, threshold=0.0, anchor="old", loss=policy.ppo_clip)[1]
    sampled = dataclasses.replace(inputs.tokens, behaviour_logp=inputs.tokens.old_logp)
    assert old.tolist() == masks.opsm(dataclasses.replace(inputs, tokens=sampled), threshold=0.0)[1].tolist()


@pytest.mark.slow
def test_m2po_selects_over_the_whole_batch():
    """Two micro-batches: selected together, each takes its part. Alone they would keep others."""
    inputs = oracles.draw(seed=3)
    used = np.flatnonzero(inputs.tokens.mask)
    halves = jax.tree.map(lambda x: np.asarray(x)[np.array([used[:8], used[-8:]])], inputs)
    keep = masks.second_moment_keep(halves, threshold=TAU)
    alone = [masks.second_moment_keep(jax.tree.map(lambda x, i=i: x[i], halves), threshold=TAU) for i in range(2)]
    assert keep.shape == (2, 8) and keep.tolist() != [x.tolist() for x in alone]
    for i in range(2):
        part = jax.tree.map(lambda x, i=i: x[i], halves)
        assert masks.m2po(part, threshold=TAU, selected=keep[i])[1].tolist() == keep[i].tolist()


def test_m2po_drops_equal_moments_together_and_may_drop_all():
    """Moments 0, τ, τ, 4: with the first two τs the mean would pass below τ, but both stand or fall. Alone, τ is not below τ."""
    inputs = oracles.draw([make_rollout("a", 1.0, lengths=[4])], size=None)
    behaviour = np.full(4, -2.0, np.float32)
    moved = dataclasses.replace(inputs, tokens=dataclasses.replace(inputs.tokens, behaviour_logp=behaviour))

    def keep(moments, threshold):
        logp = behaviour + np.sqrt(np.array(moments, np.float32))
        return masks.second_moment_keep(dataclasses.replace(moved, logp=logp), threshold=threshold).tolist()

    assert keep([0.0, 0.25, 0.25, 4.0], 0.25) == [True, True, True, False]
    assert keep([0.0, 0.25, 0.25, 4.0], 0.15) == [True, False, False, False]
    assert keep([1.0, 1.0, 1.0, 1.0], 0.25) == [False] * 4
    assert keep([0.0, 0.0, 0.0, 0.0], 0.25) == [True] * 4


@pytest.mark.parametrize(
    "loss, setting, sentence",
    [
        (masks.dppo_tv, {"limit_low": 1.5}, "must lie in"),
        (masks.dppo_tv, {"max_ratio": 0.0}, "max_ratio is 0.0"),
        (masks.dppo_kl, {"limit_high": -0.1}, "must not be negative"),
        (masks.opsm, {"threshold": -1.0}, "threshold is -1.0"),
        (masks.opsm, {"threshold": 0.1, "anchor": "new"}, "must be 'old' or 'behaviour'"),
        (masks.m2po, {"threshold": 0.0}, "threshold is 0.0"),
    ],
)
def test_settings_are_checked(loss, setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        loss(oracles.draw(), **setting)
