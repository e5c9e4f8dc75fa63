"""Sharing changes nothing: what the policy says of every action token, its gradient and every recipe's loss are those of plain rows.

A loss reads log-probs, entropies, values and Σπ² of edges and nothing else of the policy. So gradients of losses are equal if
(1) for *any* weights on those, the gradient of their weighted sum is equal (float64), and (2) the loss and its gradient with
respect to them are, edge for edge, wherever the edges stand.
"""

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

from lightningrl.losses import count_units
from lightningrl.losses.value import value_states
from lightningrl.model.config import ModelConfig
from lightningrl.model.params import init_params
from lightningrl.packing.rows import PackedBatch, RowSettings, pack
from lightningrl.recipe import Recipe
from lightningrl.recipes import RECIPES
from lightningrl.table import LossInputs, TokenTable
from lightningrl.train import Scores, score_edges
from lightningrl.types import Transition
from tests.batches import make_rollout, make_table
from tests.conversations import call

LONGEST = 16
ROWS = RowSettings(lengths=(LONGEST,), tokens=LONGEST, edges=128)  # a row a micro-batch, so that all have one shape
CONFIG = ModelConfig(8, 16, 2, 2, 1, 8, 24, LONGEST, qk_norm=True, qkv_bias=True, value_head=True)

SOME = st.lists(st.integers(0, 2), min_size=1, max_size=3)


@st.composite
def groups(draw: st.DrawFn) -> list[Transition]:
    """Calls of rollouts that begin alike, go on, branch off, and are repeated; more than a row holds, as a rule."""
    prompts = draw(st.lists(SOME, min_size=1, max_size=2))
    calls: list[Transition] = []
    for _ in range(draw(st.integers(1, 6))):
        ids = draw(st.sampled_from(prompts))
        for turn in range(draw(st.integers(1, 3))):
            response = draw(SOME)
            calls.append(dataclasses.replace(call(ids, response, turn), temperature=draw(st.sampled_from([1.0, 0.5]))))
            if draw(st.integers(0, 4)) == 0:
                calls.append(calls[-1])
            ids = [*ids, *response, *draw(SOME)]
            if len(ids) + 3 > LONGEST:
                break
    return calls


def weighted(params: Any, rows: Any, edges: TokenTable, weights: Scores) -> Any:
    scores = score_edges(params, CONFIG, rows, edges)
    total = sum(jnp.sum(jnp.where(edges.mask, w * s, 0.0)) for w, s in zip(jax.tree.leaves(weights), jax.tree.leaves(scores), strict=True))
    return total, scores


@functools.cache
def compiled() -> Any:
    return jax.jit(jax.grad(weighted, has_aux=True))


@functools.cache
def params() -> Any:
    drawn = init_params(CONFIG, jax.random.key(0), jnp.float64)
    return drawn | {"value_head": jnp.linspace(-1, 1, 16, dtype=jnp.float64)}


def scored(packed: PackedBatch, weights: np.ndarray) -> tuple[np.ndarray, Any]:
    """Every edge's scores [transition, k, 4], and the gradient; weights [transition, k, 4] of its scores in the sum."""
    total, found = None, np.zeros_like(weights)
    for i, rows in enumerate(packed.rows):
        edges = jax.tree.map(lambda x, i=i: x[i], packed.edges)
        gradient, scores = compiled()(params(), rows, edges, Scores(*np.moveaxis(weights[edges.transition, edges.k], -1, 0)))
        total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
        found[edges.transition[edges.mask], edges.k[edges.mask]] = np.stack(jax.tree.leaves(scores), -1)[edges.mask]
    return found, total


@pytest.mark.slow
@settings(max_examples=60)
@given(groups(), st.integers(0, 1000))
def test_scores_and_gradients_of_any_group_are_those_of_plain_rows(calls: list[Transition], seed: int) -> None:
    with jax.enable_x64(True):
        weights = np.random.default_rng(seed).normal(size=(len(calls), 4, 4))
        one, other = (scored(pack(calls, range(len(calls)), ROWS, share=share), weights) for share in (True, False))
        np.testing.assert_allclose(one[0], other[0], rtol=1e-10, atol=1e-12)
        largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(other[1]))  # some arrays' gradients are 0 but for rounding
        for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * largest)


def loss_and_slopes(recipe: Recipe, table: Any, tokens: TokenTable, advantage: Any, scores: Scores) -> Any:
    counts, zeros = count_units(table, tokens), np.zeros(tokens.mask.shape, np.float32)

    def objective(scores: Scores) -> jax.Array:
        inputs = LossInputs(tokens, counts, advantage, scores.logp, scores.entropy, scores.value, zeros, zeros + 0.5)
        selection = {} if recipe.select is None else {"selected": recipe.select(inputs, key=jax.random.key(0))}
        loss, keep, _ = recipe.loss(inputs, **selection)
        total, denominator = recipe.aggregation(jnp.where(keep, loss, 0.0), tokens.mask, counts)
        total += recipe.entropy_coef * recipe.aggregation(scores.entropy, tokens.mask, counts)[0]
        if recipe.kl is not None:
            total += recipe.kl_coef * recipe.aggregation(recipe.kl(inputs), tokens.mask, counts)[0]
        total /= denominator
        if recipe.critic_target is not None:
            states = value_states(tokens, recipe.critic_states)
            of_value = recipe.value_aggregation(recipe.value_loss(inputs, states=recipe.critic_states)[0], states, counts)
            total += recipe.value_coef * of_value[0] / of_value[1]
        return total

    return jax.value_and_grad(objective)(scores)


def distinct(recipe: Recipe) -> str:
    return str(
        (recipe.loss, recipe.aggregation, recipe.kl, recipe.select, recipe.value_loss, recipe.critic_states, recipe.value_aggregation)
    )


OBJECTIVES = list({distinct(recipe): name for name, recipe in reversed(RECIPES.items())}.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_of_every_recipe_is_that_of_plain_rows(name: str) -> None:
    lengths = [[2, 3], [2, 3], [1], [4, 1, 2]]
    table = make_table(*(make_rollout("a" if i < 2 else "b", i % 2, [0.0] * len(n), lengths=n) for i, n in enumerate(lengths)))
    # The second rollout repeats the first, and the others go on from their own calls.
    calls = []
    for n in lengths:
        for turn, count in enumerate(n):
            calls.append(call([1, 2] + [3] * turn, [(turn + k) % 5 for k in range(count)], turn))
    ids = list(range(len(calls)))
    rng = np.random.default_rng(0)
    said = rng.normal(-1, 0.4, (4, len(calls), 4)).astype(np.float32)  # by field, transition and k
    old = rng.normal(-1, 0.4, (3, len(calls), 4)).astype(np.float32)
    advantage = rng.normal(size=len(table.valid)).astype(np.float32)
    results = []
    for share in (True, False):
        packed = pack(calls, ids, RowSettings((16,), 16, 16), share=share)
        tokens = jax.tree.map(np.ravel, packed.edges)
        at = (tokens.transition, tokens.k)
        tokens = dataclasses.replace(tokens, old_logp=old[0][at], behaviour_logp=old[1][at], ref_logp=old[2][at])
        loss, slopes = loss_and_slopes(RECIPES[name], table, tokens, advantage[tokens.transition], Scores(*(x[at] for x in said)))
        placed = np.zeros_like(said)
        placed[:, at[0][tokens.mask], at[1][tokens.mask]] = np.stack(jax.tree.leaves(slopes))[:, tokens.mask]
        results.append((loss, placed))
    (loss, slopes), (expected_loss, expected) = results
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    # Sums over edges are taken in another order, so that a gradient differs by roundings of the largest.
    np.testing.assert_allclose(slopes, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    assert np.abs(expected).max() > 0
