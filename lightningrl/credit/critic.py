"""Credit measured against a critic's values of the states between calls."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lightningrl.credit.returns import turn_rewards
from lightningrl.segments import next_in_segment, reverse_affine_scan
from lightningrl.table import Array, Credit, Evidence, TransitionTable


def gae(table: TransitionTable, evidence: Evidence, *, gamma: float = 0.99, lambda_: float = 0.9) -> Credit:
    """Generalised advantage estimation over turns (Turn-PPO, arXiv 2512.17008; GAE, arXiv 1506.02438, eq. 16).

      δₜ = r′ₜ + γ Vₜ₊₁ - Vₜ
      Aₜ = δₜ + γλ Aₜ₊₁

    r′ are the intermediate rewards with the outcome on the last turn, Vₜ is the value of the state before call t (read at
    the last token of its prompt), and V is 0 after the last call. λ = 1 gives the return minus the value, λ = 0 the
    one-step error. The defaults are the paper's.

    Args:
      table: N transitions.
      evidence: needs `value`, f32[N].
      gamma: γ in [0, 1], per turn.
      lambda_: λ in [0, 1], per turn.

    Returns:
      Credit of kind "advantage", f32[N]; 0 at padding. No gradient flows into the critic.

    Raises:
      ValueError: there is no `evidence.value`.
    """
    value = _values(table, evidence)
    following = next_in_segment(value, table.rollout, table.valid)
    errors = turn_rewards(table) + gamma * following - value
    advantages = reverse_affine_scan(jnp.full_like(errors, gamma * lambda_), errors, table.rollout, table.valid)
    return Credit(value=jnp.where(table.valid, advantages, 0.0), kind="advantage")


def gae_value_target(table: TransitionTable, evidence: Evidence, *, gamma: float = 0.99, lambda_: float = 0.9) -> Array:
    """The λ-return that goes with `gae`, for the critic to learn: Aₜ + Vₜ, taken before any scaling. f32[N]; 0 at padding."""
    return gae(table, evidence, gamma=gamma, lambda_=lambda_).value + _values(table, evidence)


def _values(table: TransitionTable, evidence: Evidence) -> jax.Array:
    if evidence.value is None:
        raise ValueError("gae needs evidence.value, a critic's value of the state before every call, but there is none.")
    chex.assert_shape(evidence.value, table.rollout.shape)
    chex.assert_type(evidence.value, float)
    return jax.lax.stop_gradient(jnp.where(table.valid, evidence.value, 0.0))
