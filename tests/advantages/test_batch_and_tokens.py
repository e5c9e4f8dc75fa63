"""Whitening over the batch, and the spread over tokens."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl import advantages, credit
from lightningrl.advantages import broadcast
from lightningrl.segments import EPSILON
from lightningrl.table import Credit, Evidence
from tests.batches import EDGES, SIZE, batches, make_rollout, make_table, make_tokens, poison_table

intermediate = jax.jit(credit.intermediate)
whiten = jax.jit(advantages.whiten, static_argnames=("count", "shift_mean", "ddof", "eps"))
WHITEN = jax.jit(
    lambda t, count, shift: whiten(t, intermediate(t, Evidence()), Evidence(), count=count, shift_mean=shift),
    static_argnums=(1, 2),
)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(rollouts=batches(integers=True), count=st.sampled_from(["rollouts", "transitions"]), shift=st.booleans())
def test_whiten_is_that_of_a_loop(rollouts, count, shift):
    counted = [
        (i, t.reward + r.reward, 1.0 / len(r.transitions) if count == "rollouts" else float(t.trainable))
        for i, r in enumerate(rollouts)
        for t in r.transitions
    ]
    used = [(i, x, w) for i, x, w in counted if w > 0]
    total = sum(w for _, _, w in used)
    mean = sum(x * w for _, x, w in used) / total if shift and used else 0.0
    divisor = total - 1 if shift else total
    nothing = not used or (shift and (len({i for i, _, _ in used}) == 1 or len({x for _, x, _ in used}) == 1))
    spread = 0.0 if nothing else np.sqrt(sum(w * (x - mean) ** 2 for _, x, w in used) / divisor)
    expected = [0.0 if nothing or w == 0 else (x - mean) / (spread + EPSILON) for _, x, w in counted]
    actual = WHITEN(make_table(*rollouts, size=SIZE), count, shift)
    np.testing.assert_allclose(actual[: len(expected)], expected, rtol=2e-5, atol=2e-6)
    assert (np.asarray(actual)[len(expected) :] == 0).all()


def test_an_advantage_keeps_its_sign():
    table = make_table(*(make_rollout("a", x) for x in (3.0, 4.0)))
    earned = Credit(value=np.array([3.0, 4.0], np.float32), kind="advantage")
    scaled = whiten(table, earned, Evidence(), shift_mean=False, eps=0.0)
    np.testing.assert_allclose(scaled, np.array([3.0, 4.0]) / np.sqrt(12.5), rtol=1e-6)
    with pytest.raises(ValueError, match="whiten takes a baseline off, but this credit is already an advantage"):
        whiten(table, earned, Evidence())


def test_constant_batches_and_batches_of_one_are_zero():
    constant = make_table(*(make_rollout("a", 0.1) for _ in range(7)), size=SIZE)
    single = make_table(make_rollout("a", 0.0, [1.0, 2.0]), size=SIZE)
    zero = make_table(make_rollout("a", 0.0), make_rollout("a", 0.0), size=SIZE)
    for table, shift in ((constant, True), (single, True), (zero, False)):
        for eps in (0.0, 1e-9):
            out = whiten(table, intermediate(table, Evidence()), Evidence(), shift_mean=shift, eps=eps)
            assert out.tolist() == [0.0] * len(out)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [True, False])
def test_whiten_lets_no_nan_through(shift):
    table = make_table(make_rollout("a", 1.0, [0.5, 0.0]), make_rollout("b", 0.0), size=SIZE)
    values = np.where(table.valid, intermediate(table, Evidence()).value, np.nan).astype(np.float32)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(values, table):
        result = whiten(table, Credit(value=values, kind="return"), Evidence(), shift_mean=shift)
        return jnp.sum(result**2), result

    (_, result), gradient = jax.jit(total)(values, poison_table(table))
    clean = WHITEN(table, "rollouts", shift)
    np.testing.assert_allclose(result, clean, rtol=1e-6)
    assert np.isfinite(gradient).all()


BROADCAST = jax.jit(functools.partial(broadcast, evidence=Evidence()))


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(rollouts=batches())
def test_every_token_gets_its_transitions_advantage(rollouts):
    table = make_table(*rollouts, size=SIZE)
    tokens = make_tokens(table, EDGES)
    advantage = np.where(table.valid, np.arange(SIZE) + 1, np.nan).astype(np.float32)
    expected = [float(advantage[n]) if m else 0.0 for n, m in zip(tokens.transition, tokens.mask, strict=True)]
    assert BROADCAST(table, tokens, advantage).tolist() == expected


def test_broadcast_keeps_the_shape_of_micro_batches():
    table = make_table(make_rollout("a", 0.0, [0.0, 0.0], lengths=[2, 4]))
    tokens = jax.tree.map(lambda x: x.reshape(2, 3), make_tokens(table))
    assert broadcast(table, tokens, np.array([1, 2], np.float32), Evidence()).tolist() == [[1, 1, 2], [2, 2, 2]]
