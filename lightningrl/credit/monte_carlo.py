"""Credit from rollouts that were started anew in the middle of recorded ones."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lightningrl.credit.returns import reward_to_go, turn_rewards
from lightningrl.segments import last_in_segment
from lightningrl.table import Credit, Evidence, TransitionTable


def vineppo(table: TransitionTable, evidence: Evidence, *, gamma: float = 1.0) -> Credit:
    """What a call changed in the mean return of rollouts started before and after it (VinePPO, arXiv 2410.01679, eq. for Â).

      Aₜ = r′ₜ + γ V(after t) - V(before t),   V(after the last call) = 0

    r′ are the intermediate rewards with the outcome on the last turn. Where V(after t) is V(before t+1) and γ = 1 the credits
    of a rollout sum to its return minus V(before its first call). "SPO chain" (arXiv 2505.23564) is the same difference between
    cut points of its own.

    Args:
      table: N transitions.
      evidence: needs `branch_value`, f32[N, 2], mean returns from the state before and after the transition. `branch_count`,
        f32[N, 2], is read if there: a state that no rollout was started from has no value, and its transitions get 0.
      gamma: γ in [0, 1], per turn.

    Returns:
      Credit of kind "advantage", f32[N]; 0 at padding. No gradient flows into the evidence.

    Raises:
      ValueError: there is no `evidence.branch_value`.
    """
    before, after, before_known, after_known = _branches(table, evidence, "vineppo")
    last = last_in_segment(table.rollout, table.valid)
    known = before_known & (after_known | last)
    advantage = turn_rewards(table) + gamma * jnp.where(last, 0.0, after) - before
    return Credit(value=jnp.where(known, advantage, 0.0), kind="advantage")


def counterfactual(table: TransitionTable, evidence: Evidence, *, gamma: float = 1.0) -> Credit:
    """What the rollout came to, minus what it comes to on average when this call is made anew (as COMA's, arXiv 1705.08926, eq. 4).

      Aₜ = Gₜ - V(before t)

    V is the mean return of rollouts that share everything before the call and none of what follows. They do not include
    the recorded rollout, so the baseline does not depend on the call that it is a baseline for: leave-one-out over
    rollouts of one state. COMA marginalises over the agent's action by a critic, here rollouts do it; what later calls did
    is in Gₜ too, so its variance is above that of `vineppo`, while V(after t) is not needed.

    Args:
      table: N transitions; G is `reward_to_go`.
      evidence: needs `branch_value`, of which [:, 0] is read; `branch_count` as in `vineppo`.
      gamma: γ in [0, 1], per turn.

    Returns:
      Credit of kind "advantage", f32[N]; 0 at padding and where no rollout was started. No gradient flows into the evidence.

    Raises:
      ValueError: there is no `evidence.branch_value`.
    """
    before, _, known, _ = _branches(table, evidence, "counterfactual")
    advantage = reward_to_go(table, evidence, gamma=gamma).value - before
    return Credit(value=jnp.where(known, advantage, 0.0), kind="advantage")


def _branches(table: TransitionTable, evidence: Evidence, name: str) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Values before and after, and where there are any."""
    chex.assert_equal_shape([table.rollout, table.valid])
    if evidence.branch_value is None:
        raise ValueError(f"{name} needs evidence.branch_value, mean returns of rollouts started around every call, but there is none.")
    shape = (*table.rollout.shape, 2)
    chex.assert_shape(evidence.branch_value, shape)
    chex.assert_type(evidence.branch_value, float)
    known = jnp.broadcast_to(jnp.asarray(table.valid)[:, None], shape)
    if evidence.branch_count is not None:
        chex.assert_shape(evidence.branch_count, shape)
        known = known & (jnp.where(known, evidence.branch_count, 0.0) > 0)
    value = jax.lax.stop_gradient(jnp.where(known, evidence.branch_value, 0.0))
    return value[:, 0], value[:, 1], known[:, 0], known[:, 1]
