"""What the tests of policy losses share: batches, gradients by finite differences of a float64 loop, and the invariances of every loss.

A loop is `(Columns, logp, fixed) -> losses`: `fixed` are the log-probs wherever the loss has a stop-gradient. Both are the same but
in finite differences.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightningrl.losses import count_units
from tests.batches import EDGES, SIZE, make_inputs, make_rollout, make_table, make_tokens, poison

COUNT = jax.jit(count_units)
ROLLOUTS = (
    make_rollout("a", 1.0, [0.0, 0.0, 0.0], lengths=[3, 1, 4]),
    make_rollout("a", 0.0, [0.0, 0.0], lengths=[2, 3], trainable=[False, True]),
    make_rollout("b", 0.5, lengths=[5]),
)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Inputs in float64, and the masked edges of every transition."""

    logp: np.ndarray
    old: np.ndarray
    behaviour: np.ndarray
    reference: np.ndarray
    advantage: np.ndarray
    mask: np.ndarray
    transition: np.ndarray
    k: np.ndarray
    sequences: list[list[int]]
    used: list[int]


def columns(inputs) -> Columns:
    t = inputs.tokens
    used = [e for e in range(len(t.mask)) if t.mask[e]]
    wide = {n: np.asarray(x, np.float64) for n, x in (("logp", inputs.logp), ("advantage", inputs.advantage))}
    return Columns(
        **wide,
        old=np.asarray(t.old_logp, np.float64),
        behaviour=np.asarray(t.behaviour_logp, np.float64),
        reference=np.asarray(t.ref_logp, np.float64),
        mask=np.asarray(t.mask),
        transition=np.asarray(t.transition),
        k=np.asarray(t.k),
        sequences=[[e for e in used if t.transition[e] == n] for n in sorted({int(t.transition[e]) for e in used})],
        used=used,
    )


def draw(rollouts=ROLLOUTS, seed: int = 0, *, spread: float = 0.4, size: int | None = EDGES) -> Any:
    """Inputs whose four policies are `spread` apart in log-prob; one advantage a transition."""
    table = make_table(*rollouts, size=SIZE)
    tokens = make_tokens(table, size)
    rng = np.random.default_rng(seed)
    shape = tokens.mask.shape
    old = rng.uniform(-3, -0.1, shape)
    near = lambda: np.minimum(old + rng.normal(size=shape) * spread, -1e-3).astype(np.float32)  # noqa: E731
    tokens = dataclasses.replace(tokens, old_logp=old.astype(np.float32), behaviour_logp=near(), ref_logp=near())
    advantage = rng.normal(size=SIZE).astype(np.float32)[tokens.transition]
    return dataclasses.replace(make_inputs(table, tokens), logp=near(), advantage=advantage)


def per_token(inputs, seed: int = 0):
    """The same with an advantage of its own for every token."""
    return dataclasses.replace(inputs, advantage=np.random.default_rng(seed).normal(size=inputs.logp.shape).astype(np.float32))


def check_values(loss, loop, inputs, *, rtol: float = 1e-5, atol: float = 2e-6):
    values, keep, aux = loss(inputs)
    c = columns(inputs)
    np.testing.assert_allclose(values, np.where(c.mask, loop(c, c.logp, c.logp), 0.0), rtol=rtol, atol=atol)
    assert values.dtype == jnp.float32 and keep.dtype == bool and not (np.asarray(keep) & ~c.mask).any()
    assert all(float(count) == len(c.used) for _, count in aux.values())
    return values, keep, aux


def check_gradient(loss, loop, inputs, *, rtol: float = 2e-5, atol: float = 1e-5):
    """The gradient in logp of Σ uₑ ℓₑ, u drawn at random, against central differences of the loop in float64."""
    c, step = columns(inputs), 1e-6
    u = np.random.default_rng(1).normal(size=c.logp.shape)
    actual = jax.grad(lambda logp: jnp.sum(u.astype(np.float32) * loss(dataclasses.replace(inputs, logp=logp))[0]))(inputs.logp)
    expected = np.zeros_like(c.logp)
    for e in c.used:
        move = np.zeros_like(c.logp)
        move[e] = step
        change = loop(c, c.logp + move, c.logp) - loop(c, c.logp - move, c.logp)
        expected[e] = np.sum(u * np.where(c.mask, change, 0.0)) / (2 * step)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)
    assert np.abs(expected).max() > 0.01, "a loss without a gradient tests nothing"


def check_invariances(loss):
    """NaN outside the mask, the order of edges, more padding and an empty mask."""
    inputs = draw()
    mask = inputs.tokens.mask
    values, keep, aux = loss(inputs)

    spoiled = poison(inputs, mask)
    gradient = jax.grad(lambda logp: jnp.sum(loss(dataclasses.replace(spoiled, logp=logp))[0]))(spoiled.logp)
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[~mask].any()
    for one, other in zip(jax.tree.leaves(loss(spoiled)), jax.tree.leaves((values, keep, aux)), strict=True):
        np.testing.assert_array_equal(one, other)

    order = np.random.default_rng(2).permutation(len(mask))
    moved = jax.tree.map(lambda x: np.asarray(x)[order], inputs)
    moved_values, moved_keep, _ = loss(moved)
    np.testing.assert_allclose(moved_values, np.asarray(values)[order], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(moved_keep, np.asarray(keep)[order])

    used = np.flatnonzero(mask)
    short_values, short_keep, _ = loss(jax.tree.map(lambda x: np.asarray(x)[used], inputs))
    np.testing.assert_allclose(short_values, np.asarray(values)[used], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(short_keep, np.asarray(keep)[used])

    nothing = dataclasses.replace(inputs, tokens=dataclasses.replace(inputs.tokens, mask=np.zeros_like(mask)))
    values, keep, aux = loss(nothing)
    assert not np.asarray(values).any() and not np.asarray(keep).any()
    assert all(float(x) == 0 for pair in aux.values() for x in pair)
