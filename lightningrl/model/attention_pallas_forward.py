"""The GPU kernel's forward pass, and what its backward pass shares with it. See `attention_pallas`.

Arrays are those of one row and key head together, [B · K, …], as which row it is does not matter to a kernel. Weights are powers
of two, as the hardware computes those: with s = q kᵀ · log₂e / √d, softmax is 2^(s − m) / Σ 2^(s − m).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from lightningrl.model.visible import MASKED


def product(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    """Σ over axis over[0] of a and axis over[1] of b, both matrices, summed in float32. Float32 inputs are not rounded to TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def block_scores(q: jax.Array, k: jax.Array, end: jax.Array, n: jax.Array, m: jax.Array) -> jax.Array:
    """q kᵀ · log₂e / √d of block n of queries and block m of keys, float32; MASKED where a token does not see the key.

    q, k: [block, d]; end: int32 [block], of the keys. The true d is part of `q_scale`, as both are padded.
    """
    block = q.shape[0]
    j, i = n * block + jnp.arange(block), m * block + jnp.arange(block)
    return jnp.where((i[None, :] <= j[:, None]) & (j[:, None] < end[None, :]), product(q, k, (1, 1)), MASKED)


def q_scale(head_dim: int) -> float:
    """log₂e / √d."""
    return math.log2(math.e) / math.sqrt(head_dim)


def _kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, end_ref: Any, order_ref: Any, count_ref: Any, out_ref: Any, lse_ref: Any, *, scale: float
) -> None:
    """One block of queries of one head: over the blocks of keys it sees."""
    n, q = pl.program_id(0), q_ref[...]
    block = q.shape[0]

    def add_keys(at: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, top, total = carry
        m = order_ref[at]
        here = pl.ds(m * block, block)
        v = v_ref[here, :]
        scores = block_scores(q, k_ref[here, :], end_ref[here], n, m) * scale
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights, kept = jnp.exp2(scores - new_top[:, None]), jnp.exp2(top - new_top)
        return out * kept[:, None] + product(weights.astype(v.dtype), v, (1, 0)), new_top, total * kept + jnp.sum(weights, axis=1)

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full((block,), MASKED, jnp.float32), jnp.zeros((block,), jnp.float32)
    out, top, total = jax.lax.fori_loop(0, count_ref[0], add_keys, nothing)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = top + jnp.log2(total)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    end: jax.Array,
    lists: tuple[jax.Array, jax.Array],
    *,
    block: int,
    scale: float,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """q: [R, G, T, d] with R = B · K; k, v: [R, T, d]; end: [R, T]; lists: of the keys each block of queries sees.

    Returns out [R, G, T, d] and L = m + log₂ ℓ, float32 [R, G, T].
    """
    r, g, t, d = q.shape
    n = t // block
    return pl.pallas_call(
        functools.partial(_kernel, scale=scale),
        grid=(n, r, g),
        in_specs=[
            pl.BlockSpec((None, None, block, d), lambda n, r, g: (r, g, n, 0)),
            pl.BlockSpec((None, t, d), lambda n, r, g: (r, 0, 0)),
            pl.BlockSpec((None, t, d), lambda n, r, g: (r, 0, 0)),
            pl.BlockSpec((None, t), lambda n, r, g: (r, 0)),
            pl.BlockSpec((None, None, n), lambda n, r, g: (r, n, 0)),
            pl.BlockSpec((None, 1), lambda n, r, g: (r, n)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, block, d), lambda n, r, g: (r, g, n, 0)),
            pl.BlockSpec((None, None, block), lambda n, r, g: (r, g, n)),
        ],
        out_shape=[jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct((r, g, t), jnp.float32)],
        compiler_params=triton.CompilerParams(num_warps=4 if d <= 64 else 8, num_stages=2),
        interpret=interpret,
        name="tree_attention_forward",
    )(q, k, v, end, *lists)
