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

    A call that is not trained is no decision of the policy's, and the critic doesn't say what it is worth: it is carried across.
    There V is what the rollout comes to from it, r′ₜ + γ Vₜ₊₁ with the value of the next trained call, δ is 0 and λ 1.

    Args:
      table: N transitions.
      evidence: needs `value`, f32[N]; not read at calls that are not trained.
      gamma: γ in [0, 1], per turn.
      lambda_: λ in [0, 1], per turn.

    Returns:
      Credit of kind "advantage", f32[N]; 0 at padding. No gradient flows into the critic.

    Raises:
      ValueError: there is no `evidence.value`.
    """
    value, rewards, trained = _values(table, evidence, gamma), turn_rewards(table), jnp.asarray(table.trainable)
    following = next_in_segment(value, table.rollout, table.valid)
    errors = jnp.where(trained, rewards + gamma * following - value, 0.0)
    factors = jnp.where(trained, jnp.float32(gamma * lambda_), jnp.float32(gamma))
    advantages = reverse_affine_scan(factors, errors, table.rollout, table.valid)
    return Credit(value=jnp.where(table.valid, advantages, 0.0), kind="advantage")


def lambda_return(table: TransitionTable, evidence: Evidence, *, gamma: float = 0.99, lambda_: float = 0.9) -> Credit:
    """What a rollout comes to from each call, as far as the critic is believed (the λ-return of TD(λ); Sutton and Barto 2018, §12.1).

      Gₜ = r′ₜ + γ [(1-λ) Vₜ₊₁ + λ Gₜ₊₁]

    which is Aₜ + Vₜ of `gae`. λ = 1 gives `reward_to_go` and reads no value where every call is trained, λ = 0 one reward and the
    critic's word. A return, so an advantage still has to take a baseline off it: a group's mean, where `gae` has taken Vₜ.

    Args, raises: as `gae`.

    Returns:
      Credit of kind "return", f32[N]; 0 at padding. No gradient flows into the critic.
    """
    return Credit(value=gae_value_target(table, evidence, gamma=gamma, lambda_=lambda_), kind="return")


def gae_value_target(table: TransitionTable, evidence: Evidence, *, gamma: float = 0.99, lambda_: float = 0.9) -> Array:
    """`lambda_return`, for the critic of `gae` to learn: Aₜ + Vₜ, taken before any scaling. f32[N]; 0 at padding."""
    return gae(table, evidence, gamma=gamma, lambda_=lambda_).value + _values(table, evidence, gamma)


def _values(table: TransitionTable, evidence: Evidence, gamma: float) -> jax.Array:
    """V before every call, without gradient; at one that is not trained what the rollout comes to from it."""
    if evidence.value is None:
        raise ValueError("gae needs evidence.value, a critic's value of the state before every call, but there is none.")
    chex.assert_shape(evidence.value, table.rollout.shape)
    chex.assert_type(evidence.value, float)
    said = table.valid & table.trainable
    known = jnp.where(said, evidence.value, turn_rewards(table)).astype(jnp.float32)
    factors = jnp.where(said, 0.0, jnp.float32(gamma))
    return jax.lax.stop_gradient(jnp.where(table.valid, reverse_affine_scan(factors, known, table.rollout, table.valid), 0.0))
