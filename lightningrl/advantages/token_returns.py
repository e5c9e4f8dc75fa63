"""Advantages of tokens from rewards and a critic's values between them: `(table, tokens, advantage, evidence) -> f32[E]`.

What a rollout's sequence of tokens is, and where its rewards stand in it, says `token_order`.
"""

from __future__ import annotations

from typing import get_args

import chex
import jax
import jax.numpy as jnp

from lightningrl.advantages.token_order import OrderedEdges, in_order, token_values
from lightningrl.advantages.tokens import broadcast
from lightningrl.normalize import Degenerate
from lightningrl.ratio import log_ratio
from lightningrl.segments import (
    EPSILON,
    masked_max,
    masked_mean,
    masked_min,
    masked_var,
    reverse_affine_scan,
    safe_divide,
    safe_sqrt,
    segment_max,
)
from lightningrl.table import Array, Evidence, TokenTable, TransitionTable


def token_gae(
    table: TransitionTable, tokens: TokenTable, advantage: Array, evidence: Evidence, *, gamma: float = 1.0, lambda_: float = 0.95
) -> jax.Array:
    """Generalised advantage estimation over the tokens of a rollout (arXiv 1506.02438, eq. 16).

      δₖ = rₖ + γ Vₖ₊₁ - Vₖ
      Aₖ = δₖ + γλ Aₖ₊₁

    Vₖ is the value of the state before token k, V is 0 after the rollout's last token, and k+1 is its next token with a
    loss, be it in a later call. λ = 1 and γ = 1 give the rewards to come less the value.

    Args:
      table: N transitions.
      tokens: E edges, of any shape, in any order.
      advantage: not read.
      evidence: needs `token_value`, f32 of the shape of the edges.
      gamma: γ in [0, 1], per token: γ = 0.99 leaves 4e-5 of a reward after 1000 tokens.
      lambda_: λ in [0, 1], per token.

    Returns:
      f32[E]; 0 where no loss is wanted. No gradient flows into the critic.

    Raises:
      ValueError: there is no `evidence.token_value`.
    """
    edges = in_order(table, tokens)
    value = token_values(edges, tokens, evidence, "token_gae")
    following = edges.following(value, edges.rollout)
    errors = edges.reward + gamma * following - value
    return edges.put(_recursion(edges, gamma * lambda_, errors), tokens)


def token_lambda_return(
    table: TransitionTable, tokens: TokenTable, advantage: Array, evidence: Evidence, *, gamma: float = 1.0, lambda_: float = 0.95
) -> jax.Array:
    """The λ-return of a token: what a token critic learns, and as an advantage one without its baseline (Sutton & Barto, §12.1).

      Gₖ = rₖ + γ ((1 - λ) Vₖ₊₁ + λ Gₖ₊₁),   V and G 0 after the rollout's last token

    The same number as `token_gae` + V. With λ = 1 the values are not read: the discounted rewards to come.

    Args, returns and raises as `token_gae`.
    """
    edges = in_order(table, tokens)
    value = token_values(edges, tokens, evidence, "token_lambda_return")
    following = edges.following(value, edges.rollout)
    terms = edges.reward + gamma * (1.0 - lambda_) * following
    return edges.put(_recursion(edges, gamma * lambda_, terms), tokens)


def v_trace(
    table: TransitionTable,
    tokens: TokenTable,
    advantage: Array,
    evidence: Evidence,
    *,
    rho: Array | None = None,
    gamma: float = 1.0,
    lambda_: float = 1.0,
    clip_rho: float = 1.0,
    clip_c: float = 1.0,
    clip_pg_rho: float = 1.0,
) -> jax.Array:
    """Off-policy corrected advantages of tokens (V-trace, IMPALA, arXiv 1802.01561, §4).

      cₖ = λ min(c̄, ρₖ),   δₖ = min(ρ̄, ρₖ) (rₖ + γ Vₖ₊₁ - Vₖ)
      eₖ = δₖ + γ cₖ eₖ₊₁
      Aₖ = min(ρ̄ₚ, ρₖ) (rₖ + γ (Vₖ₊₁ + λ eₖ₊₁) - Vₖ)

    Vₖ + eₖ is the value target. λ is not in the paper's main text (λ = 1 there) but in its remark 2. The ratio is in A
    already: a loss that multiplies by its own ratio as well counts it twice. With every ρ = 1 this is `token_gae`.

    Args:
      table: N transitions.
      tokens: E edges, of any shape, in any order.
      advantage: not read.
      evidence: needs `token_value`, f32 of the shape of the edges.
      rho: ρ = π/μ, f32 > 0 of the shape of the edges, not read where no loss is wanted; by default that of the policy that
        the update starts from over the sampler's, exp(old_logp - behaviour_logp).
      gamma, lambda_: γ and λ in [0, 1], per token.
      clip_rho, clip_c, clip_pg_rho: ρ̄, c̄ and ρ̄ₚ > 0; ρ̄ ≥ c̄ in the paper.

    Returns:
      f32[E]; 0 where no loss is wanted. No gradient flows into the critic or the ratios.

    Raises:
      ValueError: there is no `evidence.token_value`.
    """
    edges = in_order(table, tokens)
    value = token_values(edges, tokens, evidence, "v_trace")
    errors, ratio = _v_trace_errors(edges, tokens, value, rho, gamma, lambda_, clip_rho, clip_c)
    following = edges.following(value + lambda_ * errors, edges.rollout)
    result = jnp.minimum(clip_pg_rho, ratio) * (edges.reward + gamma * following - value)
    return edges.put(result, tokens)


def v_trace_target(
    table: TransitionTable,
    tokens: TokenTable,
    advantage: Array,
    evidence: Evidence,
    *,
    rho: Array | None = None,
    gamma: float = 1.0,
    lambda_: float = 1.0,
    clip_rho: float = 1.0,
    clip_c: float = 1.0,
) -> jax.Array:
    """What the critic of `v_trace` learns: Vₖ + eₖ. Args, returns and raises as there."""
    edges = in_order(table, tokens)
    value = token_values(edges, tokens, evidence, "v_trace_target")
    errors, _ = _v_trace_errors(edges, tokens, value, rho, gamma, lambda_, clip_rho, clip_c)
    return edges.put(value + errors, tokens)


def reinforce_plus_plus(
    table: TransitionTable,
    tokens: TokenTable,
    advantage: Array,
    evidence: Evidence,
    *,
    gamma: float = 1.0,
    kl_coef: float = 0.0,
    ddof: float = 1.0,
    eps: float = EPSILON,
) -> jax.Array:
    """Discounted rewards to come of every token, whitened over the tokens of the batch (REINFORCE++, arXiv 2501.03262, §3).

      Gₖ = rₖ - β log π_old(yₖ)/π_ref(yₖ) + γ Gₖ₊₁,   A = `whiten_tokens`(G)

    There is no group: rewards are compared over the whole batch, so that easy tasks are praised and hard ones blamed.

    Args:
      table: N transitions.
      tokens: E edges, of any shape, in any order.
      advantage: not read.
      evidence: not read.
      gamma: γ in [0, 1], per token.
      kl_coef: β ≥ 0, of the penalty for leaving the reference policy; 0 does not read `ref_logp`.
      ddof, eps: of `whiten_tokens`.

    Returns:
      f32[E]; 0 where no loss is wanted. A batch of one token, or one where all G are equal, gets exactly 0.
    """
    chex.assert_equal_shape([tokens.transition, tokens.old_logp, tokens.ref_logp, tokens.mask])
    edges = in_order(table, tokens)
    rewards = edges.reward
    if kl_coef != 0.0:
        rewards = rewards - kl_coef * edges.take(log_ratio(tokens.old_logp, tokens.ref_logp, tokens.mask))
    returns = edges.put(_recursion(edges, gamma, rewards), tokens)
    return whiten_tokens(returns, tokens.mask, ddof=ddof, eps=eps)


def reinforce_plus_plus_baseline(
    table: TransitionTable,
    tokens: TokenTable,
    advantage: Array,
    evidence: Evidence,
    *,
    ddof: float = 1.0,
    eps: float = EPSILON,
    degenerate: Degenerate = "zero",
) -> jax.Array:
    """Every token gets its transition's advantage, then tokens are whitened (REINFORCE++-baseline, arXiv 2501.03262).

      Aₑ = `whiten_tokens`(A_{transition(e)})

    The paper's advantage is reward minus group mean: `group_norm` with scale="none". As the mean over tokens weighs long
    rollouts more, whitening shifts what the group mean had centred.

    Args:
      table, tokens, advantage, evidence: as `broadcast`.
      ddof, eps: of `whiten_tokens`.
      degenerate: a group all of whose advantages are 0, having nothing to compare, stays "zero", or gets the shift that the
        "formula" gives it, as in the libraries.

    Returns:
      f32[E]; 0 where no loss is wanted.

    Raises:
      ValueError: an unknown degenerate.
    """
    chex.assert_shape(advantage, table.rollout.shape)
    chex.assert_equal_shape([table.rollout, table.group, table.valid])
    chex.assert_equal_shape([tokens.transition, tokens.mask])
    if degenerate not in get_args(Degenerate):
        raise ValueError(f"There is no degenerate {degenerate!r}: choose one of {', '.join(get_args(Degenerate))}.")
    result = whiten_tokens(broadcast(table, tokens, advantage, evidence), tokens.mask, ddof=ddof, eps=eps)
    if degenerate == "formula":
        return result
    size = jnp.where(table.valid, jnp.abs(advantage), 0.0)
    speaks = segment_max(size, table.group, size.shape[0], mask=table.valid)[table.group] > 0.0
    return jnp.where(speaks[tokens.transition], result, 0.0)


def whiten_tokens(values: Array, mask: Array, *, ddof: float = 1.0, eps: float = EPSILON) -> jax.Array:
    """Tokens in units of their spread over the batch, every masked token counting one.

      (x - μ) / (σ + eps),   σ² = Σ (x - μ)² / (n - ddof)

    f32 of any shape; 0 outside the mask, and exactly 0 where all masked tokens are equal, a single one among them.
    """
    chex.assert_equal_shape([values, mask])
    x = jnp.where(mask, values, 0.0)
    deviation = safe_sqrt(masked_var(x, mask, ddof=ddof))
    constant = masked_min(x, mask) == masked_max(x, mask)
    return jnp.where(jnp.logical_and(mask, ~constant), safe_divide(x - masked_mean(x, mask), deviation + eps), 0.0)


def _recursion(edges: OrderedEdges, factor: float, terms: Array) -> jax.Array:
    return reverse_affine_scan(jnp.full_like(terms, factor), terms, edges.rollout, edges.mask)


def _v_trace_errors(edges, tokens, value, rho, gamma, lambda_, clip_rho, clip_c) -> tuple[jax.Array, jax.Array]:
    if rho is None:
        rho = jnp.exp(log_ratio(tokens.old_logp, tokens.behaviour_logp, tokens.mask))
    chex.assert_equal_shape([rho, tokens.mask])
    ratio = jax.lax.stop_gradient(edges.take(rho))
    following = edges.following(value, edges.rollout)
    errors = jnp.minimum(clip_rho, ratio) * (edges.reward + gamma * following - value)
    factors = gamma * lambda_ * jnp.minimum(clip_c, ratio)
    return reverse_affine_scan(factors, errors, edges.rollout, edges.mask), ratio
