"""The sampler's compiled programs: `prefill` reads prompts, `load` takes up what has been read before, `decode` writes responses.

Slots come in groups, each with a cache of its own, and a program works on one group. It has one shape, whoever is in the group,
and no row looks at another: a request's tokens depend on its prompt, its key and its settings alone. Every prompt token but the
last is prefilled, in pieces that begin at multiples of the chunk size; the last is the first input of decoding.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct

from lightningrl.model.cache import KVCache, copy_blocks, extend
from lightningrl.model.config import ModelConfig
from lightningrl.model.decoder import logits as logits_of
from lightningrl.model.params import Params
from lightningrl.sampler.choose import MAX_ALTERNATIVES, choose, likeliest, uniforms
from lightningrl.table import Array

INTEGERS, FLOATS = 8, 2  # rows of the two arrays that hold a group's state


@struct.dataclass
class SlotState:
    """What decoding needs to know of each slot. An idle slot has `max_tokens` 0 and writes nothing."""

    token: Array  # int32 [S], the next input
    position: Array  # int32 [S], where it goes in the cache
    generated: Array  # int32 [S], response tokens so far
    max_tokens: Array  # int32 [S]
    key: Array  # int32 [2, S], the bits of the response's key; token i is drawn with fold_in(key, i)
    top_k: Array  # int32 [S]
    alternatives: Array  # int32 [S], whether likely alternatives are wanted
    temperature: Array  # float32 [S], 0 is greedy
    top_p: Array  # float32 [S]

    @classmethod
    def of(cls, integers: Array, floats: Array) -> SlotState:
        """Views of int32 [INTEGERS, S] and float32 [FLOATS, S]: two arrays are handed over sooner than nine."""
        token, position, generated, max_tokens, key_0, _, top_k, alternatives = integers
        del key_0
        return cls(token, position, generated, max_tokens, integers[4:6], top_k, alternatives, *floats)


@struct.dataclass
class Burst:
    """What some decoding steps produced. `token` is -1 where a slot was idle."""

    token: jax.Array  # int32 [steps, S]
    logprob: jax.Array  # float32 [steps, S]
    top_id: jax.Array  # int32 [steps, S, A], A = min(MAX_ALTERNATIVES, V)
    top_logprob: jax.Array  # float32 [steps, S, A]


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("cache", "pool"))
def prefill(params: Params, cache: KVCache, pool: KVCache, pieces: Array, *, config: ModelConfig) -> tuple[KVCache, KVCache]:
    """Reads pieces of prompts into the cache, and into blocks of the pool.

    Args:
      pieces: int32 [P, 3 + C]: the slot (≥ S: an empty row), how many tokens come before, the block (≥ the pool's: none), C tokens.
        Rows with a block come first.
    """
    slots, start, blocks, tokens = pieces[:, 0], pieces[:, 1], pieces[:, 2], pieces[:, 3:]
    cache = extend(params, config, cache, slots, tokens, start)[1]
    copies = jnp.stack([slots, start, blocks, jnp.zeros_like(slots)], axis=1)
    kept = jnp.sum(blocks < pool.keys[0].shape[0])
    return cache, copy_blocks(cache, pool, copies, kept, tokens.shape[1])


@functools.partial(jax.jit, static_argnames="width", donate_argnames="cache")
def load(cache: KVCache, pool: KVCache, copies: Array, count: Array, *, width: int) -> KVCache:
    """Takes blocks of `width` tokens out of the pool; `copies` as in `copy_blocks`."""
    return copy_blocks(pool, cache, copies, count, width)


@functools.partial(jax.jit, static_argnames=("config", "steps", "end_token"), donate_argnames="cache")
def decode(
    params: Params, cache: KVCache, integers: Array, floats: Array, *, config: ModelConfig, steps: int, end_token: int
) -> tuple[KVCache, Burst]:
    """Samples up to `steps` tokens for every active slot; a slot stops at `end_token` or after `max_tokens`.

    Args:
      integers, floats: the slots' state, as in `SlotState.of`.
    """
    s = SlotState.of(integers, floats)
    (slots,), length = s.token.shape, cache.values[0].shape[2]
    uniform = uniforms(s.key, s.generated + jnp.arange(steps)[:, None])
    alternatives = min(MAX_ALTERNATIVES, config.vocab_size)
    burst = Burst(
        token=jnp.full((steps, slots), -1),
        logprob=jnp.zeros((steps, slots)),
        top_id=jnp.zeros((steps, slots, alternatives), jnp.int32),
        top_logprob=jnp.zeros((steps, slots, alternatives)),
    )

    def goes_on(carry: tuple[jax.Array, jax.Array, KVCache, jax.Array, Burst]) -> jax.Array:
        i, active, *_ = carry
        return (i < steps) & jnp.any(active)

    def step(
        carry: tuple[jax.Array, jax.Array, KVCache, jax.Array, Burst],
    ) -> tuple[jax.Array, jax.Array, KVCache, jax.Array, Burst]:
        i, active, cache, token, burst = carry
        at = jnp.where(active, s.position + i, length)  # past the end: the write is dropped
        hidden, cache = extend(params, config, cache, None, token[:, None], at)
        logits = logits_of(params, config, hidden[:, 0])
        token, logprob = choose(logits, uniform[i], s.temperature, s.top_p, s.top_k)
        top_logprob, top_id = jax.lax.cond(
            jnp.any((s.alternatives > 0) & active),
            lambda: likeliest(logits, s.temperature),
            lambda: (jnp.zeros((slots, alternatives)), jnp.zeros((slots, alternatives), jnp.int32)),
        )
        seen = Burst(token=jnp.where(active, token, -1), logprob=logprob, top_id=top_id, top_logprob=top_logprob)
        burst = jax.tree.map(lambda whole, row: whole.at[i].set(row), burst, seen)
        active = active & (token != end_token) & (s.generated + i + 1 < s.max_tokens)
        return i + 1, active, cache, token, burst

    first = (jnp.int32(0), s.max_tokens > s.generated, cache, s.token, burst)
    _, _, cache, _, burst = jax.lax.while_loop(goes_on, step, first)
    return cache, burst
