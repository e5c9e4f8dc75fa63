"""What most policy losses start from: masked inputs, the ratio to an earlier policy, and what is reported of it."""

from __future__ import annotations

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from lightningrl.ratio import at_least_float32, log_ratio
from lightningrl.table import Array, LossInputs

Anchor = Literal["old", "behaviour"]


def fixed_advantage(inputs: LossInputs) -> jax.Array:
    """A, float32 at least and without gradient; 0 where the mask is false."""
    chex.assert_equal_shape([inputs.advantage, inputs.logp, inputs.tokens.mask])
    return jax.lax.stop_gradient(at_least_float32(jnp.where(inputs.tokens.mask, inputs.advantage, 0.0)))


def masked_logp(inputs: LossInputs) -> jax.Array:
    """log π(a), float32 at least and differentiable; 0 where the mask is false."""
    return at_least_float32(jnp.where(inputs.tokens.mask, inputs.logp, 0.0))


def log_ratio_to(inputs: LossInputs, anchor: Anchor) -> jax.Array:
    """log ρ = log π(a) - log π′(a), clamped to ±20, differentiable in π; 0 where the mask is false.

    Args:
      inputs: E edges; reads `logp`, `tokens.mask` and the log-prob of the anchor.
      anchor: π′; "old" for the policy that the update starts from, "behaviour" for what the sampler recorded.

    Raises:
      ValueError: there is no such anchor.
    """
    if anchor not in ("old", "behaviour"):
        raise ValueError(f"The anchor is {anchor!r}: it must be 'old' or 'behaviour'.")
    other = inputs.tokens.old_logp if anchor == "old" else inputs.tokens.behaviour_logp
    chex.assert_equal_shape([inputs.logp, other, inputs.tokens.mask])
    return log_ratio(inputs.logp, jax.lax.stop_gradient(other), inputs.tokens.mask)


def ratio_rates(logs: Array) -> dict[str, jax.Array]:
    """`ratio_mean`, `ratio_squared_mean` and `old_kl_mean` (k3 of the anchor against π), for `metric_means`."""
    ratio = jnp.exp(logs)
    return {"ratio_mean": ratio, "ratio_squared_mean": ratio**2, "old_kl_mean": ratio - 1.0 - logs}
