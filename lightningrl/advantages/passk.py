"""Advantages for succeeding once in k tries."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lightningrl.advantages.units import require_return
from lightningrl.normalize import Scale
from lightningrl.segments import (
    EPSILON,
    safe_divide,
    safe_sqrt,
    segment_count,
    segment_max,
    segment_mean,
    segment_min,
    segment_var,
)
from lightningrl.table import Credit, Evidence, TransitionTable


def pass_at_k(
    table: TransitionTable, credit: Credit, evidence: Evidence, *, scale: Scale = "std", ddof: float = 1.0, eps: float = EPSILON
) -> jax.Array:
    """Only the best rollout of a group is credited, with its lead over the second best (arXiv 2503.19595, GRPO pass@k in verl).

      Aᵢ = (R₍₁₎ - R₍₂₎) / s for the best rollout,   0 for all others;   s = σg + eps with scale="std", 1 with "none"

    The gradient of E[max over the group's rollouts]: without its best, a group would have scored R₍₂₎; that the other
    rollouts are there changed nothing. Where several are best, none was needed, and all get 0: as soon as two of k tries
    succeed there is nothing to learn. The division by σg is verl's; whether the paper has it we are not sure.

    Args:
      table: N transitions.
      credit: of kind "return"; R of a rollout is the mean of its calls' credits.
      evidence: not read.
      scale, ddof, eps: as above; σg counts rollouts.

    Returns:
      f32[N], the same at all calls of a rollout; 0 at padding, in groups of one rollout (an error in verl), and where the
      best is tied, all exactly.

    Raises:
      ValueError: the credit is already an advantage, or an unknown scale.
    """
    chex.assert_equal_shape([credit.value, table.rollout, table.group, table.valid])
    chex.assert_type([credit.value, table.valid], [float, bool])
    require_return(credit, "pass_at_k")
    if scale not in ("std", "none"):
        raise ValueError(f"pass_at_k has no scale {scale!r}: choose one of std, none.")
    size = table.rollout.shape[0]
    exists = segment_count(table.rollout, size, mask=table.valid) > 0
    group = segment_max(jnp.asarray(table.group), table.rollout, size, mask=table.valid)
    reward = _rollout_credit(table, credit)

    best = segment_max(reward, group, size, mask=exists)
    leads = jnp.logical_and(exists, reward == best[group])
    alone_at_the_top = segment_count(group, size, mask=leads) == 1
    others = jnp.logical_and(exists, ~leads)
    second = segment_max(reward, group, size, mask=others)
    compared = jnp.logical_and(alone_at_the_top, segment_count(group, size, mask=others) > 0)
    gap = jnp.where(compared, best - second, 0.0)
    if scale == "std":
        deviation = safe_sqrt(segment_var(reward, group, size, weights=jnp.where(exists, 1.0, 0.0), ddof=ddof))
        gap = safe_divide(gap, deviation + eps)
    return jnp.where(table.valid, jnp.where(leads, gap[group], 0.0)[table.rollout], 0.0)


def _rollout_credit(table: TransitionTable, credit: Credit) -> jax.Array:
    """f32[N], by rollout. Equal calls are not averaged: rounding would break ties between rollouts of different lengths."""
    size = table.rollout.shape[0]
    low, high, mean = (f(credit.value, table.rollout, size, mask=table.valid) for f in (segment_min, segment_max, segment_mean))
    return jnp.where(low == high, low, mean)
