"""From logits to a token and its log-prob: pure, one row a slot, each row independent of the others."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp

from lightningrl.table import Array

MAX_ALTERNATIVES = 20  # what OpenAI's top_logprobs allows at most


def uniforms(key: Array, index: Array) -> jax.Array:
    """All the randomness of sampling: one uniform number in [0, 1) a token, drawn with fold_in(key, index).

    Args:
      key: int32 [2, S], the bits of each slot's key; index: int32 [T, S], which token of the response it is.

    Returns:
      float32 [T, S].
    """
    words = jax.lax.bitcast_convert_type(jnp.asarray(key), jnp.uint32).T

    def one(word: jax.Array, i: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(word), i))

    return jax.vmap(jax.vmap(one), in_axes=(None, 0))(words, jnp.asarray(index))


def truncate(logits: jax.Array, top_p: Array, top_k: Array) -> jax.Array:
    """What top-k and nucleus sampling (arXiv 1904.09751, §3.1) leave: bool [S, V]; the likeliest token always stays.

    Args:
      logits: float32 [S, V], tempered; top_p: float32 [S] in (0, 1]; top_k: int32 [S], 0 for no limit.
    """
    chex.assert_rank([logits, top_p, top_k], [2, 1, 1])
    order = jnp.argsort(-logits, axis=-1)
    sorted_probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(sorted_probs, axis=-1) - sorted_probs  # mass of what is likelier
    rank = jnp.arange(logits.shape[-1])
    keep_sorted = (before < top_p[:, None]) & ((top_k[:, None] == 0) | (rank < top_k[:, None]))
    keep_sorted = keep_sorted | (rank == 0)
    return jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, keep_sorted, axis=-1, inplace=False)


def draw(weights: jax.Array, uniform: Array) -> jax.Array:
    """The token at which the running sum of the weights passes uniform · Σ weights: token i with probability wᵢ / Σ w.

    Summed in about √V blocks of about √V tokens, first over blocks and then within the one that is hit. A weight of 0 is never
    drawn.

    Args:
      weights: float32 [S, V], ≥ 0 and not all 0; uniform: float32 [S] in [0, 1).

    Returns:
      int32 [S].
    """
    (rows, size), width = weights.shape, 2 ** math.ceil(math.log2(weights.shape[1]) / 2)
    blocks = jnp.pad(weights, ((0, 0), (0, -size % width))).reshape(rows, -1, width)
    within = _running_sum(blocks)
    over = _running_sum(within[:, :, -1])
    wanted = uniform * over[:, -1]
    block = _first(over > wanted[:, None], within[:, :, -1] > 0)
    wanted = wanted - jnp.where(block > 0, _pick(over, jnp.maximum(block - 1, 0)), 0.0)
    inside = _pick(within, block), _pick(blocks, block)
    return (block * width + _first(inside[0] > wanted[:, None], inside[1] > 0)).astype(jnp.int32)


def _running_sum(x: jax.Array) -> jax.Array:
    # A matmul with a triangle: XLA has no quick cumsum on CPU.
    triangle = jnp.triu(jnp.ones((x.shape[-1], x.shape[-1]), x.dtype))
    return jnp.matmul(x.reshape(-1, x.shape[-1]), triangle, precision=jax.lax.Precision.HIGHEST).reshape(x.shape)


def _first(passed: jax.Array, possible: jax.Array) -> jax.Array:
    # Where rounding leaves the sum just short of what is wanted: the last that is possible.
    last = possible.shape[-1] - 1 - jnp.argmax(possible[:, ::-1], axis=-1)
    hit = passed & possible
    return jnp.where(jnp.any(hit, axis=-1), jnp.argmax(hit, axis=-1), last)


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.vmap(lambda row, i: row[i])(x, index)


def choose(logits: jax.Array, uniform: Array, temperature: Array, top_p: Array, top_k: Array) -> tuple[jax.Array, jax.Array]:
    """Samples one token a row by inverting the cumulative distribution of softmax(logits / τ); greedy where τ = 0.

    Args:
      logits: float32 [S, V]; uniform: float32 [S] in [0, 1); temperature, top_p: float32 [S]; top_k: int32 [S].

    Returns:
      tokens int32 [S]; their log-probs float32 [S], of the tempered and untruncated distribution (τ = 1 where greedy).
    """
    chex.assert_rank([logits, uniform, temperature], [2, 1, 1])
    tempered = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    largest = jnp.max(tempered, axis=-1, keepdims=True)
    weights = jnp.exp(tempered - largest)
    any_truncated = jnp.any((top_p < 1.0) | (top_k > 0))
    # One program for both: were truncation compiled apart, a neighbour's settings could change this row's last bits.
    candidates = jax.lax.cond(any_truncated, lambda: jnp.where(truncate(tempered, top_p, top_k), weights, 0.0), lambda: weights)
    tokens = jnp.where(temperature > 0, draw(candidates, uniform), jnp.argmax(tempered, axis=-1).astype(jnp.int32))
    return tokens, _pick(tempered, tokens) - largest[:, 0] - jnp.log(jnp.sum(weights, axis=-1))


def likeliest(logits: jax.Array, temperature: Array) -> tuple[jax.Array, jax.Array]:
    """The likeliest tokens of each row, of the same distribution as `choose`'s log-probs.

    Returns:
      log-probs float32 [S, A] and ids int32 [S, A], in falling order; A = min(MAX_ALTERNATIVES, V).
    """
    tempered = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    logprobs, ids = jax.lax.top_k(jax.nn.log_softmax(tempered, axis=-1), min(MAX_ALTERNATIVES, logits.shape[-1]))
    return logprobs, ids
