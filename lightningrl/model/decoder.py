"""The decoder as pure functions of a parameter pytree.

`forward` computes rows of tries for training; `extend` computes some new tokens of some conversations against a key/value
cache, for sampling. Both run the same `block`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from lightningrl.model.attention import Implementation, TreeAttention, attend_tree, choose_attention
from lightningrl.model.config import ModelConfig
from lightningrl.model.params import Params
from lightningrl.model.rope import rotate, rotation
from lightningrl.table import Array

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (q [B,K,G,T,d], k [B,K,T,d], v [B,K,T,d]) -> [B,K,G,T,d]
Remat = Literal["none", "layers", "dots"]


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / √(mean(x²) + ε) · scale (arXiv 1910.07467), in float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)).astype(x.dtype) * scale


def block(layer: Params, config: ModelConfig, x: jax.Array, rope: tuple[jax.Array, jax.Array], attention: Attention) -> jax.Array:
    """One layer. x: float [B, T, D]; rope: cos and sin [B, 1, 1, T, d/2]; `attention` sees the new tokens' q, k and v."""
    c, (b, t, d) = config, x.shape
    groups = c.queries_per_kv
    flat = x.reshape(b * t, d)  # matmuls over 2-D operands: XLA on CPU is quick only there

    h = rms_norm(flat, layer["attention_norm"], c.norm_eps)
    qkv = (h @ layer["qkv"].reshape(d, -1)).reshape(b, t, c.num_kv_heads, groups + 2, c.head_dim)
    if c.qkv_bias:
        qkv = qkv + layer["qkv_bias"]
    qkv = qkv.transpose(0, 2, 3, 1, 4)  # [B, K, G + 2, T, d]
    q, k, v = qkv[:, :, :groups], qkv[:, :, groups], qkv[:, :, groups + 1]
    if c.qk_norm:
        q, k = rms_norm(q, layer["q_norm"], c.norm_eps), rms_norm(k, layer["k_norm"], c.norm_eps)
    cos, sin = rope
    mixed = attention(rotate(q, cos, sin), rotate(k, cos[:, 0], sin[:, 0]), v)
    mixed = mixed.transpose(0, 3, 1, 2, 4).reshape(b * t, -1)
    flat = flat + mixed @ layer["attention_out"].reshape(-1, d)

    h = rms_norm(flat, layer["mlp_norm"], c.norm_eps)
    gate, up = jnp.split(h @ layer["gate_up"].reshape(d, -1), 2, axis=-1)
    return (flat + (jax.nn.silu(gate) * up) @ layer["down"]).reshape(b, t, d)


def rope_of(config: ModelConfig, positions: Array) -> tuple[jax.Array, jax.Array]:
    cos, sin = rotation(config, positions)
    return cos[:, None, None], sin[:, None, None]


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Array,
    positions: Array,
    end: Array,
    *,
    attention: Implementation | TreeAttention | None = None,
    remat: Remat = "none",
) -> jax.Array:
    """Hidden states of rows of tries, after the final norm.

    Args:
      tokens: int32 [B, T]; positions: int32 [B, T], depth in the trie; end: int32 [B, T], see `attention.tree_mask`.
      attention: an implementation of `attention.attend_tree` or a function; None: that of `choose_attention`.
      remat: what a gradient computes again instead of keeping it. "none": keeps all; "layers": keeps each layer's input and
        computes the layer again; "dots": keeps the results of the products with parameters, too. XLA's CPU compiler computes all
        layers again at once, and memory hardly falls, unless it is compiled with the option
        xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED.

    Returns:
      float [B, T, D]. Padding's are finite and mean nothing.

    Raises:
      ValueError: an unknown `attention` or `remat`.
    """
    chosen = choose_attention(tokens.shape[1], jax.default_backend()) if attention is None else attention
    rope = rope_of(config, positions)

    def run(layer: Params, x: jax.Array, rope: tuple[jax.Array, jax.Array], end: Array) -> jax.Array:
        return block(layer, config, x, rope, functools.partial(attend_tree, end=end, implementation=chosen))

    run = rematerialized(run, remat)
    x = params["embedding"][tokens]
    for layer in params["layers"]:
        x = run(layer, x, rope, end)
    return rms_norm(x, params["final_norm"], config.norm_eps)


def rematerialized(run: Callable[..., jax.Array], remat: Remat) -> Callable[..., jax.Array]:
    """`run`, whose gradient keeps what `remat` says; see `forward`."""
    match remat:
        case "none":
            return run
        case "layers":
            return jax.checkpoint(run)
        case "dots":
            return jax.checkpoint(run, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    raise ValueError(f"remat={remat!r} must be one of {', '.join(get_args(Remat))}")


def logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Next-token logits. hidden: float [..., D] -> float32 at least, [..., V]."""
    head = params["embedding"].T if config.tie_embeddings else params["head"]
    return jnp.matmul(hidden, head, preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32))


def values(params: Params, hidden: jax.Array) -> jax.Array:
    """The critic's value of the state after each token. hidden: float [..., D] -> float32 at least, [...]; 0 without a critic."""
    if "value_head" not in params:
        return jnp.zeros(hidden.shape[:-1], jnp.float32)
    return jnp.sum(hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32)) * params["value_head"], axis=-1)
