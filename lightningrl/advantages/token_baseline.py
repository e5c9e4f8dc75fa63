"""The optimal token baseline: rewards to come compared, token by token, with those of the group's other rollouts."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp

from lightningrl.advantages.token_order import OrderedEdges, in_order
from lightningrl.normalize import Singleton
from lightningrl.segments import joint_ids, reverse_affine_scan, safe_divide, segment_constant, segment_count, segment_max, segment_sum
from lightningrl.table import Array, Evidence, TokenTable, TransitionTable

Tail = Literal["raw", "zero"]


def optimal_token_baseline(
    table: TransitionTable,
    tokens: TokenTable,
    advantage: Array,
    evidence: Evidence,
    *,
    rho: Array | None = None,
    singleton: Singleton = "zero",
    tail: Tail = "raw",
) -> jax.Array:
    """The baseline of least variance for every token, from forward passes alone (OTB, arXiv 2602.07078).

      wₖ = 1 - 2 π(yₖ) + Σₐ π(a)²,   Wₖ = Σⱼ≤ₖ wⱼ
      Bₖ = Σᵢ Gᵢ,ₖ Wᵢ,ₖ / Σᵢ Wᵢ,ₖ over the group's rollouts that have a token at position k,   Aₖ = Gₖ - Bₖ

    G is the undiscounted reward to come. w is the squared norm of the gradient of log π(yₖ) with respect to the logits, a
    stand-in for that with respect to the parameters. A sure rollout (small W) has little say in the baseline.

    Here a position is (turn, k) and W starts anew with each call, so that calls are compared with the other rollouts' calls
    of the same turn. The paper has one call; this reading for several is ours. `multi_turn_optimal_token_baseline` has the
    authors'. With one call a rollout the two are the same.

    Unsure: read from the paper's abstract and the authors' code in verl, not from its proofs. W is cumulative in both; that
    the group's own rollout is part of its baseline, which biases the estimate by a factor of about 1 - 1/n, is the code's.

    Args:
      table: N transitions.
      tokens: E edges, of any shape, in any order; π(yₖ) = exp(old_logp).
      advantage: not read.
      evidence: needs `sum_pi2`, f32 of the shape of the edges, in (0, 1], of the distribution that `old_logp` is of.
      rho: f32 ≥ 0 of the shape of the edges, truncated importance ratios by which the loss weighs tokens; w is multiplied by
        ρ². None for 1.
      singleton: tokens of a group of one rollout get "zero", or "raw": G (the authors' code).
      tail: where one rollout of several is so long that no other has a token there, its tokens get "raw": G (the authors'
        code), or "zero", which is G less its own baseline: the end of a long rollout then learns nothing.

    Returns:
      f32[E]; 0 where no loss is wanted. Exactly 0 where all rollouts at a position have the same G, and G where every W there
      is 0: rollouts that are sure have no gradient.

    Raises:
      ValueError: there is no `evidence.sum_pi2`, or an unknown singleton or tail.
    """
    edges = in_order(table, tokens)
    return _token_baseline(table, tokens, evidence, edges, edges.transition, table.turn, rho, singleton, tail)


def multi_turn_optimal_token_baseline(
    table: TransitionTable,
    tokens: TokenTable,
    advantage: Array,
    evidence: Evidence,
    *,
    rho: Array | None = None,
    singleton: Singleton = "zero",
    tail: Tail = "raw",
) -> jax.Array:
    """`optimal_token_baseline` over the whole rollout (arXiv 2602.07078, tool-integrated reasoning; verl's `tir_` form).

    A position is the number of tokens with a loss before it in the rollout, whichever calls they are in, observations left
    out; W is summed over all of them. Args, returns and raises as there.
    """
    edges = in_order(table, tokens)
    return _token_baseline(table, tokens, evidence, edges, edges.rollout, jnp.zeros_like(table.turn), rho, singleton, tail)


def _token_baseline(
    table: TransitionTable,
    tokens: TokenTable,
    evidence: Evidence,
    edges: OrderedEdges,
    sequence: Array,
    turn: Array,
    rho: Array | None,
    singleton: Singleton,
    tail: Tail,
) -> jax.Array:
    for name, choice, choices in (("singleton", singleton, Singleton), ("tail", tail, Tail)):
        if choice not in get_args(choices):
            raise ValueError(f"There is no {name} {choice!r}: choose one of {', '.join(get_args(choices))}.")
    energy = _cumulative(_gradient_norms(tokens, evidence, edges, rho), sequence, edges.mask)
    returns = reverse_affine_scan(jnp.ones_like(edges.reward), edges.reward, edges.rollout, edges.mask)

    group = jnp.asarray(table.group)[edges.transition]
    position = _cumulative(jnp.ones_like(energy), sequence, edges.mask).astype(jnp.int32) - 1
    cell = _cells(table, edges, turn, position)
    size, mask = cell.shape[0], edges.mask
    baseline = safe_divide(segment_sum(returns * energy, cell, size, mask=mask), segment_sum(energy, cell, size, mask=mask))[cell]

    constant = segment_constant(returns, cell, size, mask=mask)[cell]
    one_here = (segment_count(cell, size, mask=mask) == 1)[cell]  # a rollout stands in a cell once
    one_in_group = segment_constant(jnp.asarray(table.rollout), table.group, table.rollout.shape[0], mask=table.valid)[group]
    result = jnp.where(constant, 0.0, returns - baseline)
    result = jnp.where(one_here, returns if tail == "raw" else 0.0, result)
    result = jnp.where(one_in_group, returns if singleton == "raw" else 0.0, result)
    return edges.put(result, tokens)


def _cells(table: TransitionTable, edges: OrderedEdges, turn: Array, position: jax.Array) -> jax.Array:
    """int32[E], 0 … E-1: the same number for the same group, turn and position. turn: int32[N].

    Every pair of a group and a turn gets as many numbers as its longest sequence has tokens, so that pairs are sorted, which
    are fewer than edges.
    """
    pair = joint_ids(jnp.asarray(table.valid), jnp.asarray(table.group), jnp.asarray(turn))
    pair_of_edge = pair[edges.transition]
    lengths = segment_max(position + 1, pair_of_edge, pair.shape[0], mask=edges.mask)
    return jnp.where(edges.mask, (jnp.cumsum(lengths) - lengths)[pair_of_edge] + position, 0)


def _gradient_norms(tokens: TokenTable, evidence: Evidence, edges: OrderedEdges, rho: Array | None) -> jax.Array:
    if evidence.sum_pi2 is None:
        raise ValueError("The optimal token baseline needs evidence.sum_pi2, Σₐ π(a)² at every token, but there is none.")
    chex.assert_equal_shape([evidence.sum_pi2, tokens.old_logp, tokens.mask])
    norms = 1.0 - 2.0 * jnp.exp(edges.take(tokens.old_logp)) + edges.take(evidence.sum_pi2)
    norms = jnp.maximum(norms, 0.0)
    if rho is not None:
        chex.assert_equal_shape([rho, tokens.mask])
        norms = norms * edges.take(rho) ** 2
    return jax.lax.stop_gradient(norms)


def _cumulative(x: Array, ids: Array, mask: Array) -> jax.Array:
    """Σⱼ≤ₜ xⱼ within a segment: the reverse scan of the reversed arrays."""
    backwards = (jnp.flip(a) for a in (jnp.ones_like(x), x, ids, mask))
    return jnp.flip(reverse_affine_scan(*backwards))
