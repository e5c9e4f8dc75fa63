"""Baselines that are no group mean and scales that are no standard deviation: `(table, credit, evidence) -> f32[N]`."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp

from lightningrl.advantages.group import group_norm
from lightningrl.advantages.units import Count, require_return, statistics_weights
from lightningrl.normalize import Scale, group_normalize
from lightningrl.segments import EPSILON, masked_count, safe_divide, segment_constant, segment_count, segment_mean
from lightningrl.table import Array, Credit, Evidence, TransitionTable

Informative = Literal["groups", "nonzero"]
Steps = Literal["batch", "rollouts"]


def remax(table: TransitionTable, credit: Credit, evidence: Evidence) -> jax.Array:
    """Credit minus what the greedy rollout of the same task earned (ReMax, arXiv 2310.10505, §4.1).

      A = c - R_greedy

    Needs no group: one sampled rollout and a greedy one do. The greedy rollout is not trained on.

    Args:
      table: N transitions.
      credit: of kind "return".
      evidence: needs `greedy_reward`, f32[N].

    Returns:
      f32[N]; 0 at padding. Groups of one and constant groups are compared with the greedy rollout like any other.

    Raises:
      ValueError: the credit is already an advantage, or there is no `evidence.greedy_reward`.
    """
    return _less(table, credit, evidence.greedy_reward, "remax", "greedy_reward, the reward of the greedy rollout of every task")


def role_baseline(table: TransitionTable, credit: Credit, evidence: Evidence) -> jax.Array:
    """Credit minus the running mean reward of the role that acted: role-conditioned advantages (RAE, SPIRAL, arXiv 2506.24119).

      A = c - b_{role}

    Roles of a game have different chances; one baseline for all would praise whoever the rules favour. `rae_update` moves
    b after the batch has been scored, so that no rollout is compared with itself.

    Args:
      table: N transitions.
      credit: of kind "return".
      evidence: needs `role_baseline`, f32[N], b of each transition's role as it was before this batch.

    Returns:
      f32[N]; 0 at padding.

    Raises:
      ValueError: the credit is already an advantage, or there is no `evidence.role_baseline`.
    """
    return _less(table, credit, evidence.role_baseline, "role_baseline", "role_baseline, the running mean reward of every role")


def rae_update(baseline: Array, table: TransitionTable, decay: float, *, values: Array | None = None, steps: Steps = "batch") -> jax.Array:
    """The running mean reward of every role after a batch: state in, state out (RAE, SPIRAL, arXiv 2506.24119).

      b ← α b + (1 - α) R̄,   R̄ the mean over the batch's rollouts in which the role acted

    The paper moves b once a rollout, in order, and we are not sure whether before or after scoring it. Here a batch is
    scored first and then moves b once, or with steps="rollouts" as far as its n rollouts would, whatever their order:
    α becomes αⁿ. Every rollout weighs one, however many calls the role made in it.

    Args:
      baseline: f32[roles], b, at first 0; indexed by `table.role`.
      table: N transitions.
      decay: α in [0, 1]; the paper's is 0.95, for one step a rollout.
      values: f32[N], what each transition earned, where roles earn different things; by default the rollout's reward.
      steps: "batch" or "rollouts".

    Returns:
      f32[roles]; a role that did not act keeps its b.

    Raises:
      ValueError: unknown steps.
    """
    chex.assert_rank(baseline, 1)
    chex.assert_equal_shape([table.rollout, table.role, table.valid])
    chex.assert_shape(table.outcome, (*table.rollout.shape, None))
    x = table.outcome[:, 0] if values is None else values
    chex.assert_shape(x, table.rollout.shape)
    chex.assert_type([baseline, x, table.role, table.valid], [float, float, int, bool])
    if steps not in get_args(Steps):
        raise ValueError(f"rae_update has no steps {steps!r}: choose one of {', '.join(get_args(Steps))}.")
    roles, size = baseline.shape[0], table.rollout.shape[0]
    pair = jnp.asarray(table.rollout) * roles + table.role
    mean = segment_mean(x, pair, size * roles, mask=table.valid)
    acted = segment_count(pair, size * roles, mask=table.valid) > 0
    role = jnp.arange(size * roles, dtype=jnp.int32) % roles
    rollouts = segment_count(role, roles, mask=acted)
    kept = jnp.where(rollouts > 0, decay if steps == "batch" else decay**rollouts, 1.0)
    return kept * baseline + (1.0 - kept) * segment_mean(mean, role, roles, mask=acted)


def opo(table: TransitionTable, credit: Credit, evidence: Evidence) -> jax.Array:
    """Credit minus the length-weighted mean of its group (OPO, arXiv 2505.23585, §3).

      A = c - Σᵢ Lᵢ cᵢ / Σᵢ Lᵢ,   Lᵢ the response tokens of rollout i

    The baseline of least variance if tokens' gradients are orthogonal and of one norm, so that a rollout's gradient grows with
    its length. Tokens of calls that are not trained count towards L as well. Where a rollout's calls earned differently, each
    is weighed by its own tokens; the paper has one reward a response.

    Args:
      table: N transitions.
      credit: of kind "return".
      evidence: not read.

    Returns:
      f32[N]; 0 at padding and at calls without tokens. Constant groups and groups of one rollout get exactly 0.

    Raises:
      ValueError: the credit is already an advantage.
    """
    chex.assert_equal_shape([credit.value, table.rollout, table.group, table.num_tokens, table.valid])
    chex.assert_type([credit.value, table.num_tokens, table.valid], [float, int, bool])
    require_return(credit, "opo")
    lengths = jnp.where(table.valid, table.num_tokens, 0).astype(jnp.float32)
    return group_normalize(credit.value, table.group, lengths, units=table.rollout, scale="none")


def gpg(
    table: TransitionTable,
    credit: Credit,
    evidence: Evidence,
    *,
    count: Count = "rollouts",
    informative: Informative = "groups",
    scale: Scale = "none",
    eps: float = EPSILON,
) -> jax.Array:
    """Credit minus group mean, scaled up for what the batch has no signal about (GPG, arXiv 2504.02546, §3).

      A = α (c - μg) / F,   α = B / #informative,   F = 1, or σg + eps with scale="std"

    B is the number of rollouts. Those of constant groups have no gradient but do count in a mean over the batch; α undoes
    that. verl counts as informative every rollout whose reward is not 0: the same only by accident, and different again when
    a constant is added to all rewards.

    Args:
      table: N transitions.
      credit: of kind "return".
      evidence: not read.
      count: what B and μg count; `statistics_weights`.
      informative: "groups", rollouts of groups that are not constant and not of one; or "nonzero", verl's.
      scale, eps: F.

    Returns:
      f32[N]; 0 at padding. Constant groups and groups of one rollout get exactly 0, and so does all if nothing is informative.

    Raises:
      ValueError: the credit is already an advantage, or a setting is unknown.
    """
    chex.assert_equal_shape([credit.value, table.rollout, table.group, table.valid])
    chex.assert_type([credit.value, table.valid], [float, bool])
    require_return(credit, "gpg")
    if informative not in get_args(Informative):
        raise ValueError(f"gpg has no informative {informative!r}: choose one of {', '.join(get_args(Informative))}.")
    weights = statistics_weights(table, count)
    used = weights > 0
    if informative == "nonzero":
        counted = jnp.logical_and(used, jnp.where(used, credit.value, 0.0) != 0.0)
    else:
        counted = jnp.logical_and(used, _varies(credit.value, table, used))
    alpha = safe_divide(masked_count(used, weights), masked_count(counted, weights))
    return alpha * group_norm(table, credit, evidence, count=count, scale=scale, eps=eps)


def maxrl(table: TransitionTable, credit: Credit, evidence: Evidence, *, count: Count = "rollouts", eps: float = 0.0) -> jax.Array:
    """Credit minus group mean, in units of the group mean (MaxRL, arXiv 2602.02710).

      A = (c - μg) / (μg + eps) where μg > 0, else 0

    With rewards 0 and 1, μg estimates the success rate p, and ∇p / p = ∇log p: maximum likelihood of success, in which rare
    successes weigh more. Checked against the authors' published analysis script, which has this form with an epsilon; that
    the paper's own is without one, and what it does for rewards that are not 0 or 1, is unsure. Negative rewards make the
    unit meaningless, and groups of mean ≤ 0 get 0.

    Args:
      table: N transitions.
      credit: of kind "return", not negative.
      evidence: not read.
      count: what μg counts; `statistics_weights`.
      eps: added to the divisor.

    Returns:
      f32[N]; 0 at padding. Constant groups and groups of one rollout get exactly 0.

    Raises:
      ValueError: the credit is already an advantage, or an unknown count.
    """
    chex.assert_equal_shape([credit.value, table.rollout, table.group, table.valid])
    chex.assert_type([credit.value, table.valid], [float, bool])
    centred = group_norm(table, credit, evidence, count=count, scale="none")
    mean = segment_mean(credit.value, table.group, table.group.shape[0], weights=statistics_weights(table, count))[table.group]
    return jnp.where(mean > 0.0, safe_divide(centred, jnp.where(mean > 0.0, mean, 0.0) + eps), 0.0)


def accepted(table: TransitionTable, credit: Credit, evidence: Evidence, *, threshold: float = 0.5) -> jax.Array:
    """1 for what earned enough to be imitated, else 0: rejection sampling (RFT, arXiv 2308.01825, §3.3; RAFT, 2304.06767).

      A = 1{c ≥ threshold}

    With the weighted likelihood as loss this is supervised training on the rollouts that succeeded: nothing is learned from
    the others, and nothing is compared within a group.

    Args:
      table: N transitions.
      credit: of kind "return".
      evidence: not read.
      threshold: in units of the credit.

    Returns:
      f32[N]; 0 at padding. Groups of one and constant groups are accepted or not like any other.

    Raises:
      ValueError: the credit is already an advantage.
    """
    chex.assert_equal_shape([credit.value, table.rollout, table.valid])
    chex.assert_type([credit.value, table.valid], [float, bool])
    require_return(credit, "accepted")
    return jnp.where(table.valid, credit.value >= threshold, False).astype(jnp.float32)


def _less(table: TransitionTable, credit: Credit, baseline: Array | None, name: str, need: str) -> jax.Array:
    chex.assert_equal_shape([credit.value, table.rollout, table.valid])
    chex.assert_type([credit.value, table.valid], [float, bool])
    require_return(credit, name)
    if baseline is None:
        raise ValueError(f"{name} needs evidence.{need}, but there is none.")
    chex.assert_equal_shape([baseline, table.rollout])
    chex.assert_type(baseline, float)
    return jnp.where(table.valid, credit.value, 0.0) - jnp.where(table.valid, baseline, 0.0)


def _varies(values: Array, table: TransitionTable, used: jax.Array) -> jax.Array:
    """bool[N]: the entry's group has several rollouts, and not all of its values are equal."""
    size = table.group.shape[0]
    several, different = (
        ~segment_constant(x, table.group, size, mask=used)[table.group] for x in (jnp.asarray(table.rollout), jnp.asarray(values))
    )
    return jnp.logical_and(several, different)
