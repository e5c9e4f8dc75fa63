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
from lightningrl.segments import next_in_segment, reverse_affine_scan
from lightningrl.table import Array, Evidence, TokenTable, TransitionTable


@struct.dataclass
class OrderedEdges:
    """The edges of a TokenTable with a loss, flat, in order of (transition, k); filled up with false and 0 to E of them."""

    order: Array  # int32 [E], where each stood; E in the filling
    transition: Array  # int32 [E]
    rollout: Array  # int32 [E]
    mask: Array  # bool [E], false in the filling
    first: Array  # bool [E], the first masked edge of its transition
    last: Array  # bool [E], the last one
    reward: Array  # float32 [E], what the environment paid after the edge and before the next

    def take(self, x: Array) -> jax.Array:
        """An array of the TokenTable's shape in this order; 0 without a loss."""
        return jnp.where(self.mask, jnp.ravel(jnp.asarray(x))[self.order], 0.0)

    def put(self, x: Array, tokens: TokenTable) -> jax.Array:
        """The way back: an array in this order in the TokenTable's shape; 0 without a loss."""
        flat = jnp.zeros_like(x).at[self.order].set(x, mode="drop")
        return jnp.reshape(flat, jnp.shape(tokens.mask))

    def following(self, x: Array, ids: Array) -> jax.Array:
        """`segments.next_in_segment` of arrays in this order, which have no holes: the entry beside it, 0 after an id's last."""
        goes_on = self.mask[1:] & (ids[1:] == ids[:-1])
        return jnp.concatenate([jnp.where(goes_on, x[1:], 0.0), jnp.zeros(1)])[: x.shape[0]]


def in_order(table: TransitionTable, tokens: TokenTable) -> OrderedEdges:
    """The edges as the sequences that recursions over tokens run along; `tokens` of any shape, e.g. micro-batches.

    Edges of equal (transition, k) come as they stood. Where the k of every transition's edges with a loss are 0 … n-1, each
    once, no sorting is needed: an edge's place is the number of edges of the transitions before its own, plus k. Whether
    that is so is looked up while it runs (`lax.cond`); where a loss leaves gaps in a response, edges are sorted, to the same
    result and many times slower. Under `vmap` both are computed for every batch.
    """
    chex.assert_equal_shape([tokens.transition, tokens.k, tokens.mask])
    chex.assert_equal_shape([table.rollout, table.reward, table.valid])
    chex.assert_rank(table.rollout, 1)
    transition, k, mask = (jnp.ravel(jnp.asarray(x)) for x in (tokens.transition, tokens.k, tokens.mask))
    counts = jnp.zeros(table.rollout.shape, jnp.int32).at[transition].add(mask.astype(jnp.int32))
    counted, without_gaps = _counted_order(transition, k, mask, counts)
    order = jax.lax.cond(without_gaps, lambda: counted, lambda: _sorted_order(transition, k, mask))
    mask = order < mask.shape[0]
    transition = transition.at[order].get(mode="fill", fill_value=0)
    boundary = jnp.ones(1, bool)
    changes = jnp.logical_or(transition[1:] != transition[:-1], ~mask[1:])
    first, last = (jnp.logical_and(mask, jnp.concatenate(x)[: mask.shape[0]]) for x in ((boundary, changes), (changes, boundary)))
    return OrderedEdges(
        order=order,
        transition=transition,
        rollout=jnp.where(mask, jnp.asarray(table.rollout)[transition], 0),
        mask=mask,
        first=first,
        last=last,
        reward=jnp.where(last, _paid_until_the_next_token(table, counts > 0)[transition], 0.0),
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


def _counted_order(transition: Array, k: Array, mask: Array, counts: Array) -> tuple[jax.Array, jax.Array]:
    """The order by counting, int32[E], and whether there were no gaps: without, it is nonsense. counts: int32[N], masked edges."""
    size = mask.shape[0]
    edges = jnp.arange(size, dtype=jnp.int32)
    place = jnp.where(mask, (jnp.cumsum(counts) - counts)[transition] + k, size)
    order = jnp.full_like(edges, size).at[place].set(edges, mode="drop")
    in_range = (k >= 0) & (k < counts[transition])
    filled = (order < size) | (edges >= jnp.sum(counts))  # a k that is there twice leaves another's place empty
    return order, jnp.all(in_range | ~mask) & jnp.all(filled)


def _sorted_order(transition: Array, k: Array, mask: Array) -> jax.Array:
    order = jnp.lexsort((k, transition, ~mask)).astype(jnp.int32)
    return jnp.where(mask[order], order, mask.shape[0])
