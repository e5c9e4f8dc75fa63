"""The tokens of a rollout as one sequence: what recursions over tokens run along.

The sequence is the rollout's edges in order of (transition, k), however they were packed. Edges without a loss, whether
padding, observations or calls that are not trained, are carried across: they take no discount and end nothing. What the
environment paid during a call stands at the call's last token; what it paid during a call without tokens stands at the
last token before it, so that no reward is lost with a call that is not trained.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from flax import struct

from lightningrl.credit.returns import turn_rewards
from lightningrl.segments import next_in_segment, reverse_affine_scan, segment_count
from lightningrl.table import Array, Evidence, TokenTable, TransitionTable


@struct.dataclass
class OrderedEdges:
    """The edges of a TokenTable, flat, sorted by (transition, k); those without a loss come last."""

    order: Array  # int32 [E], where each stood
    transition: Array  # int32 [E]
    rollout: Array  # int32 [E]
    mask: Array  # bool [E]
    first: Array  # bool [E], the first masked edge of its transition
    last: Array  # bool [E], the last one
    reward: Array  # float32 [E], what the environment paid after the edge and before the next

    def take(self, x: Array) -> jax.Array:
        """An array of the TokenTable's shape in this order; 0 without a loss."""
        return jnp.where(self.mask, jnp.ravel(jnp.asarray(x))[self.order], 0.0)

    def put(self, x: Array, tokens: TokenTable) -> jax.Array:
        """The way back: an array in this order in the TokenTable's shape; 0 without a loss."""
        flat = jnp.zeros_like(x).at[self.order].set(jnp.where(self.mask, x, 0.0))
        return jnp.reshape(flat, jnp.shape(tokens.mask))


def in_order(table: TransitionTable, tokens: TokenTable) -> OrderedEdges:
    """Sorts the edges into the sequences that recursions over tokens run along; `tokens` of any shape, e.g. micro-batches."""
    chex.assert_equal_shape([tokens.transition, tokens.k, tokens.mask])
    transition, k, mask = (jnp.ravel(jnp.asarray(x)) for x in (tokens.transition, tokens.k, tokens.mask))
    order = jnp.lexsort((k, transition, ~mask)).astype(jnp.int32)
    transition, mask = transition[order], mask[order]
    boundary = jnp.ones(1, bool)
    changes = jnp.logical_or(transition[1:] != transition[:-1], ~mask[1:])
    first, last = (jnp.logical_and(mask, jnp.concatenate(x)[: mask.shape[0]]) for x in ((boundary, changes), (changes, boundary)))
    acts = segment_count(transition, table.rollout.shape[0], mask=mask) > 0
    return OrderedEdges(
        order=order,
        transition=transition,
        rollout=jnp.asarray(table.rollout)[transition],
        mask=mask,
        first=first,
        last=last,
        reward=jnp.where(last, _paid_until_the_next_token(table, acts)[transition], 0.0),
    )


def token_values(edges: OrderedEdges, tokens: TokenTable, evidence: Evidence, what: str) -> jax.Array:
    """A token critic's values in this order, without gradient. Raises ValueError, naming `what`, if there are none."""
    if evidence.token_value is None:
        raise ValueError(f"{what} needs evidence.token_value, a critic's value of the state before every token, but there is none.")
    chex.assert_equal_shape([evidence.token_value, tokens.mask])
    chex.assert_type(evidence.token_value, float)
    return jax.lax.stop_gradient(edges.take(evidence.token_value))


def _paid_until_the_next_token(table: TransitionTable, acts: jax.Array) -> jax.Array:
    """f32[N]: a transition's reward and those of the transitions without tokens that follow it directly."""
    next_acts = next_in_segment(jnp.where(acts, 1.0, 0.0), table.rollout, table.valid)
    return reverse_affine_scan(1.0 - next_acts, turn_rewards(table), table.rollout, table.valid)
