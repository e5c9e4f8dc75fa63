"""The key/value cache, and the forward pass that reads and extends it.

A cache has fixed slots, one conversation each. Writing is a scatter into a donated buffer, so nothing is copied.
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

    keys: list[jax.Array]  # per layer: float [S, K, L, d]; S slots, L context length
    values: list[jax.Array]  # per layer: float [S, K, L, d]


def init_cache(config: ModelConfig, slots: int, length: int, dtype: jnp.dtype = jnp.float32) -> KVCache:
    shape = (slots, config.num_kv_heads, length, config.head_dim)
    return KVCache(
        keys=[jnp.zeros(shape, dtype) for _ in range(config.num_layers)],
        values=[jnp.zeros(shape, dtype) for _ in range(config.num_layers)],
    )


def extend(
    params: Params, config: ModelConfig, cache: KVCache, slots: Array | None, tokens: Array, start: Array
) -> tuple[jax.Array, KVCache]:
    """Computes new tokens of some slots and writes their keys and values into the cache.

    Args:
      slots: int32 [P], which slot each row belongs to; a row with an index ≥ S writes nothing. None: row i is slot i.
      tokens: int32 [P, C], the new tokens; start: int32 [P], how many tokens the slot holds already.

    Returns:
      Hidden states after the final norm, float [P, C, D], and the cache. A token sees its slot's tokens before it and itself.
    """
    (rows, width), length = tokens.shape, cache.keys[0].shape[2]
    positions = start[:, None] + jnp.arange(width)
    mask = jnp.arange(length) <= positions[:, :, None]  # [P, C, L]
    target = jnp.arange(rows) if slots is None else slots
    rope = rope_of(config, positions)
    x = params["embedding"][tokens]
    keys, values = list(cache.keys), list(cache.values)
    for i, layer in enumerate(params["layers"]):

        def attention(q: jax.Array, k: jax.Array, v: jax.Array, i: int = i) -> jax.Array:
            at = (target[:, None], slice(None), positions)
            keys[i] = keys[i].at[at].set(k.transpose(0, 2, 1, 3), mode="drop")
            values[i] = values[i].at[at].set(v.transpose(0, 2, 1, 3), mode="drop")
            seen_k = keys[i] if slots is None else keys[i].at[slots].get(mode="clip")
            seen_v = values[i] if slots is None else values[i].at[slots].get(mode="clip")
            return attend(q, seen_k, seen_v, mask)

        x = block(layer, config, x, rope, attention)
    return rms_norm(x, params["final_norm"], config.norm_eps), KVCache(keys=keys, values=values)
