"""Low-rank adapters (LoRA, arXiv 2106.09685): W + s·A·B, of which A and B are trained and W is not.

An adapter is a tree beside that of the parameters, with a pair for each targeted array:

    {"layers": [{"qkv": {"a": [*input, r], "b": [r, *output]}, …}], "value_head": [D]}

A has the input dimensions of its array and B the output dimensions, so that A·B has its shape whatever that is, and each is
sharded as those dimensions are. A critic is trained whole: its entry is what is added to the base's.

The adapter is merged into the weights, also within the train step: trainer and sampler then compute with one set of weights, and
nothing else knows of adapters. The step pays for it with the gradient of W itself, dW = xᵀ dy, from which dA = s·dW·Bᵀ and
dB = s·Aᵀ·dW follow; x·A·B would need neither, which is a third of the matmuls. dW of one array is used up as soon as it is there;
what accumulates over micro-batches, and the optimizer's state, are of the adapter's size.

`qkv` is one array, so its adapter is one: queries, keys and values share A. Three adapters of rank r are one of rank 3 r, and
`gate_up` likewise.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lightningrl.model.config import ModelConfig
from lightningrl.model.params import ArrayInfo, Params, abstract_params

Adapter = dict[str, Any]  # a pytree of arrays, see the module
TARGETS = {"qkv": 1, "attention_out": 3, "gate_up": 1, "down": 1}  # a layer's arrays that can be adapted, and their input dimensions


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Which arrays get an adapter of which size."""

    rank: int  # r ≥ 1; one of more than an array's smaller side has more numbers than the array
    alpha: float = 16.0  # what is added is scaled by alpha / rank (§4.1), so that a rank can be tried without another learning rate
    targets: tuple[str, ...] = tuple(TARGETS)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"an adapter's rank is {self.rank}: it must be at least 1")
        if not self.alpha > 0:
            raise ValueError(f"an adapter's alpha is {self.alpha}: it must be more than 0")
        if not self.targets:
            raise ValueError(f"an adapter needs a target: choose from {', '.join(TARGETS)}")
        for name in self.targets:
            if name not in TARGETS:
                raise ValueError(f"no adapter can be put on {name!r}: choose from {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        """s = alpha / rank."""
        return self.alpha / self.rank


def abstract_adapter(config: ModelConfig, settings: LoraSettings) -> Adapter:
    """The tree of `ArrayInfo` of an adapter, read off that of the parameters."""

    def pair(name: str, info: ArrayInfo) -> Adapter:
        n = TARGETS[name]
        return {
            "a": ArrayInfo((*info.shape[:n], settings.rank), (*info.axes[:n], None), "normal", math.prod(info.shape[:n])),
            "b": ArrayInfo((settings.rank, *info.shape[n:]), (None, *info.axes[n:]), "zeros"),
        }

    params = abstract_params(config)
    targets = [name for name in TARGETS if name in settings.targets]
    tree: Adapter = {"layers": [{name: pair(name, layer[name]) for name in targets} for layer in params["layers"]]}
    if config.value_head:
        tree["value_head"] = dataclasses.replace(params["value_head"], init="zeros")
    return tree


def init_lora(config: ModelConfig, key: jax.Array, settings: LoraSettings, dtype: Any = jnp.float32) -> Adapter:
    """An adapter that changes nothing yet: A normal with standard deviation 1/√fan_in, B and the critic's part 0 (§4.1).

    The paper says of A only that it is Gaussian. Each array's key is derived from its layer and name: a target more changes no other.
    """

    def init(path: Any, info: ArrayInfo) -> jax.Array:
        if info.init == "zeros":
            return jnp.zeros(info.shape, dtype)
        _, layer, name, _ = path
        own = jax.random.fold_in(jax.random.fold_in(key, layer.idx), list(TARGETS).index(name.key))
        return jax.random.normal(own, info.shape, dtype) / math.sqrt(info.fan_in)

    return jax.tree_util.tree_map_with_path(init, abstract_adapter(config, settings), is_leaf=_is_info)


def adapter_shapes(config: ModelConfig, settings: LoraSettings, dtype: Any = jnp.float32) -> Adapter:
    """The same tree as `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda info: jax.ShapeDtypeStruct(info.shape, dtype), abstract_adapter(config, settings), is_leaf=_is_info)


def adapter_sharding(params_at: Params, config: ModelConfig, settings: LoraSettings) -> Adapter:
    """A NamedSharding for every array of an adapter: A lies as its array's input dimensions do, B as the output dimensions.

    Args:
      params_at: of the parameters, from `sharding.params_sharding`.
    """

    def pair(name: str, at: NamedSharding) -> Adapter:
        n = TARGETS[name]
        return {
            "a": NamedSharding(at.mesh, PartitionSpec(*at.spec[:n], None)),
            "b": NamedSharding(at.mesh, PartitionSpec(None, *at.spec[n:])),
        }

    tree = abstract_adapter(config, settings)
    layers = [{name: pair(name, at[name]) for name in layer} for layer, at in zip(tree["layers"], params_at["layers"], strict=True)]
    return {"layers": layers} | {name: params_at[name] for name in tree if name != "layers"}


def merge(params: Params, adapter: Adapter, scale: float) -> Params:
    """W + s·(A·B) for every target, the other arrays as they are.

    A·B first, in the arrays' own dtype and at full matmul precision, then scaled, then added. With B = 0 it is W bit for bit.

    Args:
      params: of the base; adapter: of `init_lora`, for the same config; scale: s = alpha / rank.
    """

    def merged(layer: Params, pairs: Adapter) -> Params:
        added = {name: jnp.tensordot(pair["a"], pair["b"], axes=1, precision="highest") for name, pair in pairs.items()}
        return layer | {name: layer[name] + scale * ab for name, ab in added.items()}

    out = params | {"layers": [merged(layer, pairs) for layer, pairs in zip(params["layers"], adapter["layers"], strict=True)]}
    if "value_head" in adapter:
        out["value_head"] = params["value_head"] + math.copysign(1.0, scale) * adapter["value_head"]
    return out


def unmerge(params: Params, adapter: Adapter, scale: float) -> Params:
    """Takes a merged adapter out again: the base to rounding, not bit for bit."""
    return merge(params, adapter, -scale)


def count_adapter(config: ModelConfig, settings: LoraSettings) -> int:
    """The number of scalars that are trained."""
    return sum(math.prod(info.shape) for info in jax.tree.leaves(abstract_adapter(config, settings), is_leaf=_is_info))


def _is_info(x: Any) -> bool:
    return isinstance(x, ArrayInfo)
