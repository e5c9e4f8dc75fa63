"""Baselines and scales from the rollouts of the same task: GRPO, RLOO and their family."""

from __future__ import annotations

import chex
import jax

from lightningrl.advantages.units import Count, require_return, statistics_weights
from lightningrl.normalize import Degenerate, Scale, Singleton, group_normalize
from lightningrl.segments import EPSILON
from lightningrl.table import Credit, Evidence, TransitionTable


def group_norm(
    table: TransitionTable,
    credit: Credit,
    evidence: Evidence,
    *,
    count: Count = "rollouts",
    scale: Scale = "std",
    ddof: float = 1.0,
    eps: float = EPSILON,
    singleton: Singleton = "zero",
    degenerate: Degenerate = "zero",
) -> jax.Array:
    """Credit relative to its group (GRPO, arXiv 2402.03300, §4.1.2; with scale="none" Dr. GRPO, arXiv 2503.20783).

      A = (c - μg) / (σg + eps)

    The group is all runs of one task. Every rollout weighs one in μg and σg unless `count` is "transitions", which is what
    arXiv 2508.03680 does. Constant groups and groups of one rollout get exactly 0.

    Args:
      table: N transitions.
      credit: of kind "return".
      evidence: not read.
      count: what statistics count; `statistics_weights`.
      scale, ddof, eps, singleton, degenerate: `group_normalize`.

    Returns:
      f32[N]; 0 at padding, and with count="transitions" at calls that are not trained.

    Raises:
      ValueError: the credit is already an advantage, or a setting is unknown.
    """
    chex.assert_equal_shape([credit.value, table.rollout, table.group, table.valid])
    chex.assert_type([credit.value, table.valid], [float, bool])
    require_return(credit, "group_norm")
    return group_normalize(
        credit.value,
        table.group,
        statistics_weights(table, count),
        units=table.rollout,
        center="mean",
        scale=scale,
        ddof=ddof,
        eps=eps,
        singleton=singleton,
        degenerate=degenerate,
    )


def leave_one_out(
    table: TransitionTable,
    credit: Credit,
    evidence: Evidence,
    *,
    count: Count = "rollouts",
    singleton: Singleton = "zero",
) -> jax.Array:
    """Credit minus the mean of the *other* rollouts of the group (RLOO, arXiv 2402.14740).

      A = c - (Σ_{j∈g} wⱼcⱼ - Σ_{j∈i} wⱼcⱼ) / (Wg - Wi),   i the rollout;   with one call a rollout  (n cᵢ - Σ c) / (n - 1)

    A rollout is left out whole, all its calls, so that the baseline does not depend on the action it is a baseline for. With one
    call a rollout it is compared with what verl and TRL compute; the paper's text was not checked, nor has it rollouts of several
    calls as far as we know.

    Args, returns and raises as `group_norm`. Constant groups and groups of one rollout get exactly 0.
    """
    chex.assert_equal_shape([credit.value, table.rollout, table.group, table.valid])
    chex.assert_type([credit.value, table.valid], [float, bool])
    require_return(credit, "leave_one_out")
    return group_normalize(
        credit.value,
        table.group,
        statistics_weights(table, count),
        units=table.rollout,
        center="leave_one_out",
        scale="none",
        singleton=singleton,
    )
