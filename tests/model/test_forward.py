"""`decoder.forward`'s choices, of attention and of what a gradient keeps, change nothing but rounding and memory."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningrl.model import decoder
from lightningrl.model.attention import attend_dense
from lightningrl.model.config import ModelConfig
from lightningrl.model.params import Params, init_params
from tests.model.tries import random_end

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=96,
    max_positions=128,
    value_head=True,
)
# XLA's CPU compiler orders work for concurrency and would compute all layers again at once: memory falls where it orders for memory.
FOR_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


@functools.cache
def row(length: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    end = np.stack([random_end(rng, length) for _ in range(2)])
    depth = [[int((of[:j] > j).sum()) for j in range(length)] for of in end]
    return rng.integers(1, 40, (2, length)).astype(np.int32), np.array(depth, np.int32), end


def lowered(config: ModelConfig, attention: Any, remat: Any, length: int = 64) -> Any:
    def loss(params: Params) -> jax.Array:
        return jnp.sum(decoder.forward(params, config, *row(length), attention=attention, remat=remat)[..., :5] ** 2)

    return jax.jit(jax.value_and_grad(loss)).lower(init_params(config, jax.random.key(0)))


@functools.cache
def loss_and_gradient(attention: Any, remat: Any) -> Any:
    return jax.tree.map(np.asarray, lowered(CONFIG, attention, remat).compile()(init_params(CONFIG, jax.random.key(0))))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["dense", "blocks", "pallas", attend_dense])
def test_every_attention_gives_the_same_gradients(attention: Any) -> None:
    for a, b in zip(jax.tree.leaves(loss_and_gradient(attention, "none")), jax.tree.leaves(loss_and_gradient(None, "none")), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(np.abs(b).max(), 1e-3))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["dense", "blocks"])
@pytest.mark.parametrize("remat", ["layers", "dots"])
def test_computing_again_gives_the_same_gradients(attention: str, remat: str) -> None:
    for a, b in zip(
        jax.tree.leaves(loss_and_gradient(attention, remat)), jax.tree.leaves(loss_and_gradient(attention, "none")), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(np.abs(b).max(), 1e-3))  # the compiler may fuse otherwise


@pytest.mark.slow
def test_computing_again_takes_less_memory() -> None:
    deep = dataclasses.replace(CONFIG, num_layers=4)
    none, dots, layers = (temporary(deep, remat) for remat in ("none", "dots", "layers"))
    assert layers < 0.8 * dots and dots < 0.8 * none


def temporary(config: ModelConfig, remat: Any) -> int:
    return lowered(config, "blocks", remat, length=256).compile(FOR_MEMORY).memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="remat='all' must be one of none, layers, dots"):
        decoder.forward(init_params(CONFIG, jax.random.key(0)), CONFIG, *row(), remat="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'flash' must be one of dense, blocks, pallas"):
        decoder.forward(init_params(CONFIG, jax.random.key(0)), CONFIG, *row(), attention="flash")  # type: ignore[arg-type]
