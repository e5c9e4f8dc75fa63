"""Credit from log-probs under another prompt: what is likelier once the outcome, or the answer, is known."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lightningrl.credit.returns import reward_to_go
from lightningrl.normalize import Scale, group_normalize
from lightningrl.segments import EPSILON, last_in_segment, reverse_affine_scan, safe_divide
from lightningrl.table import Credit, Evidence, TransitionTable


def hindsight(
    table: TransitionTable, evidence: Evidence, *, gamma: float = 1.0, max_log_ratio: float = 3.0, per_token: bool = False
) -> Credit:
    """Was the call likelier, seen from its return (return-conditional hindsight credit, arXiv 1912.02503, theorem 2)?

      Aₜ = (1 - π(aₜ | xₜ) / h(aₜ | xₜ, Zₜ)) Zₜ,   Zₜ the discounted reward-to-go

    A call that the outcome makes no likelier had no part in it and gets 0; one that is likelier in hindsight gets a part of Z of
    the sign of Z; one that is less likely gets the other sign, up to (1 - e^c) Z. The log-ratio is clamped to ±c, and one of
    whole responses leaves any c soon: `per_token` takes its mean over the response instead, which is no longer the theorem's.

    Args:
      table: N transitions.
      evidence: needs `hindsight_logp` and `response_logp`, f32[N], both sums over the response.
      gamma: γ in [0, 1], per turn.
      max_log_ratio: c > 0.
      per_token: whether the log-ratio is divided by `num_tokens`.

    Returns:
      Credit of kind "advantage", f32[N]; 0 at padding and where Z is 0. No gradient flows into the evidence.

    Raises:
      ValueError: one of the two log-probs is missing.
    """
    log_ratio = _hindsight_log_ratio(table, evidence, "hindsight", per_token=per_token)
    share = 1.0 - jnp.exp(jnp.clip(-log_ratio, -max_log_ratio, max_log_ratio))
    return Credit(value=share * reward_to_go(table, evidence, gamma=gamma).value, kind="advantage")


def hcapo(
    table: TransitionTable,
    evidence: Evidence,
    *,
    gamma: float = 1.0,
    step_weight: float = 1.0,
    ratio_low: float = 0.8,
    ratio_high: float = 1.2,
    per_token: bool = True,
    scale: Scale = "std",
    ddof: float = 1.0,
    eps: float = EPSILON,
) -> Credit:
    """Returns weighted by how much likelier the call is in hindsight, relative to the group (after HCAPO, arXiv 2603.08754).

      ρₜ = clip(h(aₜ | xₜ, outcome) / π(aₜ | xₜ), low, high),   Qₜ = ρₜ Gₜ
      Aₜ = (Rᵢ - μ(R)) / (σ(R) + eps)  over the rollouts  +  w (Qₜ - μ(Q)) / (σ(Q) + eps)  over all calls of the group

    The paper was read in its abstract only: that hindsight ratios refine the step's Q, and that the advantage has two scales.
    The clip, the mean over tokens in ρ and the statistics of Q, in which every call weighs one, are our reading.

    Args:
      table: N transitions; R is `outcome[:, 0]`, G the discounted reward-to-go.
      evidence: needs `hindsight_logp` and `response_logp`, f32[N], both sums over the response.
      gamma: γ in [0, 1], per turn.
      step_weight: w ≥ 0.
      ratio_low, ratio_high: 0 < low ≤ 1 ≤ high.
      per_token: whether the log-ratio is divided by `num_tokens`.
      scale, ddof, eps: `normalize.group_normalize`.

    Returns:
      Credit of kind "advantage", f32[N]; 0 at padding and in a group of one rollout. No gradient flows into the evidence.

    Raises:
      ValueError: one of the two log-probs is missing.
    """
    chex.assert_equal_shape([table.rollout, table.group, table.weight, table.valid])
    chex.assert_shape(table.outcome, (*table.rollout.shape, None))
    log_ratio = _hindsight_log_ratio(table, evidence, "hcapo", per_token=per_token)
    ratio = jnp.exp(jnp.clip(log_ratio, jnp.log(ratio_low), jnp.log(ratio_high)))
    refined = ratio * reward_to_go(table, evidence, gamma=gamma).value
    weights, every_call = jnp.where(table.valid, table.weight, 0.0), table.valid.astype(jnp.float32)
    of_episode = group_normalize(table.outcome[:, 0], table.group, weights, units=table.rollout, scale=scale, ddof=ddof, eps=eps)
    of_step = group_normalize(refined, table.group, every_call, units=table.rollout, scale=scale, ddof=ddof, eps=eps)
    return Credit(value=of_episode + step_weight * of_step, kind="advantage")


def igpo(
    table: TransitionTable,
    evidence: Evidence,
    *,
    gamma: float = 1.0,
    scale: Scale = "std",
    ddof: float = 1.0,
    eps: float = EPSILON,
) -> Credit:
    """How much a call raised the probability of the true answer (information gain, IGPO, arXiv 2510.14967).

      rₜ = p(after t) - p(before t) before the last call,   R at the last;   p = exp of the answer's mean log-prob a token
      r̃ = (r - μ) / (σ + eps)  over all calls of the group,   Aₜ = Σₛ≥ₜ γˢ⁻ᵗ r̃ₛ

    Gains and outcomes are normalised together, as in the paper's code, and every call weighs one in μ and σ. The sum after the
    normalisation favours long rollouts where r̃ is positive early on; γ < 1 bounds it.

    Args:
      table: N transitions; R is `outcome[:, 0]`, intermediate rewards are not read.
      evidence: needs `answer_logp`, f32[N, 2] ≤ 0.
      gamma: γ in [0, 1], per turn.
      scale, ddof, eps: `normalize.group_normalize`.

    Returns:
      Credit of kind "advantage", f32[N]; 0 at padding. A group of one rollout and one whose rewards are all equal get
      exactly 0. No gradient flows into the evidence.

    Raises:
      ValueError: there is no `evidence.answer_logp`.
    """
    chex.assert_equal_shape([table.rollout, table.group, table.valid])
    chex.assert_shape(table.outcome, (*table.rollout.shape, None))
    chex.assert_type([table.outcome, table.valid], [float, bool])
    if evidence.answer_logp is None:
        raise ValueError("igpo needs evidence.answer_logp, the log-prob of the true answer around every call, but there is none.")
    chex.assert_shape(evidence.answer_logp, (*table.rollout.shape, 2))
    chex.assert_type(evidence.answer_logp, float)
    logp = jnp.where(jnp.asarray(table.valid)[:, None], evidence.answer_logp, 0.0)
    probability = jax.lax.stop_gradient(jnp.exp(jnp.minimum(logp, 0.0)))
    last = last_in_segment(table.rollout, table.valid)
    rewards = jnp.where(last, table.outcome[:, 0], probability[:, 1] - probability[:, 0])
    every_call = table.valid.astype(jnp.float32)
    normalised = group_normalize(rewards, table.group, every_call, units=table.rollout, scale=scale, ddof=ddof, eps=eps)
    returns = reverse_affine_scan(jnp.full_like(normalised, gamma), normalised, table.rollout, table.valid)
    return Credit(value=jnp.where(table.valid, returns, 0.0), kind="advantage")


def _hindsight_log_ratio(table: TransitionTable, evidence: Evidence, name: str, *, per_token: bool) -> jax.Array:
    """log h/π of each response in float32, or its mean over the response; 0 at padding."""
    chex.assert_equal_shape([table.rollout, table.num_tokens, table.valid])
    chex.assert_type([table.num_tokens, table.valid], [int, bool])
    if evidence.hindsight_logp is None or evidence.response_logp is None:
        raise ValueError(
            f"{name} needs evidence.hindsight_logp and evidence.response_logp, log-probs of every response with and without the "
            "outcome, but one of them is missing."
        )
    given = (evidence.hindsight_logp, evidence.response_logp)
    chex.assert_shape(given, table.rollout.shape)
    chex.assert_type(given, float)
    with_outcome, without = (jax.lax.stop_gradient(jnp.where(table.valid, x, 0.0).astype(jnp.float32)) for x in given)
    difference = with_outcome - without
    return safe_divide(difference, table.num_tokens.astype(jnp.float32)) if per_token else difference
