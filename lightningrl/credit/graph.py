"""Credit from the graph that the rollouts of a group make together: states are nodes, calls are edges."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lightningrl.credit.returns import turn_rewards
from lightningrl.normalize import Scale, group_normalize
from lightningrl.segments import EPSILON, joint_ids, last_in_segment, segment_max, segment_mean, segment_sum
from lightningrl.table import Credit, Evidence, TransitionTable


def salt(table: TransitionTable, evidence: Evidence, *, scale: Scale = "std", ddof: float = 1.0, eps: float = EPSILON) -> Credit:
    """Steps that several rollouts of a group share get the mean of those rollouts' advantages (SALT, arXiv 2510.20022).

      Aᵢ = (Rᵢ - μ(R)) / (σ(R) + eps)                       over the rollouts of the group
      cᵢ,ₜ = mean of A over the calls with the same (state, action, next state),   Aᵢ for a call that is the only such one

    A step that good and bad rollouts both took says nothing for or against it; what they did differently keeps its verdict. The
    credits of a group sum to the same as without merging. A rollout that takes an edge twice counts twice in its mean, and
    last calls merge where state and action are equal: there the end is the next state. Both are our reading; the paper was
    read in its abstract only.

    Args:
      table: N transitions; equal states by `anchor[:, 0]` and `next_anchor`, equal actions by `action`; R is `outcome[:, 0]`.
      evidence: not read.
      scale, ddof, eps: `normalize.group_normalize`.

    Returns:
      Credit of kind "advantage", f32[N]; 0 at padding. A constant group and a group of one rollout get exactly 0.
    """
    chex.assert_equal_shape([table.rollout, table.group, table.weight, table.action, table.next_anchor, table.valid])
    chex.assert_shape([table.outcome, table.anchor], (*table.rollout.shape, None))
    chex.assert_type([table.outcome, table.anchor, table.weight, table.valid], [float, int, float, bool])
    weights = jnp.where(table.valid, table.weight, 0.0)
    advantage = group_normalize(table.outcome[:, 0], table.group, weights, units=table.rollout, scale=scale, ddof=ddof, eps=eps)
    steps = joint_ids(table.valid, table.anchor[:, 0], table.action, table.next_anchor)
    merged = segment_mean(advantage, steps, steps.shape[0], mask=table.valid)[steps]
    return Credit(value=jnp.where(table.valid, merged, 0.0), kind="advantage")


def state_values(table: TransitionTable, *, gamma: float = 0.95, sweeps: int = 64) -> jax.Array:
    """The best that any rollout of the group got to from a state, discounted by the steps to it (RewardFlow, arXiv 2603.18859).

      V(s) ← max(r(s), γ max V(s′) over the calls s → s′)

    r(s) is the largest intermediate reward with which a call arrived at s, 0 where none did; the end of a rollout is a state
    of its own, worth the last intermediate reward and the outcome. Cycles do no harm. A max is optimistic where tools are
    stochastic: one lucky rollout is taken for what the state is worth.

    Args:
      table: N transitions.
      gamma: γ in [0, 1].
      sweeps: how often; enough if no best path to an end is longer. The authors take 1000.

    Returns:
      f32[N], the value of the state with anchor id n at n; 0 for ids that no state has.
    """
    chex.assert_equal_shape([table.rollout, table.reward, table.next_anchor, table.valid])
    chex.assert_shape([table.outcome, table.anchor], (*table.rollout.shape, None))
    chex.assert_type([table.outcome, table.anchor, table.reward, table.valid], [float, int, float, bool])
    size = table.rollout.shape[0]
    last, states = last_in_segment(table.rollout, table.valid), table.anchor[:, 0]
    goes_on = jnp.logical_and(table.valid, ~last)
    following = jnp.where(goes_on, table.next_anchor, 0)
    end = turn_rewards(table)
    floor = segment_max(jnp.where(goes_on, table.reward, 0.0), following, size, mask=goes_on)

    def sweep(_, value):
        ahead = gamma * jnp.where(last, end, value[following])
        best = segment_max(ahead, states, size, mask=table.valid, empty=-jnp.inf)
        return jnp.maximum(floor, best)

    value = jax.lax.fori_loop(0, sweeps, sweep, floor)
    known = segment_sum(table.valid.astype(jnp.float32), states, size, mask=table.valid) > 0
    return jnp.where(known, value, 0.0)


def rewardflow(
    table: TransitionTable,
    evidence: Evidence,
    *,
    gamma: float = 0.95,
    sweeps: int = 64,
    episode_weight: float = 1.0,
    step_weight: float = 1.0,
    scale: Scale = "none",
    ddof: float = 1.0,
    eps: float = EPSILON,
) -> Credit:
    """Did a call lead to a better state than the others made in the same one (RewardFlow, arXiv 2603.18859)?

      dᵢ,ₜ = V(state after t) - V(state before t),   V by `state_values`, after the last call what it earned with the outcome
      Aᵢ,ₜ = wᴱ (Rᵢ - μ(R)) / F  over the rollouts of the group  +  wˢ (dᵢ,ₜ - μ(d)) / F  over the calls made in the same state

    Read from the authors' code, in which the last call counts its reward alone and not the difference; with differences
    throughout, a last call and one that goes on can be compared in one state. Their statistics of R count calls, ours rollouts.

    Args:
      table: N transitions; R is the sum of all rewards of the rollout.
      evidence: not read.
      gamma, sweeps: `state_values`.
      episode_weight, step_weight: wᴱ, wˢ ≥ 0.
      scale: "none" is F = 1; "std" the standard deviation plus eps.
      ddof, eps: of F.

    Returns:
      Credit of kind "advantage", f32[N]; 0 at padding. A group of one rollout, a constant group, and a state that was seen once
      or left for equally good ones add exactly 0.
    """
    chex.assert_equal_shape([table.rollout, table.group, table.weight, table.reward, table.next_anchor, table.valid])
    chex.assert_shape([table.outcome, table.anchor], (*table.rollout.shape, None))
    chex.assert_type([table.outcome, table.anchor, table.weight, table.valid], [float, int, float, bool])
    weights, every_call = jnp.where(table.valid, table.weight, 0.0), table.valid.astype(jnp.float32)
    rewards, last = turn_rewards(table), last_in_segment(table.rollout, table.valid)
    total = segment_sum(rewards, table.rollout, rewards.shape[0], mask=table.valid)[table.rollout]
    of_episode = group_normalize(total, table.group, weights, units=table.rollout, scale=scale, ddof=ddof, eps=eps)
    value = state_values(table, gamma=gamma, sweeps=sweeps)
    after = jnp.where(last, rewards, value[jnp.where(last | ~table.valid, 0, table.next_anchor)])
    gain = after - value[table.anchor[:, 0]]
    of_step = group_normalize(gain, table.anchor[:, 0], every_call, scale=scale, ddof=ddof, eps=eps)
    return Credit(value=episode_weight * of_episode + step_weight * of_step, kind="advantage")
