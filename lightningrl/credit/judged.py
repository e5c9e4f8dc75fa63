"""Credit from scores that somebody else gave every call."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lightningrl.normalize import Scale, group_normalize
from lightningrl.segments import EPSILON
from lightningrl.table import Credit, Evidence, TransitionTable


def judged(
    table: TransitionTable,
    evidence: Evidence,
    *,
    outcome_weight: float = 0.0,
    scale: Scale = "std",
    ddof: float = 1.0,
    eps: float = EPSILON,
) -> Credit:
    """A judge's scores of the calls, relative to those of the group (as RULER of OpenPipe's ART; no paper).

      Aₜ = (jₜ - μ(j)) / (σ(j) + eps)  +  w (Rᵢ - μ(R)) / (σ(R) + eps)

    Both over the group, every rollout weighing one. What scale a judge scores on, and whether it drifts between tasks, drops
    out; how it spreads its scores within a group does not. A judge of whole rollouts gives all calls of one the same score.

    Args:
      table: N transitions; R is `outcome[:, 0]`.
      evidence: needs `judge`, f32[N], any finite scores.
      outcome_weight: w ≥ 0; 0 trains on the judge alone.
      scale, ddof, eps: `normalize.group_normalize`.

    Returns:
      Credit of kind "advantage", f32[N]; 0 at padding and in a group of one rollout. Scores that are all equal in a group add
      exactly 0. No gradient flows into the evidence.

    Raises:
      ValueError: there is no `evidence.judge`.
    """
    chex.assert_equal_shape([table.rollout, table.group, table.weight, table.valid])
    chex.assert_shape(table.outcome, (*table.rollout.shape, None))
    chex.assert_type([table.outcome, table.weight, table.valid], [float, float, bool])
    if evidence.judge is None:
        raise ValueError("judged needs evidence.judge, a score of every call, but there is none.")
    chex.assert_shape(evidence.judge, table.rollout.shape)
    chex.assert_type(evidence.judge, float)
    weights = jnp.where(table.valid, table.weight, 0.0)

    def standing(scores):
        return group_normalize(scores, table.group, weights, units=table.rollout, scale=scale, ddof=ddof, eps=eps)

    of_judge = standing(jax.lax.stop_gradient(jnp.where(table.valid, evidence.judge, 0.0)))
    return Credit(value=of_judge + outcome_weight * standing(table.outcome[:, 0]), kind="advantage")
