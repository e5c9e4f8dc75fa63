"""Policy losses of token scope that weigh tokens rather than clip them, and PPO against three policies."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lightningrl.losses.likelihood import negative_log_likelihood
from lightningrl.losses.metrics import Metrics, metric_means
from lightningrl.losses.policy import ppo_clip
from lightningrl.losses.terms import fixed_advantage, log_ratio_to, masked_logp, ratio_rates
from lightningrl.ratio import log_ratio
from lightningrl.table import Array, LossInputs


def cispo(inputs: LossInputs, *, lower: float = 0.0, upper: float = 5.0) -> tuple[Array, Array, Metrics]:
    """CISPO (arXiv 2506.13585, §3.1): REINFORCE with a clipped, fixed ratio. Scope: token.

      ρ = π(a)/π_old(a),   ℓ = -sg(clip(ρ, lower, upper)) A log π(a)

    A clipped token keeps a gradient, of bounded weight. The bounds are of the ratio itself: libraries differ in what their ε is. verl:
    lower = 1 - εl, upper = 1 + εh; TRL and ScaleRL: lower = 0, upper = ε. The paper sets no lower bound.

    Args:
      inputs: E edges; reads `logp`, `advantage`, `tokens.old_logp` and `tokens.mask`.
      lower: in [0, upper].
      upper: positive. Its default is ScaleRL's as TRL documents it; the paper only says that it was tuned.

    Returns:
      loss f32[E], 0 where the mask is false; keep bool[E], the mask; and pairs (sum, tokens) of `clip_fraction_high`,
      `clip_fraction_low`, `ratio_mean`, `ratio_squared_mean` and `old_kl_mean`. An empty mask gives zeros.

    Raises:
      ValueError: bounds outside the above.
    """
    if not 0 <= lower <= upper or upper <= 0:
        raise ValueError(f"CISPO's bounds are {lower} and {upper}: the ratio needs 0 ≤ lower ≤ upper and a positive upper.")
    mask = inputs.tokens.mask
    logs, advantage = log_ratio_to(inputs, "old"), fixed_advantage(inputs)
    ratio = jax.lax.stop_gradient(jnp.exp(logs))
    loss = -jnp.clip(ratio, lower, upper) * advantage * masked_logp(inputs)
    rates = {"clip_fraction_high": ratio > upper, "clip_fraction_low": ratio < lower, **ratio_rates(logs)}
    return loss, mask, metric_means(rates, mask)


def sapo(inputs: LossInputs, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> tuple[Array, Array, Metrics]:
    """SAPO (arXiv 2511.20347): a sigmoid gate in the place of the clip. Scope: token; the paper aggregates by sequence mean.

      ρ = π(a)/π_old(a),   ℓ = -(4/τ) σ(τ (ρ - 1)) A,   τ = τ₊ where A > 0, else τ₋

    Its gradient in log π is -4 σ(1 - σ) ρ A: the policy gradient at ρ = 1, fading on both sides, faster with a larger τ. Read in and
    compared with verl's and TRL's code; the sections of the paper were not checked.

    Args:
      inputs: E edges; reads `logp`, `advantage`, `tokens.old_logp` and `tokens.mask`.
      tau_pos, tau_neg: positive; the defaults are the paper's.

    Returns:
      loss f32[E], 0 where the mask is false; keep bool[E], the mask; and pairs (sum, tokens) of `gate_mean` (4 σ(1 - σ), the share
      of the gradient that is let through), `ratio_mean`, `ratio_squared_mean` and `old_kl_mean`. An empty mask gives zeros.

    Raises:
      ValueError: a τ is not positive.
    """
    if tau_pos <= 0 or tau_neg <= 0:
        raise ValueError(f"SAPO's temperatures are {tau_pos} and {tau_neg}: they must be positive.")
    mask = inputs.tokens.mask
    logs, advantage = log_ratio_to(inputs, "old"), fixed_advantage(inputs)
    tau = jnp.where(advantage > 0, tau_pos, tau_neg)
    gate = jax.nn.sigmoid(tau * (jnp.exp(logs) - 1.0))
    return -(4.0 / tau) * gate * advantage, mask, metric_means({"gate_mean": 4.0 * gate * (1.0 - gate), **ratio_rates(logs)}, mask)


def dro(inputs: LossInputs, *, beta: float) -> tuple[Array, Array, Metrics]:
    """Direct reward optimisation (arXiv 2405.19107), as verl has it: the policy gradient with a quadratic tether. Scope: token.

      ℓ = -(A log π(a) - ½ β (log π(a)/π_old(a))²)

    No ratio multiplies the advantage. The paper tethers whole answers to the reference policy; here, as in verl, each token is tethered to
    the policy that the update starts from. (The reading of the paper is from its abstract and verl's code.)

    Args:
      inputs: E edges; reads `logp`, `advantage`, `tokens.old_logp` and `tokens.mask`. Beyond a log-ratio of ±20 the tether doesn't pull.
      beta: positive; no default, for its scale is that of the advantages.

    Returns:
      loss f32[E], 0 where the mask is false; keep bool[E], the mask; and pairs (sum, tokens) of `ratio_mean`, `ratio_squared_mean` and
      `old_kl_mean`. An empty mask gives zeros.

    Raises:
      ValueError: β is not positive.
    """
    if beta <= 0:
        raise ValueError(f"DRO's beta is {beta}: it must be positive.")
    logs = log_ratio_to(inputs, "old")
    loss = 0.5 * beta * logs**2 - fixed_advantage(inputs) * masked_logp(inputs)
    return loss, inputs.tokens.mask, metric_means(ratio_rates(logs), inputs.tokens.mask)


def gpg(inputs: LossInputs) -> tuple[Array, Array, Metrics]:
    """GPG (arXiv 2504.02546): ℓ = -A log π(a), no ratio and no clip. Scope: token.

    For data of the policy itself. GPG's own factor α, which makes up for groups without a signal, belongs to its advantage. This is
    `negative_log_likelihood(weighted=True)`; arguments and results are described there.
    """
    return negative_log_likelihood(inputs, weighted=True)


def decoupled_ppo(
    inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None, max_weight: float | None = 5.0
) -> tuple[Array, Array, Metrics]:
    """Decoupled PPO (arXiv 2110.00641; for stale rollouts AReaL, 2505.24298). Scope: token.

      ρ = π(a)/π_prox(a),   w = sg(π_prox(a)/π_behaviour(a)),   ℓ = w · max(-A ρ, -A clip(ρ, 1 - εl, 1 + εh))

    The trust region lies around the policy that the update starts from (π_prox, `tokens.old_logp`), and the sampler's policy,
    however old, only enters through w. The formula and the dropping of large w were read in AReaL's code; neither paper's sections were
    checked.

    Args:
      inputs: E edges; reads `logp`, `advantage`, `tokens.old_logp`, `tokens.behaviour_logp` and `tokens.mask`.
      clip_low, clip_high, dual_clip: those of `ppo_clip`.
      max_weight: tokens with a larger w are dropped, as AReaL does; positive, or None to keep all.

    Returns:
      loss f32[E], 0 where the mask is false; keep bool[E], the masked tokens with w ≤ max_weight; and the pairs of `ppo_clip` with
      `behaviour_weight_mean` and `dropped_fraction`. An empty mask gives zeros.

    Raises:
      ValueError: a setting outside the above.
    """
    tokens = inputs.tokens
    chex.assert_equal_shape([inputs.logp, inputs.advantage, tokens.old_logp, tokens.behaviour_logp, tokens.mask])
    if max_weight is not None and max_weight <= 0:
        raise ValueError(f"max_weight is {max_weight}: it must be positive, or None to keep every token.")
    loss, mask, aux = ppo_clip(inputs, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    weight = jax.lax.stop_gradient(jnp.exp(log_ratio(tokens.old_logp, tokens.behaviour_logp, mask)))
    keep = mask if max_weight is None else mask & (weight <= max_weight)
    rates = {"behaviour_weight_mean": weight, "dropped_fraction": mask & ~keep}
    return weight * loss, keep, aux | metric_means(rates, mask)
