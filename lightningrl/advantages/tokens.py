"""From one advantage a transition to one an action token: `(table, tokens, advantage, evidence) -> f32[E]`."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lightningrl.table import Array, Evidence, TokenTable, TransitionTable


def broadcast(table: TransitionTable, tokens: TokenTable, advantage: Array, evidence: Evidence) -> jax.Array:
    """Every token gets the advantage of its transition: Aₑ = A_{transition(e)}.

    Args:
      table: N transitions.
      tokens: E edges, of any shape.
      advantage: f32[N].
      evidence: not read.

    Returns:
      f32[E]; 0 where no loss is wanted.
    """
    chex.assert_shape(advantage, table.rollout.shape)
    chex.assert_equal_shape([tokens.transition, tokens.mask])
    chex.assert_type([advantage, tokens.transition, tokens.mask], [float, int, bool])
    return jnp.where(tokens.mask, jnp.asarray(advantage)[tokens.transition], 0.0)
