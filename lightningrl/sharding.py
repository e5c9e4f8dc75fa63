"""Where arrays live: a mesh of (data, fsdp, tensor), and rules from logical axes to mesh axes.

Trying another sharding is changing the rules. Everything that decides about placement reads them from here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lightningrl.model.config import ModelConfig
from lightningrl.model.params import Params, logical_axes, shapes

MESH_AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The mesh axes that each logical axis is split over; None: not split."""

    batch: tuple[str, ...] | None = ("data", "fsdp")
    embed: str | None = "fsdp"
    kv_heads: str | None = "tensor"
    mlp: str | None = "tensor"
    vocab: str | None = "tensor"


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of the first data · fsdp · tensor devices.

    Raises:
      ValueError: there are fewer devices than that.
    """
    needed = data * fsdp * tensor
    devices = jax.devices()
    if needed > len(devices):
        raise ValueError(f"a mesh of {data} × {fsdp} × {tensor} needs {needed} devices, but there are {len(devices)}")
    return jax.make_mesh((data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:needed])


def params_sharding(config: ModelConfig, mesh: Mesh, rules: ShardingRules = ShardingRules()) -> Params:
    """A NamedSharding for every parameter. An axis that its mesh axis does not divide stays whole."""

    def place(axes: tuple[str | None, ...], info: jax.ShapeDtypeStruct) -> NamedSharding:
        names = [None if axis is None else getattr(rules, axis) for axis in axes]
        fits = [n if n is not None and size % mesh.shape[n] == 0 else None for n, size in zip(names, info.shape, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree.map(place, logical_axes(config), shapes(config), is_leaf=lambda x: isinstance(x, tuple))


def batch_sharding(mesh: Mesh, rules: ShardingRules = ShardingRules()) -> NamedSharding:
    """Rows split over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(rules.batch))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_multiple(mesh: Mesh, rules: ShardingRules = ShardingRules()) -> int:
    """How many ways the batch is split: every B is a multiple of it."""
    size = 1
    for axis in rules.batch or ():
        size *= mesh.shape[axis]
    return size


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Puts every array of a tree where `sharding` says."""
    return jax.device_put(tree, sharding)
