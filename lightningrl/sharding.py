"""Where arrays live: a mesh of (data, fsdp, tensor), and rules from logical axes to mesh axes.

Trying another sharding is changing the rules. Everything that decides about placement reads them from here. With several
processes every one of them holds its shards of the same global arrays; `place` makes those, `local` reads them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lightningrl.model.attention import Implementation, TreeAttention, attend_tree, choose_attention
from lightningrl.model.cache import KVCache
from lightningrl.model.config import ModelConfig
from lightningrl.model.params import Params, logical_axes, shapes
from lightningrl.table import Array

MESH_AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The mesh axes that each logical axis is split over; None: not split."""

    batch: tuple[str, ...] | None = ("data", "fsdp")  # rows and edges of a batch
    slots: tuple[str, ...] | None = ("data", "fsdp")  # conversations of the sampler's cache
    embed: str | None = "fsdp"
    kv_heads: str | None = "tensor"
    mlp: str | None = "tensor"
    vocab: str | None = "tensor"


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of the first data · fsdp · tensor devices; with several processes, of all of theirs.

    Devices of a process are neighbours along `tensor`, then `fsdp`: what talks most talks within a host.

    Raises:
      ValueError: there are fewer devices than that, or several processes whose devices would not all take part.
    """
    needed, devices = data * fsdp * tensor, jax.devices()
    if needed > len(devices):
        raise ValueError(f"a mesh of {data} × {fsdp} × {tensor} needs {needed} devices, but there are {len(devices)}")
    if jax.process_count() > 1 and needed < len(devices):
        raise ValueError(
            f"a mesh of {data} × {fsdp} × {tensor} leaves out devices of the {jax.process_count()} processes: "
            f"data_parallel · fsdp · tensor_parallel must be {len(devices)}"
        )
    return _mesh((data, fsdp, tensor), devices[:needed])


def _mesh(shape: tuple[int, int, int], devices: Sequence[jax.Device]) -> Mesh:
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def sampling_mesh(mesh: Mesh) -> Mesh:
    """The part of a mesh that this process can sample on alone: all of it, or its own devices.

    `tensor` stays as large as its devices allow; the rest is `data`, as each decoding step reads every parameter.
    """
    mine = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    if len(mine) == mesh.size:
        return mesh
    tensor = math.gcd(mesh.shape["tensor"], len(mine))
    return _mesh((len(mine) // tensor, 1, tensor), mine)


def params_sharding(config: ModelConfig, mesh: Mesh, rules: ShardingRules = ShardingRules()) -> Params:
    """A NamedSharding for every parameter. An axis that its mesh axis does not divide stays whole."""

    def at(axes: tuple[str | None, ...], info: jax.ShapeDtypeStruct) -> NamedSharding:
        names = [None if axis is None else getattr(rules, axis) for axis in axes]
        return _sharding(mesh, info.shape, names)

    return jax.tree.map(at, logical_axes(config), shapes(config), is_leaf=lambda x: isinstance(x, tuple))


def optimizer_sharding(optimizer: optax.GradientTransformation, params: Params, params_at: Params, whole: NamedSharding) -> Any:
    """A NamedSharding for every array of an optimizer's state: what is kept per parameter lies as the parameter does.

    Such an array is one whose path in the state ends with the path of a parameter of its shape.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`s; params_at: their shardings. whole: of everything else, such as counts.
    """
    leaves, places = jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(params_at)
    known = {(path, leaf.shape): at for (path, leaf), at in zip(leaves, places, strict=True)}

    def at(path: tuple[Any, ...], info: jax.ShapeDtypeStruct) -> NamedSharding:
        ends = (path[start:] for start in range(len(path) + 1))
        return next((known[end, info.shape] for end in ends if (end, info.shape) in known), whole)

    return jax.tree_util.tree_map_with_path(at, jax.eval_shape(optimizer.init, params))


def cache_sharding(config: ModelConfig, mesh: Mesh, slots: int, rules: ShardingRules = ShardingRules()) -> KVCache:
    """A NamedSharding for every array [S, K, L, d] of the sampler's cache: slots and key/value heads are split where they divide."""
    at = _sharding(mesh, (slots, config.num_kv_heads), [rules.slots, rules.kv_heads])
    return KVCache(keys=[at] * config.num_layers, values=[at] * config.num_layers)  # type: ignore[list-item]


def batch_sharding(mesh: Mesh, rules: ShardingRules = ShardingRules()) -> NamedSharding:
    """Rows split over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(rules.batch))


def attention_over(mesh: Mesh, config: ModelConfig, chosen: Implementation | None, rules: ShardingRules = ShardingRules()) -> TreeAttention:
    """`attend_tree` in which every device attends in its own rows and key/value heads, and sends nothing.

    The compiler cannot split a kernel, and splits the loops of blockwise attention badly, so they are told their part. Heads that
    `tensor` does not divide are attended to by all of it.

    Args:
      chosen: an implementation; None: that of `choose_attention` for the length of the rows.
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, end: Array) -> jax.Array:
        implementation = chosen or choose_attention(q.shape[3], jax.default_backend())
        return attend_tree(q, k, v, end, implementation=implementation)

    if mesh.size == 1:
        return attend
    heads = rules.kv_heads if config.num_kv_heads % _ways(mesh, rules.kv_heads) == 0 else None
    rows, rows_and_heads = PartitionSpec(rules.batch), PartitionSpec(rules.batch, heads)
    # What varies over which axis is not tracked through a kernel.
    return jax.shard_map(attend, mesh=mesh, in_specs=(rows_and_heads,) * 3 + (rows,), out_specs=rows_and_heads, check_vma=False)


def edges_sharding(mesh: Mesh, edges: int, rules: ShardingRules = ShardingRules()) -> NamedSharding:
    """Edges [E] of a micro-batch split over the batch axes, so that each device scores its part of them; whole where they don't divide."""
    return _sharding(mesh, (edges,), [rules.batch])


def _sharding(mesh: Mesh, shape: Sequence[int], names: Sequence[str | tuple[str, ...] | None]) -> NamedSharding:
    fits = [name if size % _ways(mesh, name) == 0 else None for size, name in zip(shape, names, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*fits))


def _ways(mesh: Mesh, names: str | tuple[str, ...] | None) -> int:
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(mesh.shape[name] for name in names)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_multiple(mesh: Mesh, rules: ShardingRules = ShardingRules()) -> int:
    """How many ways the batch is split: every B is a multiple of it."""
    return _ways(mesh, rules.batch)


def place(tree: Any, at: Any) -> Any:
    """Puts every array of a tree where `at` says, a sharding or a tree of them; one that lies there already is not copied.

    With several processes each holds the whole of every array before, equal on all of them, and its shards of it after.
    """
    at = jax.tree.map(lambda _: at, tree) if isinstance(at, jax.sharding.Sharding) else at
    return jax.tree.map(_placed, tree, at)


def _placed(x: Any, at: jax.sharding.Sharding) -> jax.Array:
    if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(at, x.ndim):
        return x
    if at.is_fully_addressable:
        return jax.device_put(x, at)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return _moved(at)(x)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, at, lambda index: host[index])


@functools.lru_cache(maxsize=256)
def _moved(at: jax.sharding.Sharding) -> Any:
    return jax.jit(lambda x: x, out_shardings=at)


def local(tree: Any) -> Any:
    """This process' own copy of arrays that are whole on every device: what it may compute with alone."""
    return jax.tree.map(lambda x: x if x.is_fully_addressable else x.addressable_data(0), tree)


HOST = "host"  # NumPy arrays


def gathered(tree: Any, at: Any) -> Any:
    """Copies of sharded arrays for this process; a step that all processes take together.

    Arrays are gathered one by one, so that one at a time is whole on a device.

    Args:
      at: a sharding over devices of this process, or a tree of them; HOST; None: this process takes part and keeps nothing.
    """
    if at is None or at is HOST or isinstance(at, jax.sharding.Sharding):
        return jax.tree.map(lambda x: _gathered(x, at), tree)
    return jax.tree.map(_gathered, tree, at)


def _gathered(x: jax.Array, at: Any) -> Any:
    if not x.is_fully_addressable and not x.is_fully_replicated:
        x = _moved(replicated(x.sharding.mesh))(x)  # type: ignore[attr-defined]
    if at is None:
        return None
    x = local(x)
    # A copy even where it lies there already: the next update consumes what it is made from.
    return np.array(x) if at is HOST else jax.device_put(x, at, may_alias=False)
