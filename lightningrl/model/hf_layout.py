"""How the tensors of a Hugging Face checkpoint stand in our arrays.

Theirs are [out, in], ours [in, out]; theirs has queries, keys and values apart, ours has them in one array per layer, and
gate and up likewise. A `Source` says where a tensor stands in an array, so that any slice of the array, such as one
device's shard, can be read from slices of the tensors, and written back.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lightningrl.model.config import ModelConfig
from lightningrl.model.params import ArrayInfo, Params, abstract_params

Read = Callable[[str, tuple[slice, ...]], np.ndarray]  # (name of a tensor, slice of each of its dimensions) -> that slice

BLOCK_BYTES = 4 * 2**20  # what is read at once: the copy that is turned and cast stays this small


@dataclasses.dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint and its place in an array of ours."""

    name: str
    dims: tuple[tuple[int, ...], ...]  # for each dimension of the tensor, the axes of ours flattened in it, outermost first
    axis: int = 0  # the tensor is the part `start` … `stop` of the array along this axis,
    start: int = 0
    stop: int | None = None  # None: up to its end

    def part(self, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """The index of the tensor's part in an array of `shape`."""
        index = [slice(0, size) for size in shape]
        index[self.axis] = slice(self.start, shape[self.axis] if self.stop is None else self.stop)
        return tuple(index)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, for an array of `shape`."""
        sizes = [part.stop - part.start for part in self.part(shape)]
        return tuple(math.prod(sizes[axis] for axis in dim) for dim in self.dims)

    @property
    def order(self) -> tuple[int, ...]:
        return tuple(axis for dim in self.dims for axis in dim)


def hf_sources(config: ModelConfig) -> Params:
    """The tree of parameters, each as the tuple of `Source`s that it is made of; a value head is a tensor of its own."""
    g = config.queries_per_kv

    def layer(i: int) -> Params:
        def name(rest: str) -> str:
            return f"model.layers.{i}.{rest}"

        def qkv(kind: str, dims: tuple[tuple[int, ...], ...], axis: int) -> tuple[Source, ...]:
            bounds = {"q": (0, g), "k": (g, g + 1), "v": (g + 1, g + 2)}
            return tuple(Source(name(f"self_attn.{which}_proj.{kind}"), dims, axis, *span) for which, span in bounds.items())

        def mlp(which: int, kind: str) -> Source:
            return Source(name(f"mlp.{kind}_proj.weight"), ((1, 2), (0,)), 1, which, which + 1)

        tree: Params = {
            "attention_norm": (Source(name("input_layernorm.weight"), ((0,),)),),
            "qkv": qkv("weight", ((1, 2, 3), (0,)), 2),
            "attention_out": (Source(name("self_attn.o_proj.weight"), ((3,), (0, 1, 2))),),
            "mlp_norm": (Source(name("post_attention_layernorm.weight"), ((0,),)),),
            "gate_up": (mlp(0, "gate"), mlp(1, "up")),
            "down": (Source(name("mlp.down_proj.weight"), ((1,), (0,))),),
        }
        if config.qkv_bias:
            tree["qkv_bias"] = qkv("bias", ((0, 1, 2),), 1)
        if config.qk_norm:
            tree["q_norm"] = (Source(name("self_attn.q_norm.weight"), ((0,),)),)
            tree["k_norm"] = (Source(name("self_attn.k_norm.weight"), ((0,),)),)
        return tree

    tree: Params = {
        "embedding": (Source("model.embed_tokens.weight", ((0,), (1,))),),
        "layers": [layer(i) for i in range(config.num_layers)],
        "final_norm": (Source("model.norm.weight", ((0,),)),),
    }
    if not config.tie_embeddings:
        tree["head"] = (Source("lm_head.weight", ((1,), (0,))),)
    if config.value_head:
        tree["value_head"] = (Source("value_head", ((0,),)),)
    return tree


def own_sources(config: ModelConfig) -> Params:
    """The same for a folder that `policy.save_policy` wrote: each array as it is, under its dotted path."""

    def source(path: Any, info: ArrayInfo) -> tuple[Source, ...]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return (Source(name, tuple((axis,) for axis in range(len(info.shape)))),)

    return jax.tree_util.tree_map_with_path(source, abstract_params(config), is_leaf=lambda x: isinstance(x, ArrayInfo))


def tensor_of(array: np.ndarray, source: Source) -> np.ndarray:
    """The tensor that stands at `source` in an array, in the tensor's layout."""
    return array[source.part(array.shape)].transpose(source.order).reshape(source.shape(array.shape))


def assemble(sources: tuple[Source, ...], shape: tuple[int, ...], index: tuple[slice, ...], dtype: Any, read: Read) -> np.ndarray:
    """`array[index]` of an array of `shape` that is made of `sources`, cast to `dtype`; reads no more than that slice needs.

    Where an axis that a tensor flattens behind another one is cut, whole runs of it are read: shards of heads or of channels
    are cut at the outermost axis and read exactly.
    """
    wanted = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    out = _buffer([hi - lo for lo, hi in wanted], np.dtype(dtype))
    for source in sources:
        _fill(out, source, shape, wanted, read)
    return out


def _buffer(shape: list[int], dtype: np.dtype) -> np.ndarray:
    # A large one is a mapping of its own: the system has it back when it is dropped, while malloc keeps many of tens of megabytes. It
    # begins on a page, so a CPU device takes it over as it is.
    if (size := math.prod(shape) * dtype.itemsize) < BLOCK_BYTES:
        return np.empty(shape, dtype)
    return np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)


def _fill(out: np.ndarray, source: Source, shape: tuple[int, ...], wanted: list[tuple[int, int]], read: Read) -> None:
    part, axis = source.part(shape), source.axis
    sizes = [piece.stop - piece.start for piece in part]
    lo, hi = max(wanted[axis][0], part[axis].start), min(wanted[axis][1], part[axis].stop)
    if lo >= hi:
        return
    here = [slice(None)] * len(shape)
    here[axis] = slice(lo - wanted[axis][0], hi - wanted[axis][0])
    target = out[tuple(here)].transpose(source.order)
    wanted = [(lo - part[axis].start, hi - part[axis].start) if i == axis else span for i, span in enumerate(wanted)]

    first, *others = [_Run.of(dim, sizes, wanted) for dim in source.dims]
    width = math.prod(run.unit * (run.hi - run.lo) for run in others) * first.unit * out.itemsize
    step = max(1, BLOCK_BYTES // max(1, width))
    for at in range(first.lo, first.hi, step):
        runs = [dataclasses.replace(first, lo=at, hi=min(at + step, first.hi)), *others]
        block = read(source.name, tuple(slice(run.lo * run.unit, run.hi * run.unit) for run in runs))
        block = block.reshape([size for run in runs for size in run.unflattened])
        rows = (slice(None),) * first.position + (slice(at - first.lo, runs[0].hi - first.lo),)
        target[rows] = block[tuple(piece for run in runs for piece in run.inner)]


@dataclasses.dataclass(frozen=True)
class _Run:
    """A slice of one dimension of a tensor: steps `lo` … `hi` along the outermost axis that it flattens, each `unit` long."""

    lo: int
    hi: int
    unit: int
    position: int  # of the outermost axis; those before it have size 1
    rest: tuple[int, ...]  # sizes of the axes behind it
    cut: tuple[slice, ...]  # what is wanted of those

    @staticmethod
    def of(dim: tuple[int, ...], sizes: list[int], wanted: list[tuple[int, int]]) -> _Run:
        position = next((i for i, axis in enumerate(dim) if sizes[axis] > 1), len(dim) - 1)
        behind = dim[position + 1 :]
        rest = tuple(sizes[axis] for axis in behind)
        return _Run(*wanted[dim[position]], math.prod(rest), position, rest, tuple(slice(*wanted[axis]) for axis in behind))

    @property
    def unflattened(self) -> tuple[int, ...]:
        return (*(1,) * self.position, self.hi - self.lo, *self.rest)

    @property
    def inner(self) -> tuple[slice, ...]:
        return (*(slice(None),) * (self.position + 1), *self.cut)
