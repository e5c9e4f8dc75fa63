"""Credit that hands the final outcome of a rollout to its transitions: to each of them, to the last, or in equal parts."""

from __future__ import annotations

import chex
import jax.numpy as jnp

from lightningrl.segments import last_in_segment, segment_sum
from lightningrl.table import Credit, Evidence, TransitionTable


def identical(table: TransitionTable, evidence: Evidence, *, include_intermediate: bool = False) -> Credit:
    """Every call of a rollout gets the same: its final return (arXiv 2508.03680, §3.3.2).

      cᵢ,ₜ = Rᵢ,   or with intermediate rewards   cᵢ,ₜ = Rᵢ + Σₛ rᵢ,ₛ

    The paper's experiments have a final outcome only, so that is the default.

    Args:
      table: N transitions; R is `outcome[:, 0]`.
      evidence: not read.
      include_intermediate: whether the return also sums the rollout's intermediate rewards.

    Returns:
      Credit of kind "return", f32[N]; 0 at padding.
    """
    chex.assert_equal_shape([table.rollout, table.reward, table.valid])
    chex.assert_shape(table.outcome, (*table.rollout.shape, None))
    chex.assert_type([table.reward, table.outcome, table.valid], [float, float, bool])
    value = jnp.where(table.valid, table.outcome[:, 0], 0.0)
    if include_intermediate:
        total = segment_sum(table.reward, table.rollout, table.rollout.shape[0], mask=table.valid)
        value = jnp.where(table.valid, value + total[table.rollout], 0.0)
    return Credit(value=value, kind="return")


def intermediate(table: TransitionTable, evidence: Evidence) -> Credit:
    """A call's own intermediate reward and the final outcome: Automatic Intermediate Rewarding (arXiv 2508.03680, AIR).

      cᵢ,ₜ = rᵢ,ₜ + Rᵢ

    The paper describes where such rewards come from (the status of a tool call) and not how they combine with the outcome;
    the sum is our reading. Unlike `reward_to_go`, a call is not credited with what later calls earned on the way.

    Args:
      table: N transitions.
      evidence: not read.

    Returns:
      Credit of kind "return", f32[N]; 0 at padding.
    """
    chex.assert_equal_shape([table.rollout, table.reward, table.valid])
    chex.assert_shape(table.outcome, (*table.rollout.shape, None))
    chex.assert_type([table.reward, table.outcome, table.valid], [float, float, bool])
    return Credit(value=jnp.where(table.valid, table.reward + table.outcome[:, 0], 0.0), kind="return")


def last_only(table: TransitionTable, evidence: Evidence) -> Credit:
    """The call that ended the rollout gets all of it: what a reward at the last token says before any return is taken.

      cᵢ,ₜ = 1[t last] Rᵢ

    The credits of a rollout sum to its outcome. Calls before the last earn 0 whatever they did, and an advantage that takes a
    positive mean off pushes all of them down: a baseline to compare with rather than a method to train by.

    Args:
      table: N transitions; R is `outcome[:, 0]`. Intermediate rewards are not read.
      evidence: not read.

    Returns:
      Credit of kind "return", f32[N]; 0 at padding and at calls before the last. In a rollout of one call it is `identical`.
    """
    chex.assert_equal_shape([table.rollout, table.valid])
    chex.assert_shape(table.outcome, (*table.rollout.shape, None))
    chex.assert_type([table.rollout, table.outcome, table.valid], [int, float, bool])
    last = last_in_segment(table.rollout, table.valid)
    return Credit(value=jnp.where(last, table.outcome[:, 0], 0.0), kind="return")


def uniform_split(table: TransitionTable, evidence: Evidence) -> Credit:
    """Every call of a rollout gets an equal part of its outcome.

      cᵢ,ₜ = Rᵢ / Tᵢ,   Tᵢ calls of rollout i

    The credits of a rollout sum to its outcome. Long successes earn less a call than short ones, long failures lose less.

    Args:
      table: N transitions; R is `outcome[:, 0]`, 1/T is `weight`. Intermediate rewards are not read.
      evidence: not read.

    Returns:
      Credit of kind "return", f32[N]; 0 at padding. In a rollout of one call it is `identical`.
    """
    chex.assert_equal_shape([table.rollout, table.weight, table.valid])
    chex.assert_shape(table.outcome, (*table.rollout.shape, None))
    chex.assert_type([table.weight, table.outcome, table.valid], [float, float, bool])
    outcome, weight = (jnp.where(table.valid, x, 0.0) for x in (table.outcome[:, 0], table.weight))
    return Credit(value=outcome * weight, kind="return")
