"""What blocks are for: memory linear in the row, and no work for blocks that nobody sees. Values: test_attention.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningrl.model.attention import attend_dense
from lightningrl.model.attention_blocks import attend_blocks
from lightningrl.model.attention_pallas import attend_pallas


def compiled(attention: Callable[..., jax.Array], length: int) -> Any:
    """The compiled gradient for a row of this length; 2 × 2 heads of 32."""
    q, k = jax.ShapeDtypeStruct((1, 2, 2, length, 32), jnp.float32), jax.ShapeDtypeStruct((1, 2, length, 32), jnp.float32)
    end = jax.ShapeDtypeStruct((1, length), jnp.int32)
    gradient = jax.grad(lambda q, k, v, end: jnp.sum(attention(q, k, v, end) ** 2), argnums=(0, 1, 2))
    return jax.jit(gradient).lower(q, k, k, end).compile()


def temporary(attention: Callable[..., jax.Array], length: int) -> int:
    return compiled(attention, length).memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_is_linear_in_the_row() -> None:
    small, large = temporary(attend_blocks, 1024), temporary(attend_blocks, 2048)
    assert large <= 2.2 * small
    assert temporary(attend_dense, 512) > 2.5 * temporary(attend_dense, 256)  # the measure does see what is quadratic


@pytest.mark.slow
def test_no_array_of_tokens_by_tokens_exists() -> None:
    sizes = [np.prod([int(x) for x in s.split(",")]) for s in re.findall(r"\[(\d+(?:,\d+)*)\]", compiled(attend_blocks, 2048).as_text())]
    assert max(sizes) < 2048 * 2048 / 4
    assert max(sizes) >= 4 * 2048 * 32  # q's own size


@pytest.mark.slow
@pytest.mark.parametrize("attention", [attend_blocks, attend_pallas])
def test_blocks_that_nobody_sees_are_not_computed(attention: Callable[..., jax.Array]) -> None:
    """NaN times a weight of 0 is NaN: whoever computes a masked block with NaN in it carries it on, and nobody does."""
    rng = np.random.default_rng(0)
    q, dout = rng.normal(size=(2, 1, 1, 2, 96, 16)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 1, 96, 16)).astype(np.float32)
    end = np.repeat(np.array([32, 64, 0], np.int32), 32)[None]  # two chains and padding, of two blocks each
    for x in (q, k, v, dout):
        x[..., :32, :] = x[..., 64:, :] = np.nan

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> tuple[jax.Array, ...]:
        out, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, end, block=16), q, k, v)
        return out, *pullback(dout)

    for x in run(q, k, v, dout):
        assert np.isfinite(np.asarray(x[..., 32:64, :])).all()
        assert np.isnan(np.asarray(x[..., :32, :])).any()
