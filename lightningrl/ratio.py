"""The log-ratio of two policies, the one place where it is clamped, and the dtype that losses are computed in."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lightningrl.table import Array

MAX_LOG_RATIO = 20.0


def at_least_float32(x: Array) -> jax.Array:
    """x in float32; float64 stays, so that a loss of log-probs in float64 has all of their digits."""
    return jnp.asarray(x).astype(jnp.promote_types(jnp.result_type(x), jnp.float32))


def log_ratio(logp: Array, other: Array, mask: Array) -> jax.Array:
    """log π/π′ per token in float32 at least, clamped to ±20 and 0 where the mask is false.

    exp(20) is 4.9e8: far past any clip range, far from overflow. Beyond the clamp the gradient is 0.
    """
    difference = at_least_float32(jnp.where(mask, logp, 0.0)) - at_least_float32(jnp.where(mask, other, 0.0))
    return jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)
