"""The log-ratio of two policies, the one place where it is clamped."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lightningrl.table import Array

MAX_LOG_RATIO = 20.0


def log_ratio(logp: Array, other: Array, mask: Array) -> jax.Array:
    """log π/π′ per token in float32, clamped to ±20 and 0 where the mask is false.

    exp(20) is 4.9e8: far past any clip range, far from overflow. Beyond the clamp the gradient is 0.
    """
    difference = jnp.where(mask, logp, 0.0).astype(jnp.float32) - jnp.where(mask, other, 0.0).astype(jnp.float32)
    return jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)
