"""The turn critic: a linear head on the policy's last hidden state, trained by the recipe's value loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lightningrl.table import Array, TokenTable, TransitionTable


def turn_values(table: TransitionTable, tokens: TokenTable, edge_values: Array) -> jax.Array:
    """V of the state before each call, read at the last token of its prompt: the node of the call's first edge.

    Args:
      table: N transitions.
      tokens: all edges, of any shape; edge_values: float32 of that shape, the critic's value at each edge's node.

    Returns:
      float32 [N]; 0 at padding, and for a transition without edges, one that is not trained: `credit.gae` doesn't read it there.
    """
    first = jnp.ravel(tokens.mask) & (jnp.ravel(tokens.k) == 0)
    values = jnp.where(first, jnp.ravel(edge_values), 0.0)
    return jax.ops.segment_sum(values, jnp.ravel(tokens.transition), table.rollout.shape[0])
