"""Scores read in chunks of the vocabulary equal those of whole logits, values and gradients, and whole logits never exist."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningrl.model.config import ModelConfig
from lightningrl.model.token_scores import token_scores

V, D, E = 50, 8, 33
CONFIG = ModelConfig(V, D, 1, 1, 1, 8, 8, 16)


def inputs(dtype: Any, vocabulary: int = V) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return (
        (3 * rng.normal(size=(E, D))).astype(dtype),
        rng.normal(size=(vocabulary, D)).astype(dtype),
        rng.integers(0, vocabulary, E).astype(np.int32),
        rng.uniform(0.3, 2.0, E).astype(dtype),
    )


def params(head: Any, tied: bool) -> Any:
    return {"embedding": head} if tied else {"embedding": head * 0, "head": head.T}


def by_definition(hidden: np.ndarray, head: np.ndarray, token: np.ndarray, temperature: np.ndarray) -> tuple[list[float], ...]:
    logps, entropies, squares = [], [], []
    for h, a, tau in zip(hidden, token, temperature, strict=True):
        z = [float(np.dot(h, row)) / tau for row in head]
        mass = sum(np.exp(x - max(z)) for x in z)
        p = [np.exp(x - max(z)) / mass for x in z]
        logps.append(np.log(p[a]))
        entropies.append(-sum(q * np.log(q) for q in p))
        squares.append(sum(q * q for q in p))
    return logps, entropies, squares


@pytest.mark.slow
@pytest.mark.parametrize(("chunk", "tied"), [(1, True), (7, False), (25, True), (49, False), (50, True), (64, False)])
def test_equals_the_definition_in_float64(chunk: int, tied: bool) -> None:
    with jax.enable_x64(True):
        hidden, head, token, temperature = inputs(np.float64)
        made = token_scores(params(head, tied), dataclasses.replace(CONFIG, tie_embeddings=tied), hidden, token, temperature, chunk=chunk)
        for ours, expected in zip(made, by_definition(hidden, head, token, temperature), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 7, 49])
def test_gradients_equal_those_of_whole_logits(chunk: int) -> None:
    hidden, head, token, temperature = inputs(np.float32)
    weights = np.random.default_rng(1).normal(size=(3, E)).astype(np.float32)

    def total(hidden: Any, head: Any, chunk: int) -> jax.Array:
        made = token_scores(params(head, True), CONFIG, hidden, token, temperature, chunk=chunk)
        return sum(jnp.sum(w * x) for w, x in zip(weights, made, strict=True))

    whole = jax.grad(total, argnums=(0, 1))(hidden, head, V)
    parts = jax.grad(total, argnums=(0, 1))(hidden, head, chunk)
    for a, b in zip(parts, whole, strict=True):
        # The same terms in another order: some tens of roundings of the largest.
        np.testing.assert_allclose(a, b, rtol=0, atol=64 * np.finfo(np.float32).eps * np.abs(b).max())


def test_logits_that_are_far_apart_overflow_nowhere() -> None:
    head = np.concatenate([np.full((25, D), -40.0), np.full((25, D), 40.0)]).astype(np.float32)
    hidden, token, temperature = np.ones((1, D), np.float32), np.array([30], np.int32), np.ones(1, np.float32)
    logp, entropy, sum_pi2 = token_scores(params(head, True), CONFIG, hidden, token, temperature, chunk=10)
    np.testing.assert_allclose([logp[0], entropy[0], sum_pi2[0]], [-np.log(25), np.log(25), 1 / 25], rtol=1e-6)


def test_memory_does_not_grow_with_the_vocabulary() -> None:
    """Beyond the head's own gradient, which is as large as the head."""

    def temporary(vocabulary: int) -> int:
        hidden, head, token, temperature = inputs(np.float32, vocabulary)

        def total(hidden: Any, head: Any) -> jax.Array:
            return jnp.sum(token_scores(params(head, True), CONFIG, hidden, token, temperature, chunk=64)[0])

        compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(hidden, head).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    heads = (1024 - 512) * D * 4
    assert temporary(1024) - temporary(512) <= 2 * heads < (1024 - 512) * E * 4
