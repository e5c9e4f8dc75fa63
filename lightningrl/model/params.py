"""The parameters of a decoder: one table says shape, logical axes and initialiser of each; everything else is derived from it.

Layers are a list, not a stacked array: the layer loop is unrolled. Matmuls that read the same input are one array: `qkv`
holds, per key/value head, its query heads, then its key, then its value, so that splitting over key/value heads shards
all three alike.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lightningrl.model.config import ModelConfig

Params = dict[str, Any]  # a pytree of arrays
Initializer = Literal["normal", "ones", "zeros"]


@dataclasses.dataclass(frozen=True)
class ArrayInfo:
    """What a parameter is before it is an array."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical axis of each dimension, mapped to mesh axes by `sharding.py`
    init: Initializer = "normal"
    fan_in: int = 1  # normal initialisers have standard deviation 1/√fan_in


def abstract_params(config: ModelConfig) -> Params:
    """The tree of `ArrayInfo` that `init_params` and the shardings are made from."""
    c, d = config, config.hidden_size

    def layer() -> Params:
        q_k_v = c.queries_per_kv + 2
        tree = {
            "attention_norm": ArrayInfo((d,), (None,), "ones"),
            "qkv": ArrayInfo((d, c.num_kv_heads, q_k_v, c.head_dim), ("embed", "kv_heads", None, None), "normal", d),
            "attention_out": ArrayInfo(
                (c.num_kv_heads, c.queries_per_kv, c.head_dim, d),
                ("kv_heads", None, None, "embed"),
                "normal",
                c.num_heads * c.head_dim,
            ),
            "mlp_norm": ArrayInfo((d,), (None,), "ones"),
            "gate_up": ArrayInfo((d, 2, c.intermediate_size), ("embed", None, "mlp"), "normal", d),
            "down": ArrayInfo((c.intermediate_size, d), ("mlp", "embed"), "normal", c.intermediate_size),
        }
        if c.qkv_bias:
            tree["qkv_bias"] = ArrayInfo((c.num_kv_heads, q_k_v, c.head_dim), ("kv_heads", None, None), "zeros")
        if c.qk_norm:
            tree["q_norm"] = ArrayInfo((c.head_dim,), (None,), "ones")
            tree["k_norm"] = ArrayInfo((c.head_dim,), (None,), "ones")
        return tree

    # A tied embedding is also the output head: its rows are scaled for the head, and the input is scaled up by the first norm.
    params: Params = {
        "embedding": ArrayInfo((c.vocab_size, d), ("vocab", "embed"), "normal", d),
        "layers": [layer() for _ in range(c.num_layers)],
        "final_norm": ArrayInfo((d,), (None,), "ones"),
    }
    if not c.tie_embeddings:
        params["head"] = ArrayInfo((d, c.vocab_size), ("embed", "vocab"), "normal", d)
    if c.value_head:
        params["value_head"] = ArrayInfo((d,), (None,), "zeros")
    return params


def _is_info(x: Any) -> bool:
    return isinstance(x, ArrayInfo)


def init_params(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters; each array's key is derived from its place in the tree, so adding one changes no other."""

    def init(path: Any, info: ArrayInfo) -> jax.Array:
        if info.init == "ones":
            return jnp.ones(info.shape, dtype)
        if info.init == "zeros":
            return jnp.zeros(info.shape, dtype)
        name = jax.tree_util.keystr(path)
        seed = 2166136261
        for byte in name.encode():  # FNV-1a: stable across processes, unlike hash()
            seed = ((seed ^ byte) * 16777619) & 0xFFFFFFFF
        return jax.random.normal(jax.random.fold_in(key, np.uint32(seed)), info.shape, dtype) / math.sqrt(info.fan_in)

    return jax.tree_util.tree_map_with_path(init, abstract_params(config), is_leaf=_is_info)


def logical_axes(config: ModelConfig) -> Params:
    """The same tree with each parameter's logical axes."""
    return jax.tree.map(lambda info: info.axes, abstract_params(config), is_leaf=_is_info)


def shapes(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
    """The same tree as `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda info: jax.ShapeDtypeStruct(info.shape, dtype), abstract_params(config), is_leaf=_is_info)


def count_params(config: ModelConfig) -> int:
    """The number of scalars in the parameter tree."""
    return sum(math.prod(info.shape) for info in jax.tree.leaves(abstract_params(config), is_leaf=_is_info))
