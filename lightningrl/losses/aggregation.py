"""From per-token losses to one number: `(loss[E], mask[E], counts) -> (sum, denominator)`.

The loss is sum / denominator, divided once, after adding both over every micro-batch and device. That they *can* be added is
because `counts` says of every edge how many masked edges its unit has in the whole batch: a micro-batch that holds half
of a rollout contributes half of that rollout's weight. Units of no masked edge weigh nothing.

The unit "sequence" is the transition: one LLM call. An empty mask gives (0, 0).
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lightningrl.segments import masked_sum, safe_divide, segment_sum
from lightningrl.table import Array, TokenTable, TransitionTable, UnitCounts

Aggregate = tuple[jax.Array, jax.Array]


def count_units(table: TransitionTable, tokens: TokenTable) -> UnitCounts:
    """How many masked edges each edge's transition, rollout and group have.

    Args:
      table: N transitions.
      tokens: *all* edges of the batch, in any shape, such as [micro-batches, E]; not one micro-batch of several.

    Returns:
      f32 of the edges' shape; 0 where the mask is false.
    """
    chex.assert_equal_shape([table.rollout, table.group])
    chex.assert_equal_shape([tokens.transition, tokens.mask])
    chex.assert_type([tokens.transition, tokens.mask], [int, bool])
    size = table.rollout.shape[0]
    transition = jnp.ravel(tokens.transition)
    mask = jnp.ravel(tokens.mask)
    per_transition = jax.ops.segment_sum(mask.astype(jnp.float32), transition, size)

    def of_edges(per_unit: jax.Array) -> jax.Array:
        return jnp.where(mask, per_unit[transition], 0.0).reshape(jnp.shape(tokens.mask))

    return UnitCounts(
        sequence_tokens=of_edges(per_transition),
        rollout_tokens=of_edges(segment_sum(per_transition, table.rollout, size)[table.rollout]),
        group_tokens=of_edges(segment_sum(per_transition, table.group, size)[table.group]),
    )


def token_mean(loss: Array, mask: Array, counts: UnitCounts) -> Aggregate:
    """Every token weighs the same (DAPO, arXiv 2503.14476, §3.3):  Σ m ℓ  /  Σ m."""
    return _aggregate(loss, mask, jnp.ones(jnp.shape(mask), jnp.float32))


def sequence_mean(loss: Array, mask: Array, counts: UnitCounts) -> Aggregate:
    """Every transition weighs the same, its tokens averaged (GRPO, arXiv 2402.03300, eq. 3):  Σₛ (1/nₛ) Σ m ℓ  /  Σₛ 1."""
    return _aggregate(loss, mask, _share(mask, counts.sequence_tokens))


def rollout_mean(loss: Array, mask: Array, counts: UnitCounts) -> Aggregate:
    """Every rollout weighs the same, the tokens of its calls averaged (arXiv 2608.17528, eq. 3):  Σᵢ (1/nᵢ) Σ m ℓ  /  Σᵢ 1."""
    return _aggregate(loss, mask, _share(mask, counts.rollout_tokens))


def group_mean(loss: Array, mask: Array, counts: UnitCounts) -> Aggregate:
    """Every task weighs the same, the tokens of its rollouts averaged ("prompt mean"):  Σg (1/ng) Σ m ℓ  /  Σg 1."""
    return _aggregate(loss, mask, _share(mask, counts.group_tokens))


def sequence_sum(loss: Array, mask: Array, counts: UnitCounts, *, length: float = 1.0) -> Aggregate:
    """Every transition weighs its length: mean over transitions of the sum over tokens,  Σ m ℓ  /  (L Σₛ 1).

    L = 1 is the sum itself, a constant such as the longest response's length the normalised sum of Dr. GRPO (arXiv 2503.20783).
    """
    total = token_mean(loss, mask, counts)[0]
    return total, length * sequence_mean(loss, mask, counts)[1]


def _share(mask: Array, unit_tokens: Array) -> jax.Array:
    return safe_divide(jnp.ones(jnp.shape(mask), jnp.float32), jnp.where(mask, unit_tokens, 0.0))


def _aggregate(loss: Array, mask: Array, weights: jax.Array) -> Aggregate:
    chex.assert_equal_shape([loss, mask, weights])
    return masked_sum(loss, mask, weights), jnp.sum(jnp.where(mask, weights, 0.0))
