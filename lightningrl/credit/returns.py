"""Credit from the rewards that come after a call."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lightningrl.segments import last_in_segment, reverse_affine_scan
from lightningrl.table import Credit, Evidence, TransitionTable


def turn_rewards(table: TransitionTable) -> jax.Array:
    """What the environment paid at each turn: its intermediate reward, and at the rollout's last turn the outcome too.

      r′ᵢ,ₜ = rᵢ,ₜ + 1[t last] Rᵢ

    f32[N]; 0 at padding. The last turn is found by rollout ids, never by where rewards are.
    """
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
    rewards = turn_rewards(table)
    returns = reverse_affine_scan(jnp.full_like(rewards, gamma), rewards, table.rollout, table.valid)
    return Credit(value=jnp.where(table.valid, returns, 0.0), kind="return")
