"""Any slice of an array from slices of tensors: against the whole array, and never more read than the slice needs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest

from lightningrl.model import hf_layout
from lightningrl.model.config import ModelConfig
from lightningrl.model.hf_layout import Source, assemble, hf_sources, own_sources, tensor_of
from lightningrl.model.params import shapes
from tests.model.test_decoder import LLAMA_3, QWEN_3, QWEN_25

ONE_HEAD = dataclasses.replace(QWEN_25, num_heads=1, num_kv_heads=1)
CONFIGS = pytest.mark.parametrize("config", [LLAMA_3, QWEN_25, QWEN_3, ONE_HEAD], ids=["llama_3", "qwen_2.5", "qwen_3", "one_head"])
SOURCES = pytest.mark.parametrize("sources", [hf_sources, own_sources])


def arrays(config: ModelConfig, sources: Any) -> list[tuple[tuple[Source, ...], np.ndarray]]:
    """(what it is made of, a random array of its shape) of every parameter."""
    rng = np.random.default_rng(0)
    parts = jax.tree.leaves(sources(config), is_leaf=lambda x: isinstance(x, tuple))
    return [(part, rng.normal(size=info.shape)) for part, info in zip(parts, jax.tree.leaves(shapes(config)), strict=True)]


class Tensors:
    """The tensors of an array, and how many numbers of them were read."""

    def __init__(self, parts: tuple[Source, ...], array: np.ndarray):
        self.held = {source.name: tensor_of(array, source) for source in parts}
        self.read_count = 0

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        piece = self.held[name][index].copy()
        assert len(index) == self.held[name].ndim
        self.read_count += piece.size
        return piece


def everything(array: np.ndarray) -> tuple[slice, ...]:
    return (slice(None),) * array.ndim


@CONFIGS
@SOURCES
def test_an_array_is_cut_into_tensors_and_put_together_again(config: ModelConfig, sources: Any) -> None:
    for parts, array in arrays(config, sources):
        tensors = Tensors(parts, array)
        assert [held.shape for held in tensors.held.values()] == [source.shape(array.shape) for source in parts]
        np.testing.assert_array_equal(assemble(parts, array.shape, everything(array), array.dtype, tensors.read), array)
        assert tensors.read_count == array.size


@CONFIGS
@SOURCES
@pytest.mark.parametrize("block_bytes", [1, 100, 2**20])
def test_any_slice_is_that_of_the_array(config: ModelConfig, sources: Any, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_layout, "BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(1)
    for parts, array in arrays(config, sources):
        for _ in range(8):
            bounds = [sorted(rng.choice(size + 1, 2, replace=False)) for size in array.shape]
            index = tuple(slice(int(lo), int(hi)) for lo, hi in bounds)
            piece = assemble(parts, array.shape, index, np.float32, Tensors(parts, array).read)
            np.testing.assert_array_equal(piece, array[index].astype(np.float32))


@CONFIGS
@SOURCES
def test_a_shard_reads_its_share(config: ModelConfig, sources: Any) -> None:
    """Cut as the sharding rules cut: key/value heads, channels, the embedding's width, the vocabulary."""
    axes = {2: [(0,), (1,), (0, 1)], 3: [(0,), (2,)], 4: [(0,), (1,), (0, 1)]}
    for parts, array in arrays(config, sources):
        if array.ndim == 1 or parts[0].name.endswith("bias"):
            continue
        for cut in axes[array.ndim]:
            if any(array.shape[axis] % 2 for axis in cut):
                continue
            index = tuple(slice(size // 2, size) if axis in cut else slice(None) for axis, size in enumerate(array.shape))
            if parts[0].name.endswith("o_proj.weight") and 1 in cut:
                continue  # queries of one key/value head are never apart
            tensors = Tensors(parts, array)
            np.testing.assert_array_equal(assemble(parts, array.shape, index, array.dtype, tensors.read), array[index])
            assert tensors.read_count == math.prod(array[index].shape)


def test_fused_arrays_hold_heads_in_order() -> None:
    """Written out once: key/value head k has its G queries, its key, its value; q_proj holds the heads as k · G + g."""
    c = QWEN_25
    sources, shape = hf_sources(c)["layers"][0]["qkv"], shapes(c)["layers"][0]["qkv"].shape
    array = np.random.default_rng(2).normal(size=shape)
    q, k, v = (tensor_of(array, source) for source in sources)
    for head in range(c.num_kv_heads):
        for group in range(c.queries_per_kv):
            at = (head * c.queries_per_kv + group) * c.head_dim
            np.testing.assert_array_equal(q[at : at + c.head_dim], array[:, head, group].T)
        rows = slice(head * c.head_dim, (head + 1) * c.head_dim)
        np.testing.assert_array_equal(k[rows], array[:, head, -2].T)
        np.testing.assert_array_equal(v[rows], array[:, head, -1].T)
