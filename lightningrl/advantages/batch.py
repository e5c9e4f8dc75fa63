"""Scales from the whole batch."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lightningrl.advantages.units import Count, require_return, statistics_weights
from lightningrl.segments import EPSILON, masked_max, masked_mean, masked_min, masked_var, safe_divide, safe_sqrt
from lightningrl.table import Credit, Evidence, TransitionTable


def unchanged(table: TransitionTable, credit: Credit, evidence: Evidence) -> jax.Array:
    """A = c, for a credit that is already an advantage and has its scale; of a "return", REINFORCE without a baseline.

    Args:
      table: N transitions.
      credit: of either kind.
      evidence: not read.

    Returns:
      f32[N]; 0 at padding.
    """
    chex.assert_equal_shape([credit.value, table.rollout, table.valid])
    chex.assert_type([credit.value, table.valid], [float, bool])
    return jnp.where(table.valid, credit.value, 0.0)


def whiten(
    table: TransitionTable,
    credit: Credit,
    evidence: Evidence,
    *,
    count: Count = "rollouts",
    shift_mean: bool = True,
    ddof: float = 1.0,
    eps: float = EPSILON,
) -> jax.Array:
    """Credit in units of its spread over the batch.

      shift_mean:   A = (c - μ) / (σ + eps),  σ² = Σ w (c - μ)² / (Σ w - ddof)
      otherwise:    A = c / (ρ + eps),        ρ² = Σ w c² / Σ w

    An advantage is scaled and not shifted: it has its zero already, and moving it would praise calls that did worse than
    the critic expected.

    Args:
      table: N transitions.
      credit: of kind "return", or of either kind without `shift_mean`.
      evidence: not read.
      count: what statistics count; `statistics_weights`.
      shift_mean: whether the batch mean is a baseline.
      ddof: of σ; not read without `shift_mean`.
      eps: added to the divisor.

    Returns:
      f32[N]; 0 at padding. With `shift_mean` a constant batch, and a batch of one, gets exactly 0.

    Raises:
      ValueError: `shift_mean` of a credit that is already an advantage, or an unknown count.
    """
    chex.assert_equal_shape([credit.value, table.rollout, table.valid])
    chex.assert_type([credit.value, table.valid], [float, bool])
    weights = statistics_weights(table, count)
    used = weights > 0
    x = jnp.where(used, credit.value, 0.0)
    if not shift_mean:
        return safe_divide(x, safe_sqrt(masked_mean(x**2, used, weights)) + eps)
    require_return(credit, "whiten")
    deviation = safe_sqrt(masked_var(x, used, weights, ddof=ddof))
    advantage = safe_divide(x - masked_mean(x, used, weights), deviation + eps)
    alone = masked_min(table.rollout, used) == masked_max(table.rollout, used)
    constant = masked_min(x, used) == masked_max(x, used)
    return jnp.where(used & ~constant & ~alone, advantage, 0.0)
