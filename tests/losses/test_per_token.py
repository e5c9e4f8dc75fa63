"""Policy, value, likelihood and KL terms against scalar float64 loops and known gradients."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl import losses
from tests.batches import make_inputs, make_rollout, make_table, make_tokens, poison

LENGTH = 8
TABLE = make_table(make_rollout("a", 1.0, [0.0, 0.0, 0.0], lengths=[3, 2, 3]))
INPUTS = make_inputs(TABLE, make_tokens(TABLE))


def inputs_of(*, mask=None, k=None, old_logp=None, ref_logp=None, **fields):
    tokens = {"mask": mask, "k": k, "old_logp": old_logp, "ref_logp": ref_logp}
    arrays = {name: np.asarray(x) for name, x in tokens.items() if x is not None}
    changed = dataclasses.replace(INPUTS.tokens, **{n: x.astype(np.float32) if "logp" in n else x for n, x in arrays.items()})
    columns: dict[str, Any] = {n: np.asarray(x, np.float32) for n, x in fields.items()}
    return dataclasses.replace(INPUTS, tokens=changed, **columns)


def column(low, high):
    return st.lists(st.floats(low, high, width=32), min_size=LENGTH, max_size=LENGTH)


MASKS = st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH)
SETTINGS = [(0.25, 0.5, 3.0), (0.25, 0.5, None), (0.0, 0.0, 1.5)]
PPO = [jax.jit(functools.partial(losses.ppo_clip, clip_low=a, clip_high=b, dual_clip=c)) for a, b, c in SETTINGS]


def ppo_loop(logp, old, advantage, clip_low, clip_high, dual_clip):
    ratio = math.exp(min(max(float(logp) - float(old), -20.0), 20.0))
    free, clipped = -advantage * ratio, -advantage * min(max(ratio, 1 - clip_low), 1 + clip_high)
    loss = max(free, clipped)
    if dual_clip is not None and advantage < 0:
        loss = min(loss, -dual_clip * advantage)
    return loss


@pytest.mark.slow
@pytest.mark.parametrize("which", range(len(SETTINGS)))
@settings(max_examples=30, deadline=None)
@given(logp=column(-6, 0), old=column(-6, 0), advantage=column(-3, 3), mask=MASKS)
def test_ppo_clip_is_that_of_a_loop(which, logp, old, advantage, mask):
    loss, keep, aux = PPO[which](inputs_of(logp=logp, old_logp=old, advantage=advantage, mask=np.array(mask)))
    expected = [ppo_loop(*row, *SETTINGS[which]) if m else 0.0 for *row, m in zip(logp, old, advantage, mask, strict=True)]
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    assert loss.dtype == jnp.float32
    assert keep.tolist() == mask
    ratios = [math.exp(a - b) for a, b, m in zip(logp, old, mask, strict=True) if m]
    np.testing.assert_allclose(aux["ratio_mean"][0], sum(ratios), rtol=1e-5, atol=1e-6)
    assert all(pair[1] == sum(mask) for pair in aux.values())


class PpoByHandTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_values_gradients_and_rates(self):
        """ρ = 2 or ½ or 16 with ε = ¼, ½ and c = 3: what each branch gives, and where its gradient stops."""
        logs = np.log(np.array([2, 2, 0.5, 0.5, 16, 16, 1, 1], np.float32))
        advantage = [1, -1, 1, -1, 1, -1, 1, -1]
        inputs = inputs_of(logp=logs, old_logp=np.zeros(8), advantage=advantage)
        loss_of = functools.partial(losses.ppo_clip, clip_low=0.25, clip_high=0.5, dual_clip=3.0)
        loss, _, aux = self.variant(loss_of)(inputs)
        np.testing.assert_allclose(loss, [-1.5, 2, -0.5, 0.75, -1.5, 3, -1, 1], rtol=1e-6)
        sums = {name: float(total) for name, (total, _) in aux.items()}
        assert (sums["clip_fraction_high"], sums["clip_fraction_low"], sums["dual_clip_fraction"]) == (2.0, 1.0, 1.0)
        np.testing.assert_allclose(sums["ratio_mean"], 39.0, rtol=1e-6)
        np.testing.assert_allclose(sums["ratio_squared_mean"], 522.5, rtol=1e-5)

        def total(logp):
            return jnp.sum(loss_of(dataclasses.replace(inputs, logp=logp))[0])

        np.testing.assert_allclose(self.variant(jax.grad(total))(inputs.logp), [0, 2, -0.5, 0, 0, 0, -1, 1], rtol=1e-6)


def test_on_policy_the_gradient_is_the_policy_gradient():
    """ρ = 1: the gradient of the loss in log π is -A, at every clip range that is not empty."""
    inputs = inputs_of(logp=INPUTS.tokens.old_logp)
    gradient = jax.grad(lambda logp: jnp.sum(losses.ppo_clip(dataclasses.replace(inputs, logp=logp))[0]))(inputs.logp)
    assert gradient.tolist() == (-inputs.advantage).tolist()


@pytest.mark.parametrize(
    "setting, sentence",
    [
        ({"clip_low": 1.0}, r"clip_low is 1.0: it must lie in \[0, 1\)"),
        ({"clip_high": -0.1}, "clip_high is -0.1: it must not be negative"),
        ({"dual_clip": 1.0}, "dual_clip is 1.0: it must be greater than 1, or None"),
    ],
)
def test_ppo_settings_are_checked(setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        losses.ppo_clip(INPUTS, **setting)


VALUE = {clip: jax.jit(functools.partial(losses.value_loss, clip=clip)) for clip in (0.5, None)}


@pytest.mark.parametrize("clip", [0.5, None])
@settings(max_examples=25, deadline=None)
@given(value=column(-2, 2), old=column(-2, 2), target=column(-2, 2), mask=MASKS)
def test_value_loss_is_that_of_a_loop(clip, value, old, target, mask):
    inputs = inputs_of(value=value, old_value=old, value_target=target, mask=np.array(mask))
    loss, keep, aux = VALUE[clip](inputs)
    first = [m and k == 0 for m, k in zip(mask, inputs.tokens.k, strict=True)]
    assert keep.tolist() == first
    expected = []
    for v, before, r, kept in zip(value, old, target, first, strict=True):
        near = v if clip is None else min(max(v, before - clip), before + clip)
        expected.append(0.5 * max((v - r) ** 2, (near - r) ** 2) if kept else 0.0)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    errors = [(v - r) ** 2 for v, r, kept in zip(value, target, first, strict=True) if kept]
    np.testing.assert_allclose(aux["value_error_squared_mean"][0], sum(errors), rtol=1e-5, atol=1e-6)
    assert all(pair[1] == sum(first) for pair in aux.values())


def test_value_loss_under_its_own_mask_is_the_mean_over_transitions():
    loss, keep, _ = losses.value_loss(INPUTS, clip=None)
    total, count = losses.token_mean(loss, keep, INPUTS.counts)
    np.testing.assert_allclose(total, sum(loss[e] for e in range(LENGTH) if INPUTS.tokens.k[e] == 0), rtol=1e-6)
    assert count == 3.0
    with pytest.raises(ValueError, match="value loss's clip is 0.0: it must be positive, or None"):
        losses.value_loss(INPUTS, clip=0.0)
    with pytest.raises(ValueError, match="no states 'turns': choose one of calls, tokens"):
        losses.value_loss(INPUTS, states="turns")


def test_value_loss_of_a_token_critic_is_the_squared_error_of_every_token():
    loss, keep, _ = losses.value_loss(INPUTS, clip=None, states="tokens")
    mask = np.asarray(INPUTS.tokens.mask)
    np.testing.assert_array_equal(keep, mask)
    error = np.asarray(INPUTS.value, np.float64) - np.asarray(INPUTS.value_target, np.float64)
    np.testing.assert_allclose(np.asarray(loss)[mask], 0.5 * error[mask] ** 2, rtol=1e-6)


def test_negative_log_likelihood():
    inputs = inputs_of(logp=[-1, -2, -3, -4, -5, -6, -7, -8], advantage=[2, -2, 0, 1, 1, 1, 1, 1], mask=[True] * 5 + [False] * 3)
    loss, keep, aux = losses.negative_log_likelihood(inputs)
    assert loss.tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert keep.tolist() == inputs.tokens.mask.tolist()
    assert (float(aux["nll_mean"][0]), float(aux["nll_mean"][1])) == (15.0, 5.0)
    assert losses.negative_log_likelihood(inputs, weighted=True)[0].tolist() == [2, -4, 0, 4, 5, 0, 0, 0]


KL = {f.__name__: jax.jit(f) for f in (losses.k1, losses.k2, losses.k3)}
KL_LOOPS = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) + d - 1}


@pytest.mark.parametrize("name", list(KL))
@settings(max_examples=25, deadline=None)
@given(logp=column(-6, 0), ref=column(-6, 0), mask=MASKS)
def test_kl_is_that_of_a_loop(name, logp, ref, mask):
    actual = KL[name](inputs_of(logp=logp, ref_logp=ref, mask=np.array(mask)))
    expected = [KL_LOOPS[name](a - b) if m else 0.0 for a, b, m in zip(logp, ref, mask, strict=True)]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    if name != "k1":
        assert (np.asarray(actual) >= 0).all()


def test_kl_estimators_average_to_the_kl_and_k2_has_its_gradient():
    """Over all actions of a categorical π, weighted by π: k1 and k3 give KL(π ‖ π_ref); E[∇k1] = 0, E[∇k2] = ∇KL."""
    logits, reference = np.random.default_rng(0).normal(size=(2, LENGTH)).astype(np.float32)
    ref = np.asarray(jax.nn.log_softmax(reference))
    policy = np.asarray(jax.nn.softmax(logits))

    def exact(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logp) * (logp - ref))

    def expected(logits, estimator):
        return jnp.sum(policy * estimator(inputs_of(ref_logp=ref, logp=0).replace(logp=jax.nn.log_softmax(logits))))

    for estimator in (losses.k1, losses.k3):
        np.testing.assert_allclose(expected(logits, estimator), exact(logits), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(expected)(logits, losses.k2), jax.grad(exact)(logits), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.grad(expected)(logits, losses.k1), np.zeros(LENGTH), atol=1e-6)


PER_TOKEN = {
    "ppo_clip": lambda i: losses.ppo_clip(i)[0],
    "ppo_clip aux": lambda i: sum(total for total, _ in losses.ppo_clip(i)[2].values()),
    "value_loss": lambda i: losses.value_loss(i)[0],
    "value_loss aux": lambda i: sum(total for total, _ in losses.value_loss(i)[2].values()),
    "negative_log_likelihood": lambda i: losses.negative_log_likelihood(i)[0],
    "weighted likelihood": lambda i: losses.negative_log_likelihood(i, weighted=True)[0],
    "k1": losses.k1,
    "k2": losses.k2,
    "k3": losses.k3,
}


@pytest.mark.parametrize("name", list(PER_TOKEN))
def test_nan_outside_the_mask_reaches_nothing(name):
    mask = np.arange(LENGTH) < 5
    clean = inputs_of(mask=mask)
    spoiled = poison(clean, mask)
    assert np.isnan(spoiled.logp[~mask]).all() and np.isnan(spoiled.tokens.old_logp[~mask]).all()

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradients_of(logp, value, inputs):
        result = PER_TOKEN[name](dataclasses.replace(inputs, logp=logp, value=value))
        return jnp.sum(result), result

    _, expected = gradients_of(clean.logp, clean.value, clean)
    gradients, result = gradients_of(spoiled.logp, spoiled.value, spoiled)
    np.testing.assert_array_equal(result, expected)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert (np.asarray(gradient)[~mask] == 0).all()
