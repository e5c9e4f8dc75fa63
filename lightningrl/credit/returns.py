"""Credit from the rewards that come after a call."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lightningrl.normalize import Scale, group_normalize
from lightningrl.segments import EPSILON, joint_ids, last_in_segment, reverse_affine_scan
from lightningrl.table import Credit, Evidence, TransitionTable


def turn_rewards(table: TransitionTable) -> jax.Array:
    """What the environment paid at each turn: its intermediate reward, and at the rollout's last turn the outcome too.

      r′ᵢ,ₜ = rᵢ,ₜ + 1[t last] Rᵢ

    f32[N]; 0 at padding. The last turn is found by rollout ids, never by where rewards are.
    """
    chex.assert_equal_shape([table.rollout, table.reward, table.valid])
    chex.assert_shape(table.outcome, (*table.rollout.shape, None))
    chex.assert_type([table.rollout, table.reward, table.outcome, table.valid], [int, float, float, bool])
    last = last_in_segment(table.rollout, table.valid)
    return jnp.where(table.valid, table.reward, 0.0) + jnp.where(last, table.outcome[:, 0], 0.0)


def reward_to_go(table: TransitionTable, evidence: Evidence, *, gamma: float = 1.0) -> Credit:
    """Discounted reward-to-go, one discount a turn: a call is not blamed for what came before it.

      Gᵢ,ₜ = Σₛ≥ₜ γˢ⁻ᵗ r′ᵢ,ₛ,   r′ the intermediate rewards with the outcome on the last turn.

    With γ = 1 and no intermediate rewards this is `identical`. With γ < 1 early calls of a long success earn less than
    late ones; under an advantage that divides by the group's standard deviation a small γ effect may become all there is.

    Args:
      table: N transitions.
      evidence: not read.
      gamma: γ in [0, 1], per turn, whatever the number of tokens.

    Returns:
      Credit of kind "return", f32[N]; 0 at padding.
    """
    chex.assert_equal_shape([table.rollout, table.reward, table.valid])
    chex.assert_shape(table.outcome, (*table.rollout.shape, None))
    rewards = turn_rewards(table)
    returns = reverse_affine_scan(jnp.full_like(rewards, gamma), rewards, table.rollout, table.valid)
    return Credit(value=jnp.where(table.valid, returns, 0.0), kind="return")


def potential_difference(
    table: TransitionTable, evidence: Evidence, *, gamma: float = 1.0, lambda_: float = 1.0, terminal_zero: bool = True
) -> Credit:
    """Rewards shaped by a potential of the states, and their discounted sum (Ng, Harada, Russell 1999, theorem 1).

      r″ₜ = r′ₜ + γ Φ(after t) - Φ(before t),   Φ(after the last call) = 0
      cₜ = Σₛ≥ₜ (γλ)ˢ⁻ᵗ r″ₛ

    r′ are the intermediate rewards with the outcome on the last turn. Where Φ(after t) = Φ(before t+1), λ = 1 telescopes to
    Gₜ - Φ(before t), `reward_to_go` less a function of the state: no policy gets better or worse by it in expectation, which
    is the theorem. λ = 0 credits a call with its own shaped reward alone: with Φ the value function the one-step error of
    `gae`, with any other Φ a bias towards what Φ likes.

    Args:
      table: N transitions.
      evidence: needs `potential`, f32[N, 2]: Φ of the state before and after the transition.
      gamma: γ in [0, 1], per turn; the γ of the returns, else the theorem does not hold.
      lambda_: λ in [0, 1], per turn.
      terminal_zero: whether Φ after a rollout's last call counts as 0, whatever the evidence says, as the theorem needs when
        rollouts end; otherwise the evidence is read there too, and a rollout is paid Φ of the state that it ends in.

    Returns:
      Credit of kind "return", f32[N]; 0 at padding. No gradient flows into the potential.

    Raises:
      ValueError: there is no `evidence.potential`.
    """
    chex.assert_equal_shape([table.rollout, table.reward, table.valid])
    chex.assert_shape(table.outcome, (*table.rollout.shape, None))
    if evidence.potential is None:
        raise ValueError("potential_difference needs evidence.potential, Φ of the state before and after every call, but there is none.")
    chex.assert_shape(evidence.potential, (*table.rollout.shape, 2))
    chex.assert_type(evidence.potential, float)
    before, after = (jax.lax.stop_gradient(jnp.where(table.valid, evidence.potential[:, i], 0.0)) for i in (0, 1))
    if terminal_zero:
        after = jnp.where(last_in_segment(table.rollout, table.valid), 0.0, after)
    rewards = turn_rewards(table) + gamma * after - before
    returns = reverse_affine_scan(jnp.full_like(rewards, gamma * lambda_), rewards, table.rollout, table.valid)
    return Credit(value=jnp.where(table.valid, returns, 0.0), kind="return")


def mt_grpo(
    table: TransitionTable,
    evidence: Evidence,
    *,
    turn_weight: float = 1.0,
    scale: Scale = "std",
    ddof: float = 1.0,
    eps: float = EPSILON,
) -> Credit:
    """Outcome and turn rewards, each relative to the group on its own (MT-GRPO, arXiv 2505.11821).

      Aᴼᵢ = (Rᵢ - μ(R)) / (σ(R) + eps)                  over the rollouts of the group
      Aᵀᵢ,ₜ = (rᵢ,ₜ - μₜ(r)) / (σₜ(r) + eps)            over the calls at turn t of the group that are not the last of theirs
      Aᵢ,ₜ = Aᴼᵢ + w Aᵀᵢ,ₜ  before the last call,   Aᴼᵢ  at the last

    Stated for two segments, before and after one tool result; with two calls a rollout this is that. For more calls the turn
    reward of each is compared at the same turn, which is our reading. The authors' code has eps = 10⁻⁴, and gives a rollout
    without a tool result the advantage of the summed rewards, where this gives Aᴼ. The formula was read in that code; the
    paper's text was not checked.

    Args:
      table: N transitions; r is `reward`, R is `outcome[:, 0]`.
      evidence: not read.
      turn_weight: w ≥ 0.
      scale, ddof, eps: `normalize.group_normalize`.

    Returns:
      Credit of kind "advantage", f32[N]; 0 at padding. Aᴼ is 0 in a constant group and in a group of one rollout, Aᵀ where
      all or the only calls of that turn earned the same.
    """
    chex.assert_equal_shape([table.rollout, table.group, table.turn, table.reward, table.weight, table.valid])
    chex.assert_shape(table.outcome, (*table.rollout.shape, None))
    chex.assert_type([table.reward, table.outcome, table.weight, table.valid], [float, float, float, bool])
    weights = jnp.where(table.valid, table.weight, 0.0)
    of_outcome = group_normalize(table.outcome[:, 0], table.group, weights, units=table.rollout, scale=scale, ddof=ddof, eps=eps)
    early = jnp.logical_and(table.valid, ~last_in_segment(table.rollout, table.valid))
    turns = joint_ids(early, table.group, table.turn)
    of_turn = group_normalize(table.reward, turns, early.astype(jnp.float32), scale=scale, ddof=ddof, eps=eps)
    return Credit(value=of_outcome + turn_weight * of_turn, kind="advantage")
