"""Losses of sequence scope against float64 loops over transitions, and how they relate."""

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

from lightningrl.losses import sequence
from lightningrl.losses.aggregation import sequence_mean, sequence_sum
from tests.batches import batches, make_rollout
from tests.losses import oracles

LOW, HIGH = 0.1, 0.2


def clipped(ratio, advantage):
    return max(-advantage * ratio, -advantage * min(max(ratio, 1 - LOW), 1 + HIGH))


def gspo_loop(c, logp, fixed, *, scale=lambda edges: 1):
    loss = np.zeros_like(logp)
    for edges in c.sequences:
        s = np.exp(np.mean([logp[e] - c.old[e] for e in edges]))
        loss[edges] = scale(edges) * clipped(s, np.mean(c.advantage[edges]))
    return loss


def gspo_token_loop(c, logp, fixed):
    loss = np.zeros_like(logp)
    for edges in c.sequences:
        s = np.exp(np.mean([fixed[e] - c.old[e] for e in edges]))
        for e in edges:
            loss[e] = clipped(s * np.exp(logp[e] - fixed[e]), c.advantage[e])
    return loss


def gmpo_loop(c, logp, fixed):
    """As the paper writes it: sgn(A) min(sgn(A) d, sgn(A) clip(d))."""
    loss = np.zeros_like(logp)
    for edges in c.sequences:
        logs = []
        for e in edges:
            sign, d = np.sign(c.advantage[e]), logp[e] - c.old[e]
            logs.append(sign * min(sign * d, sign * min(max(d, -LOW), HIGH)))
        loss[edges] = -np.mean(c.advantage[edges]) * np.exp(np.mean(logs))
    return loss


def vespo_loop(c, logp, fixed, *, to="old"):
    loss = np.zeros_like(logp)
    for edges in c.sequences:
        w = np.prod([np.exp(fixed[e] - getattr(c, to)[e]) for e in edges])
        for e in edges:
            k, rate = (2.0, 3.0) if c.advantage[e] >= 0 else (3.0, 2.0)
            loss[e] = -np.exp(rate) * w**k * np.exp(-rate * w) * c.advantage[e] * logp[e]
    return loss


RANGE: dict[str, Any] = {"clip_low": LOW, "clip_high": HIGH}
LOSSES: dict[str, tuple[Any, ...]] = {
    "gspo": (functools.partial(sequence.gspo, **RANGE), gspo_loop),
    "gspo_token": (functools.partial(sequence.gspo_token, **RANGE), gspo_token_loop),
    "luspo": (functools.partial(sequence.luspo, **RANGE), functools.partial(gspo_loop, scale=len)),
    "gmpo": (functools.partial(sequence.gmpo, **RANGE), gmpo_loop),
    "vespo": (sequence.vespo, vespo_loop),
    "vespo to the sampler": (functools.partial(sequence.vespo, anchor="behaviour"), functools.partial(vespo_loop, to="behaviour")),
}
JITTED = {name: jax.jit(loss) for name, (loss, _) in LOSSES.items()}
EACH = pytest.mark.parametrize("name", list(LOSSES))


@pytest.mark.slow
@EACH
@settings(max_examples=10, deadline=None)
@given(rollouts=batches(), seed=st.integers(0, 99))
def test_is_that_of_a_loop(name, rollouts, seed):
    inputs = oracles.draw(rollouts, seed)
    oracles.check_values(JITTED[name], LOSSES[name][1], inputs)
    _, keep, _ = oracles.check_values(JITTED[name], LOSSES[name][1], oracles.per_token(inputs, seed))
    assert keep.tolist() == inputs.tokens.mask.tolist()


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_that_of_the_loop(name, seed):
    inputs = oracles.draw(seed=seed, spread=0.15)
    oracles.check_gradient(JITTED[name], LOSSES[name][1], inputs)
    oracles.check_gradient(JITTED[name], LOSSES[name][1], oracles.per_token(inputs, seed))


@pytest.mark.slow
@EACH
def test_invariances(name):
    oracles.check_invariances(JITTED[name])


@settings(max_examples=15, deadline=None)
@given(ids=st.lists(st.integers(0, 10_000), min_size=6, max_size=6))
def test_sequence_ids_need_no_table_size(ids):
    """Ids may be far larger than the number of edges: they are numbered anew, in order."""
    tokens = dataclasses.replace(oracles.draw(size=None).tokens, transition=np.array(ids, np.int32), mask=np.ones(6, bool))
    assert jax.jit(sequence.sequence_ids)(tokens).tolist() == [sorted(set(ids)).index(n) for n in ids]


@pytest.mark.slow
def test_a_micro_batch_of_late_transitions_has_the_losses_it_has_in_the_batch():
    inputs = oracles.draw()
    late = np.flatnonzero(inputs.tokens.mask & (inputs.tokens.transition >= 4))
    assert inputs.tokens.transition[late].max() > 4
    part = jax.tree.map(lambda x: np.asarray(x)[late], inputs)
    for name, (loss, _) in LOSSES.items():
        np.testing.assert_allclose(loss(part)[0], np.asarray(JITTED[name](inputs)[0])[late], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_gspo_token_with_one_advantage_a_sequence_is_gspo():
    inputs = oracles.draw(spread=0.15)

    def total(logp, loss):
        changed = dataclasses.replace(inputs, logp=logp)
        return sequence_mean(loss(changed)[0], inputs.tokens.mask, inputs.counts)[0]

    one, other = (jax.value_and_grad(total)(inputs.logp, LOSSES[name][0]) for name in ("gspo", "gspo_token"))
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    np.testing.assert_allclose(one[1], other[1], rtol=1e-5, atol=1e-6)


def test_luspo_is_gspo_under_a_sum():
    inputs = oracles.draw()
    one = sequence_mean(JITTED["luspo"](inputs)[0], inputs.tokens.mask, inputs.counts)
    other = sequence_sum(JITTED["gspo"](inputs)[0], inputs.tokens.mask, inputs.counts)
    np.testing.assert_allclose(one, other, rtol=1e-5)


@EACH
def test_on_policy_the_gradient_is_the_policy_gradient(name):
    """ρ = 1: the sequence mean has gradient -A / n in each of the n log-probs, of LUSPO -A."""
    inputs = oracles.draw()
    tokens = dataclasses.replace(inputs.tokens, old_logp=inputs.logp, behaviour_logp=inputs.logp)
    loss = LOSSES[name][0]

    def total(logp):
        changed = dataclasses.replace(inputs, logp=logp, tokens=tokens)
        return sequence_mean(loss(changed)[0], tokens.mask, inputs.counts)[0]

    n = np.where(tokens.mask, inputs.counts.sequence_tokens, 1)
    expected = np.where(tokens.mask, -inputs.advantage / (1 if name == "luspo" else n), 0.0)
    np.testing.assert_allclose(jax.grad(total)(inputs.logp), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_by_hand_and_what_it_reports():
    """Two calls: log-ratios (0.3, 0.1) with A = 1, s = e^0.2 > 1.2; and (-0.2,) with A = -1, s = e^-0.2 < 0.9."""
    inputs = oracles.draw([make_rollout("a", 1.0, [0.0, 0.0], lengths=[2, 1])], size=None)
    tokens = dataclasses.replace(inputs.tokens, old_logp=np.full(3, -1.0, np.float32))
    inputs = dataclasses.replace(
        inputs, tokens=tokens, logp=np.array([-0.7, -0.9, -1.2], np.float32), advantage=np.array([1, 1, -1], np.float32)
    )
    loss, _, aux = JITTED["gspo"](inputs)
    np.testing.assert_allclose(loss, [-1.2, -1.2, 0.9], rtol=1e-6)
    assert float(aux["clip_fraction_high"][0]) == 2.0 and float(aux["clip_fraction_low"][0]) == 1.0
    np.testing.assert_allclose(aux["sequence_ratio_mean"][0], 2 * np.exp(0.2) + np.exp(-0.2), rtol=1e-5)
    loss, _, aux = JITTED["gmpo"](inputs)
    np.testing.assert_allclose(loss, [-np.exp(0.15)] * 2 + [np.exp(-0.1)], rtol=1e-6)
    assert float(aux["clip_fraction_high"][0]) == 1.0 and float(aux["clip_fraction_low"][0]) == 1.0
    phi = float(JITTED["vespo"](dataclasses.replace(inputs, logp=np.full(3, -1.0, np.float32)))[2]["phi_mean"][0])
    np.testing.assert_allclose(phi, 3.0, rtol=1e-6)


def test_far_off_policy_nothing_overflows():
    inputs = dataclasses.replace(oracles.draw(), logp=np.full(oracles.EDGES, -1e-3, np.float32))
    inputs = dataclasses.replace(inputs, tokens=dataclasses.replace(inputs.tokens, old_logp=np.full(oracles.EDGES, -90.0, np.float32)))
    for loss in JITTED.values():
        assert np.isfinite(loss(inputs)[0]).all()
        gradient = jax.grad(lambda logp, loss=loss: jnp.sum(loss(dataclasses.replace(inputs, logp=logp))[0]))(inputs.logp)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "loss, setting, sentence",
    [
        (sequence.gspo, {"clip_low": 1.0}, "clip_low is 1.0"),
        (sequence.gspo_token, {"clip_high": -0.1}, "clip_high is -0.1"),
        (sequence.luspo, {"clip_low": -1.0}, "clip_low is -1.0"),
        (sequence.gmpo, {"clip_high": -0.5}, "must not be negative"),
        (sequence.vespo, {"lambda_neg": 0.0}, "λ is 3.0, 0.0 and must be positive"),
        (sequence.vespo, {"k_pos": -1.0}, "must not be negative"),
        (sequence.vespo, {"anchor": "new"}, "must be 'old' or 'behaviour'"),
    ],
)
def test_settings_are_checked(loss, setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        loss(oracles.draw(), **setting)
