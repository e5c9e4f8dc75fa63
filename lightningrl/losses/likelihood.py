"""Imitation: the loss of the warm start, and of the plain policy gradient."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lightningrl.losses.metrics import Metrics, metric_means
from lightningrl.losses.terms import masked_logp
from lightningrl.table import Array, LossInputs


def negative_log_likelihood(inputs: LossInputs, *, weighted: bool = False) -> tuple[Array, Array, Metrics]:
    """ℓ = -log π(a), or weighted ℓ = -A log π(a), which is REINFORCE's loss (Williams 1992).

    Args:
      inputs: E edges; reads `logp`, `tokens.mask` and, weighted, `advantage`.
      weighted: whether the advantage multiplies.

    Returns:
      loss f32[E], 0 where the mask is false; keep bool[E], the mask; and the pair (sum, tokens) of `nll_mean`, unweighted.
    """
    mask = inputs.tokens.mask
    chex.assert_equal_shape([inputs.logp, inputs.advantage, mask])
    nll = -masked_logp(inputs)
    loss = jax.lax.stop_gradient(jnp.where(mask, inputs.advantage, 0.0)) * nll if weighted else nll
    return loss, mask, metric_means({"nll_mean": nll}, mask)
