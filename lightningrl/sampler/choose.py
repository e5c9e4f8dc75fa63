"""From logits to a token and its log-prob: pure, one row a slot, each row independent of the others."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lightningrl.table import Array

MAX_ALTERNATIVES = 20  # what OpenAI's top_logprobs allows at most


def truncate(logits: jax.Array, top_p: Array, top_k: Array) -> jax.Array:
    """Sets to -∞ what top-k and nucleus sampling (arXiv 1904.09751, §3.1) leave out; the likeliest token always stays.

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
    keep = jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, keep_sorted, axis=-1, inplace=False)
    return jnp.where(keep, logits, -jnp.inf)


def choose(logits: jax.Array, keys: jax.Array, temperature: Array, top_p: Array, top_k: Array) -> tuple[jax.Array, jax.Array]:
    """Samples one token a row by the Gumbel trick, argmax(logits/τ + g); greedy where τ = 0.

    Args:
      logits: float32 [S, V]; keys: uint32 [S, 2], one key a row; temperature, top_p: float32 [S]; top_k: int32 [S].

    Returns:
      tokens int32 [S]; their log-probs float32 [S], of the tempered and untruncated distribution (τ = 1 where greedy).
    """
    chex.assert_rank([logits, keys, temperature], [2, 2, 1])
    tempered = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    any_truncated = jnp.any((top_p < 1.0) | (top_k > 0))
    # One program for both: were truncation compiled apart, a neighbour's settings could change this row's last bits.
    candidates = jax.lax.cond(any_truncated, lambda: truncate(tempered, top_p, top_k), lambda: tempered)
    noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.wrap_key_data(key), logits.shape[-1:]))(keys)
    noise = jnp.where(temperature[:, None] > 0, noise, 0.0)
    tokens = jnp.argmax(candidates + noise, axis=-1).astype(jnp.int32)
    logprobs = jax.nn.log_softmax(tempered, axis=-1)
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]


def likeliest(logits: jax.Array, temperature: Array) -> tuple[jax.Array, jax.Array]:
    """The likeliest tokens of each row, of the same distribution as `choose`'s log-probs.

    Returns:
      log-probs float32 [S, A] and ids int32 [S, A], in falling order; A = min(MAX_ALTERNATIVES, V).
    """
    tempered = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    logprobs, ids = jax.lax.top_k(jax.nn.log_softmax(tempered, axis=-1), min(MAX_ALTERNATIVES, logits.shape[-1]))
    return logprobs, ids
