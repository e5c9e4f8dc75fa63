"""The critic's loss."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp

from lightningrl.losses.metrics import Metrics, metric_means
from lightningrl.table import Array, LossInputs, TokenTable

States = Literal["calls", "tokens"]


def value_states(tokens: TokenTable, states: States) -> jax.Array:
    """bool[E]: the edges before which stands a state that the critic values: those of the mask, with "calls" the first of each call.

    Args:
      tokens: E edges, of any shape; reads `k` and `mask`.
      states: "calls" or "tokens".

    Raises:
      ValueError: unknown states.
    """
    chex.assert_equal_shape([tokens.k, tokens.mask])
    chex.assert_type([tokens.k, tokens.mask], [int, bool])
    if states not in get_args(States):
        raise ValueError(f"The value loss has no states {states!r}: choose one of {', '.join(get_args(States))}.")
    return jnp.logical_and(tokens.mask, (tokens.k == 0) | (states == "tokens"))


def value_loss(inputs: LossInputs, *, clip: float | None = 0.2, states: States = "calls") -> tuple[Array, Array, Metrics]:
    """Squared error of a critic, clipped around the value that the update started from (arXiv 2005.12729).

      ℓ = ½ max((v - R)², (clip(v, v_old - ε, v_old + ε) - R)²),   R the λ-return that goes with the advantage

    The paper describes clipping among PPO's code-level optimizations; its section was not checked. The maximum and the ½ are compared
    with verl's code.

    A turn critic has one state before each call, read at the node of its first token; a token critic one before each token. The
    units of this loss are these states: `keep` is also the mask to aggregate under, and with `token_mean` the result is the mean over them.

    Args:
      inputs: E edges; reads `value`, `old_value`, `value_target`, `tokens.k` and `tokens.mask`.
      clip: ε > 0, or None for the plain squared error.
      states: "calls" or "tokens", what the critic values the states before.

    Returns:
      loss f32[E]; keep bool[E], the masked edges, those with k = 0 of a turn critic; and pairs (sum, states) of `value_error_squared_mean`,
      `value_clip_fraction`, `value_target_mean` and `value_target_squared_mean`.

    Raises:
      ValueError: ε is not positive, or unknown states.
    """
    chex.assert_equal_shape([inputs.value, inputs.old_value, inputs.value_target, inputs.tokens.k, inputs.tokens.mask])
    chex.assert_type([inputs.value, inputs.old_value, inputs.value_target, inputs.tokens.mask], [float, float, float, bool])
    if clip is not None and clip <= 0:
        raise ValueError(f"The value loss's clip is {clip}: it must be positive, or None for no clipping.")
    keep = value_states(inputs.tokens, states)
    value = jnp.where(keep, inputs.value, 0.0)
    old = jax.lax.stop_gradient(jnp.where(keep, inputs.old_value, 0.0))
    target = jax.lax.stop_gradient(jnp.where(keep, inputs.value_target, 0.0))

    error = (value - target) ** 2
    near = error if clip is None else (jnp.clip(value, old - clip, old + clip) - target) ** 2
    rates = {
        "value_error_squared_mean": error,
        "value_clip_fraction": near > error,
        "value_target_mean": target,
        "value_target_squared_mean": target**2,
    }
    return 0.5 * jnp.maximum(error, near), keep, metric_means(rates, keep)
