"""Several rewards at once, each normalised by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp

from lightningrl.advantages.units import require_return, statistics_weights
from lightningrl.normalize import Degenerate, Scale, Singleton, group_normalize
from lightningrl.segments import EPSILON, masked_max, masked_mean, masked_min, masked_var, safe_divide, safe_sqrt, segment_constant
from lightningrl.table import Array, Credit, Evidence, TransitionTable

BatchCount = Literal["rollouts", "transitions", "tokens"]


def gdpo(
    table: TransitionTable,
    credit: Credit,
    evidence: Evidence,
    *,
    weights: Sequence[float] | None = None,
    scale: Scale = "std",
    ddof: float = 1.0,
    eps: float = EPSILON,
    singleton: Singleton = "zero",
    degenerate: Degenerate = "zero",
    batch_count: BatchCount = "rollouts",
    batch_eps: float = EPSILON,
) -> jax.Array:
    """Each named outcome normalised within its group, then summed, then normalised over the batch (GDPO, arXiv 2601.05242, §3).

      Aₖ = (Rₖ - μg,ₖ) / (σg,ₖ + eps) for outcome k
      S = Σₖ wₖ Aₖ
      A = (S - μ) / (σ + batch_eps),   μ, σ over the batch

    Normalising the sum of rewards, as GRPO does, gives combinations with the same sum the same advantage, and lets the reward
    of largest spread decide; here each has its say. Outcomes are `table.outcome`, "reward" first: give it weight 0 if it is
    the sum of the others.

    The paper's batch norm counts rollouts. verl: eps=1e-6, singleton="raw", degenerate="formula", batch_count="tokens",
    batch_eps=0 (its 1e-8 stands under the root). TRL (`normalize_then_sum`): eps=1e-4, degenerate="formula",
    batch_count="rollouts", batch_eps=1e-4. Both are compared with what the package computes.

    Args:
      table: N transitions, D outcomes.
      credit: of kind "return"; its value is not read, rollouts earn their outcomes.
      evidence: not read.
      weights: D numbers wₖ, in the order of `table.outcome`; by default all 1.
      scale, ddof, eps, singleton, degenerate: of each outcome, as in `group_normalize`, and every rollout weighs one. ddof
        holds for the batch as well. With degenerate="zero" rollouts that no outcome tells from the others of their group,
        and a constant batch, get exactly 0; with "formula" the batch mean shifts them.
      batch_count: what μ and σ count: "rollouts", calls ("transitions"), or response "tokens", of calls that are trained.
      batch_eps: added to σ.

    Returns:
      f32[N]; 0 at padding, and at calls that batch_count does not count.

    Raises:
      ValueError: the credit is already an advantage, there are not D weights, or a setting is unknown.
    """
    chex.assert_equal_shape([table.rollout, table.group, table.num_tokens, table.weight, table.trainable, table.valid])
    chex.assert_shape(table.outcome, (*table.rollout.shape, None))
    chex.assert_type([table.outcome, table.num_tokens, table.weight, table.valid], [float, int, float, bool])
    require_return(credit, "gdpo")
    dimensions = table.outcome.shape[1]
    if weights is None:
        weights = (1.0,) * dimensions
    if len(weights) != dimensions:
        raise ValueError(f"gdpo needs a weight for each outcome: there are {len(weights)} weights and {dimensions} outcomes.")
    ones = statistics_weights(table, "rollouts")
    total = jnp.zeros(table.rollout.shape, jnp.float32)
    silent = jnp.ones(table.rollout.shape, bool)
    for k, weight in enumerate(weights):
        total += weight * group_normalize(
            table.outcome[:, k],
            table.group,
            ones,
            units=table.rollout,
            scale=scale,
            ddof=ddof,
            eps=eps,
            singleton=singleton,
            degenerate=degenerate,
        )
        if weight != 0.0:
            silent &= _constant(table, table.outcome[:, k])
    counted = _batch_weights(table, batch_count)
    used = counted > 0
    deviation = safe_sqrt(masked_var(total, used, counted, ddof=ddof))
    result = safe_divide(total - masked_mean(total, used, counted), deviation + batch_eps)
    if degenerate == "zero":
        heard = jnp.logical_and(_constant(table, table.rollout), singleton == "raw")
        constant = masked_min(total, used) == masked_max(total, used)
        result = jnp.where(jnp.logical_or(silent & ~heard, constant), 0.0, result)
    return jnp.where(used, result, 0.0)


def _constant(table: TransitionTable, values: Array) -> jax.Array:
    """bool[N]: all of the group have the same value."""
    size = table.group.shape[0]
    return segment_constant(jnp.asarray(values), table.group, size, mask=table.valid)[table.group]


def _batch_weights(table: TransitionTable, count: BatchCount) -> jax.Array:
    if count not in get_args(BatchCount):
        raise ValueError(f"gdpo has no batch_count {count!r}: choose one of {', '.join(get_args(BatchCount))}.")
    if count == "tokens":
        return jnp.where(jnp.logical_and(table.valid, table.trainable), table.num_tokens, 0).astype(jnp.float32)
    return statistics_weights(table, count)
