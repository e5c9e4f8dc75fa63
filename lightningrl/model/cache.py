"""The key/value cache, and the forward pass that reads and extends it.

A cache has fixed slots, one conversation each. Keys lie transposed, so that decoding's q kᵀ is a plain matrix product (three
times as fast on CPU). Writing is into a donated buffer, so nothing is copied: tests/sampler/test_steps.py reads that in the
compiled programs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from lightningrl.model.attention import attend
from lightningrl.model.config import ModelConfig
from lightningrl.model.decoder import block, rms_norm, rope_of
from lightningrl.model.params import Params
from lightningrl.table import Array


@struct.dataclass
class KVCache:
    """Keys and values of what each slot has seen. What lies past a slot's length is stale and masked."""

    keys: list[jax.Array]  # per layer: float [S, K, d, L]; S slots, L context length
    values: list[jax.Array]  # per layer: float [S, K, L, d]


def init_cache(config: ModelConfig, slots: int, length: int, dtype: jnp.dtype = jnp.float32) -> KVCache:
    kv, d = config.num_kv_heads, config.head_dim
    return KVCache(
        keys=[jnp.zeros((slots, kv, d, length), dtype) for _ in range(config.num_layers)],
        values=[jnp.zeros((slots, kv, length, d), dtype) for _ in range(config.num_layers)],
    )


def cache_bytes(config: ModelConfig, tokens: int, itemsize: int = 4) -> int:
    """What a cache of `tokens` = S · L tokens takes."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * tokens * itemsize


def extend(
    params: Params, config: ModelConfig, cache: KVCache, slots: Array | None, tokens: Array, start: Array
) -> tuple[jax.Array, KVCache]:
    """Computes new tokens of some slots and writes their keys and values into the cache.

    A layer's keys and values of all rows are written before any row reads: rows may be consecutive pieces of one slot.

    Args:
      slots: int32 [P], which slot each row belongs to; a row with an index ≥ S writes nothing. None: row i is slot i.
      tokens: int32 [P, C], the new tokens; start: int32 [P], how many tokens the slot holds before the row's.

    Returns:
      Hidden states after the final norm, float [P, C, D], and the cache. A token sees its slot's tokens before it and itself.
    """
    (rows, width), length = tokens.shape, cache.values[0].shape[2]
    positions = start[:, None] + jnp.arange(width)
    mask = jnp.arange(length) <= positions[:, :, None]  # [P, C, L]
    target = (jnp.arange(rows) if slots is None else slots)[:, None]
    rope = rope_of(config, positions)
    x = params["embedding"][tokens]
    keys, values = list(cache.keys), list(cache.values)
    for i, layer in enumerate(params["layers"]):

        def attention(q: jax.Array, k: jax.Array, v: jax.Array, i: int = i) -> jax.Array:
            keys[i] = keys[i].at[target, :, :, positions].set(k.transpose(0, 2, 1, 3), mode="drop")
            values[i] = values[i].at[target, :, positions].set(v.transpose(0, 2, 1, 3), mode="drop")
            seen_k = keys[i] if slots is None else keys[i].at[slots].get(mode="clip")
            seen_v = values[i] if slots is None else values[i].at[slots].get(mode="clip")
            return attend(q, seen_k.swapaxes(2, 3), seen_v, mask)

        x = block(layer, config, x, rope, attention)
    return rms_norm(x, params["final_norm"], config.norm_eps), KVCache(keys=keys, values=values)


def copy_blocks(source: KVCache, target: KVCache, copies: Array, count: Array, width: int) -> KVCache:
    """Copies some blocks of `width` tokens from one cache to another, which is donated.

    Args:
      copies: int32 [N, 4], of each copy: slot and first token in the source, slot and first token in the target.
      count: int32 scalar, how many of them are to be made, from the first.

    Returns:
      The target.
    """

    def copy(i: jax.Array, target: KVCache) -> KVCache:
        from_slot, from_token, to_slot, to_token = copies[i]

        def keys(s: jax.Array, t: jax.Array) -> jax.Array:
            block = jax.lax.dynamic_slice(s, (from_slot, 0, 0, from_token), (1, *s.shape[1:3], width))
            return jax.lax.dynamic_update_slice(t, block, (to_slot, 0, 0, to_token))

        def values(s: jax.Array, t: jax.Array) -> jax.Array:
            block = jax.lax.dynamic_slice(s, (from_slot, 0, from_token, 0), (1, s.shape[1], width, s.shape[3]))
            return jax.lax.dynamic_update_slice(t, block, (to_slot, 0, to_token, 0))

        return KVCache(keys=jax.tree.map(keys, source.keys, target.keys), values=jax.tree.map(values, source.values, target.values))

    return jax.lax.fori_loop(0, count, copy, target)
