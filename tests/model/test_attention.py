"""Attention over tries: every implementation against loops in float64, forward and gradient, on random tries."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl.model.attention import TreeAttention, attend_dense, attend_tree, choose_attention, tree_mask
from lightningrl.model.attention_blocks import attend_blocks
from lightningrl.model.attention_pallas import attend_pallas
from tests.model.tries import loops, random_row, seen

# Blocks so small that a row of 50 tokens has several, which do not divide it.
IMPLEMENTATIONS: dict[str, TreeAttention] = {
    "dense": functools.partial(attend_dense, block=32),
    "blocks": functools.partial(attend_blocks, block=16),
    "one block": functools.partial(attend_blocks, block=128),
    "pallas": functools.partial(attend_pallas, block=16),
}
EVERY_IMPLEMENTATION = pytest.mark.parametrize("name", IMPLEMENTATIONS)
seeds = st.integers(0, 2**32 - 1)


@functools.cache
def out_and_gradients(name: str) -> Callable[..., Any]:
    def run(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array, dout: jax.Array) -> Any:
        out, pullback = jax.vjp(lambda q, k, v: attend_tree(q, k, v, end, implementation=IMPLEMENTATIONS[name]), q, k, v)
        return out, pullback(dout)

    return jax.jit(run)


def check(name: str, seed: int, dtype: Any, tolerance: float) -> None:
    q, k, v, dout, end = random_row(np.random.default_rng(seed))
    expected = loops(q, k, v, end, dout)
    result = out_and_gradients(name)(*(x.astype(dtype) for x in (q, k, v)), end, dout.astype(dtype))
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))


@pytest.mark.slow
@EVERY_IMPLEMENTATION
@settings(max_examples=6)
@given(seed=seeds)
def test_is_that_of_loops(name: str, seed: int) -> None:
    # Sums of up to 100 products of rounded numbers, each off by half an epsilon (1.2e-7) of the largest.
    check(name, seed, jnp.float32, 3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "pallas"])
@settings(max_examples=4)
@given(seed=seeds)
def test_in_float64_the_same_to_twelve_digits(name: str, seed: int) -> None:
    with jax.enable_x64(True):
        check(name, seed, jnp.float64, 1e-12)


@settings(max_examples=30)
@given(seed=seeds)
def test_the_mask_is_who_descends_from_whom(seed: int) -> None:
    end = random_row(np.random.default_rng(seed), length=20)[-1]
    mask = np.asarray(tree_mask(end))
    for b, j in np.ndindex(end.shape):
        assert np.flatnonzero(mask[b, j]).tolist() == seen(end[b], j)


@pytest.mark.slow
@EVERY_IMPLEMENTATION
def test_a_row_of_padding_alone_is_its_values(name: str) -> None:
    q, k, v, dout, _ = (x.astype(np.float32) for x in random_row(np.random.default_rng(0)))
    end = np.zeros(q.shape[:1] + q.shape[3:4], np.int32)
    out, (dq, dk, dv) = out_and_gradients(name)(q, k, v, end, dout)
    np.testing.assert_allclose(out, np.broadcast_to(v[:, :, None], q.shape), rtol=1e-6)
    np.testing.assert_allclose(dv, dout.sum(2), rtol=1e-6, atol=1e-6)
    # One key alone: its weight is 1 whatever q and k are; do · v − Σ do ⊙ o is rounding.
    np.testing.assert_allclose(dq, 0.0, atol=1e-5)
    np.testing.assert_allclose(dk, 0.0, atol=1e-5)


@EVERY_IMPLEMENTATION
def test_nobody_sees_padding_or_another_trie(name: str) -> None:
    """The same bits whatever stands there, and scores of ±10⁴ overflow nothing."""
    q, k, v, dout, end = random_row(np.random.default_rng(1))
    end[:] = 0
    end[:, :20], end[:, 20:40] = 20, 40
    q, k, v, dout = (x.astype(np.float32) for x in (q, k, v, dout))
    here = out_and_gradients(name)(q, k, v, end, dout)
    for x in (q, k, v, dout):
        x[..., :20, :], x[..., 40:, :] = 1e2 * x[..., :20, :], -1e2 * x[..., 40:, :]
    elsewhere = out_and_gradients(name)(q, k, v, end, dout)
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(elsewhere), strict=True):
        np.testing.assert_array_equal(a[..., 20:40, :], b[..., 20:40, :])
        assert np.isfinite(np.asarray(b)).all()


@pytest.mark.slow
@pytest.mark.parametrize("named", ["dense", "blocks", "pallas"])
def test_a_name_stands_for_its_implementation(named: Any) -> None:
    q, k, v, dout, end = random_row(np.random.default_rng(2), rows=1, groups=1, length=20)
    result = attend_tree(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), end, implementation=named)
    np.testing.assert_allclose(result, loops(q, k, v, end, dout)[0], atol=3e-6)


def test_a_function_is_an_implementation_and_another_name_is_not() -> None:
    array = jnp.ones((1, 1, 1, 4, 2))
    assert attend_tree(array, array[:, 0], array[:, 0], jnp.zeros((1, 4)), implementation=lambda q, k, v, end: end).shape == (1, 4)
    with pytest.raises(ValueError, match="'flash' must be one of dense, blocks, pallas, or a function"):
        attend_tree(array, array[:, 0], array[:, 0], jnp.zeros((1, 4)), implementation="flash")  # type: ignore[arg-type]


def test_the_rule_takes_the_kernel_on_a_gpu_and_blocks_for_long_rows() -> None:
    assert {t: choose_attention(t, "cpu") for t in (1, 256, 512, 8192)} == {1: "dense", 256: "dense", 512: "blocks", 8192: "blocks"}
    assert choose_attention(256, "gpu") == choose_attention(8192, "gpu") == "pallas"
    assert choose_attention(8192, "tpu") == "blocks"
