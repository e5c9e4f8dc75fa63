"""What the policy says of action tokens: log-prob, entropy and Σπ², without logits of all tokens over the whole vocabulary."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from lightningrl.model.config import ModelConfig
from lightningrl.model.params import Params
from lightningrl.table import Array

VOCAB_CHUNK = 8192  # logits that exist at once, of each token


def token_scores(
    params: Params, config: ModelConfig, hidden: jax.Array, token: Array, temperature: Array, *, chunk: int = VOCAB_CHUNK
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log π(a), H = -Σᵥ π(v) log π(v) and Σᵥ π(v)² of π = softmax(z / τ), with z the logits of hidden states.

    The vocabulary is read in chunks. Forward, each gives Σ e^z, Σ e^z z and Σ e^(2z) relative to its largest logit, and these are
    put together as in the online softmax (arXiv 1805.02867, §3). Backward, its logits are computed once more, and with
    log π(v) = z - lse

        ∂ log π(a)/∂zᵥ = [v = a] - π(v),   ∂H/∂zᵥ = -π(v) (log π(v) + H),   ∂Σπ²/∂zᵥ = 2 π(v) (π(v) - Σπ²).

    A vocabulary of at most one chunk is computed at once, and its logits are kept for the backward pass.

    Args:
      hidden: float [E, D]; token: int32 [E] in [0, V); temperature: float32 [E], > 0, a constant: nothing flows back to it.
      chunk: logits of a token that exist at once, ≥ 1.

    Returns:
      float32 [E] each, computed in float32; float64 of hidden states in float64.
    """
    chex.assert_rank([hidden, token, temperature], [2, 1, 1])
    # [V, D] of either kind of head; a tied one is the embedding as it lies.
    head = params["embedding"] if config.tie_embeddings else params["head"].T
    if len(head) > chunk:
        return _in_chunks(hidden, head, token, temperature, chunk)
    logp = jax.nn.log_softmax(_logits(hidden, head, temperature), axis=-1)
    p = jnp.exp(logp)
    at = jnp.take_along_axis(logp, jnp.asarray(token)[:, None], axis=-1)[:, 0]
    return at, -jnp.sum(p * logp, axis=-1), jnp.sum(p * p, axis=-1)


def _logits(hidden: jax.Array, head: jax.Array, temperature: Array) -> jax.Array:
    return jnp.matmul(hidden, head.T, preferred_element_type=_wide(hidden)) / temperature[:, None]


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


class _Sums(NamedTuple):
    """Of some logits, relative to their largest. Each float32 [E]."""

    top: jax.Array  # the largest
    mass: jax.Array  # Σ e^(z - top)
    weighted: jax.Array  # Σ e^(z - top) (z - top)
    squares: jax.Array  # Σ e^(2 (z - top))


def _sums(z: jax.Array) -> _Sums:
    top = jnp.max(z, axis=-1)
    lower = z - top[:, None]
    e = jnp.exp(lower)
    return _Sums(top, jnp.sum(e, axis=-1), jnp.sum(e * lower, axis=-1), jnp.sum(e * e, axis=-1))


def _together(a: _Sums, b: _Sums) -> _Sums:
    top = jnp.maximum(a.top, b.top)
    moved = []
    for s in (a, b):
        down = s.top - top
        r = jnp.exp(down)
        moved.append((r * s.mass, r * (s.weighted + down * s.mass), r * r * s.squares))
    return _Sums(top, *(x + y for x, y in zip(*moved, strict=True)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _in_chunks(hidden: jax.Array, head: jax.Array, token: Array, temperature: Array, chunk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _forward(hidden, head, token, temperature, chunk)[0]


def _forward(hidden: jax.Array, head: jax.Array, token: Array, temperature: Array, chunk: int) -> tuple[Any, Any]:
    def read(low: jax.Array | int, part: jax.Array) -> tuple[_Sums, jax.Array]:
        z = _logits(hidden, part, temperature)
        mine = (token >= low) & (token < low + len(part))
        at = jnp.take_along_axis(z, jnp.where(mine, token - low, 0)[:, None], axis=-1)[:, 0]
        return _sums(z), jnp.where(mine, at, 0.0)

    def step(carry: tuple[_Sums, jax.Array], low: jax.Array) -> tuple[tuple[_Sums, jax.Array], None]:
        sums, chosen = read(low, jax.lax.dynamic_slice_in_dim(head, low, chunk))
        return (_together(carry[0], sums), carry[1] + chosen), None

    # A scan, as chunks of an unrolled loop are computed side by side and exist all at once.
    last, starts = _starts(len(head), chunk)
    (s, chosen), _ = jax.lax.scan(step, read(last, head[last:]), starts)
    log_mass = jnp.log(s.mass)
    entropy, sum_pi2 = log_mass - s.weighted / s.mass, s.squares / jnp.square(s.mass)
    return (chosen - s.top - log_mass, entropy, sum_pi2), (hidden, head, token, temperature, s.top, log_mass, entropy, sum_pi2)


def _starts(size: int, chunk: int) -> tuple[int, jax.Array]:
    """Where the last chunk begins, which may be a smaller one, and where the others do."""
    last = (size - 1) // chunk * chunk
    return last, jnp.arange(0, last, chunk)


def _backward(chunk: int, kept: Any, gradients: Any) -> tuple[jax.Array, jax.Array, None, None]:
    hidden, head, token, temperature, top, log_mass, entropy, sum_pi2 = kept
    of_logp, of_entropy, of_sum_pi2 = (g[:, None] for g in gradients)

    def read(low: jax.Array | int, part: jax.Array) -> tuple[jax.Array, jax.Array]:
        logp = _logits(hidden, part, temperature) - top[:, None] - log_mass[:, None]
        p = jnp.exp(logp)
        here = low + jnp.arange(len(part)) == token[:, None]
        dz = of_logp * (here - p) - of_entropy * p * (logp + entropy[:, None]) + of_sum_pi2 * 2 * p * (p - sum_pi2[:, None])
        dz = (dz / temperature[:, None]).astype(hidden.dtype)
        to_part = jnp.matmul(dz.T, hidden, preferred_element_type=_wide(hidden)).astype(head.dtype)
        return jnp.matmul(dz, part, preferred_element_type=_wide(hidden)), to_part

    def step(to_hidden: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
        more, to_part = read(low, jax.lax.dynamic_slice_in_dim(head, low, chunk))
        return to_hidden + more, to_part

    last, starts = _starts(len(head), chunk)
    to_hidden, to_last = read(last, head[last:])
    to_hidden, to_others = jax.lax.scan(step, to_hidden, starts)
    return to_hidden.astype(hidden.dtype), jnp.concatenate([to_others.reshape(-1, head.shape[1]), to_last]), None, None


_in_chunks.defvjp(_forward, _backward)
