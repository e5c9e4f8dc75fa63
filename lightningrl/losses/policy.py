"""Policy-gradient losses of token scope."""

from __future__ import annotations

import jax.numpy as jnp

from lightningrl.losses.metrics import Metrics, metric_means
from lightningrl.losses.terms import fixed_advantage, log_ratio_to, ratio_rates
from lightningrl.table import Array, LossInputs


def ppo_clip(
    inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = 3.0
) -> tuple[Array, Array, Metrics]:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), with clip-higher (DAPO, 2503.14476, §3.1) and dual clip (1912.09729).

      ρ = π(a) / π_old(a)
      ℓ = max(-A ρ, -A clip(ρ, 1 - εl, 1 + εh))
      where A < 0:  ℓ = min(ℓ, -c A)

    Without the last line a token that became very likely although it did badly has an unbounded loss.

    Args:
      inputs: E edges; reads `logp`, `advantage`, `tokens.old_logp` and `tokens.mask`. Log-ratios are clamped to ±20.
      clip_low: εl in [0, 1).
      clip_high: εh ≥ 0.
      dual_clip: c > 1, or None for no dual clip.

    Returns:
      loss f32[E], 0 where the mask is false; keep bool[E], the mask, for a clipped token has a loss and no gradient; and pairs
      (sum, tokens) of `clip_fraction_high`, `clip_fraction_low` (tokens whose clipped branch counts), `dual_clip_fraction`,
      `ratio_mean`, `ratio_squared_mean` and `old_kl_mean` (k3 of π_old against π).

    Raises:
      ValueError: a clip range or c outside the above.
    """
    _check_clip(clip_low, clip_high, dual_clip)
    mask = inputs.tokens.mask
    advantage, logs = fixed_advantage(inputs), log_ratio_to(inputs, "old")
    ratio = jnp.exp(logs)

    free = -advantage * ratio
    clipped = -advantage * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = jnp.maximum(free, clipped)
    capped = jnp.zeros(jnp.shape(mask), bool)
    if dual_clip is not None:
        capped = (advantage < 0) & (loss > -dual_clip * advantage)
        loss = jnp.where(capped, -dual_clip * advantage, loss)

    rates = {
        "clip_fraction_high": (clipped > free) & (ratio > 1.0),
        "clip_fraction_low": (clipped > free) & (ratio < 1.0),
        "dual_clip_fraction": capped,
        **ratio_rates(logs),
    }
    return loss, mask, metric_means(rates, mask)


def _check_clip(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    if not 0 <= clip_low < 1:
        raise ValueError(f"clip_low is {clip_low}: it must lie in [0, 1), for the ratio is clipped to 1 - clip_low from below.")
    if clip_high < 0:
        raise ValueError(f"clip_high is {clip_high}: it must not be negative.")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip is {dual_clip}: it must be greater than 1, or None for no dual clip.")
