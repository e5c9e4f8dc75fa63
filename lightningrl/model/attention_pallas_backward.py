"""The GPU kernel's backward pass: one kernel over blocks of queries for dq, one over blocks of keys for dk and dv.

With p = 2^(s − L) as in the forward pass (FlashAttention-2, arXiv 2307.08691, Algorithm 2),

    dv = pᵀ do,  ds = p ⊙ (do vᵀ − Σ do ⊙ o),  dq = ds k / √d,  dk = dsᵀ q / √d.

Each program adds up what it owns, dk and dv over the heads of their group too, so that nothing is added atomically and the same
inputs give the same bits.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from lightningrl.model.attention_pallas_forward import block_scores, product


def _dq_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    end_ref: Any,
    dout_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    order_ref: Any,
    count_ref: Any,
    dq_ref: Any,
    *,
    scale: float,
    root: float,
) -> None:
    n, q, dout, lse, delta = pl.program_id(0), q_ref[...], dout_ref[...], lse_ref[...], delta_ref[...]
    block = q.shape[0]

    def add_keys(at: jax.Array, dq: jax.Array) -> jax.Array:
        m = order_ref[at]
        here = pl.ds(m * block, block)
        k = k_ref[here, :]
        p = jnp.exp2(block_scores(q, k, end_ref[here], n, m) * scale - lse[:, None])
        ds = p * (product(dout, v_ref[here, :], (1, 1)) - delta[:, None])
        return dq + product(ds.astype(k.dtype), k, (1, 0))

    dq = jax.lax.fori_loop(0, count_ref[0], add_keys, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * root).astype(dq_ref.dtype)


def _dkv_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    end_ref: Any,
    dout_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    order_ref: Any,
    count_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    scale: float,
    root: float,
    groups: int,
) -> None:
    m, k, v, end = pl.program_id(0), k_ref[...], v_ref[...], end_ref[...]
    block = k.shape[0]

    def add_queries(g: jax.Array, at: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dk, dv = carry
        n = order_ref[at]
        here = pl.ds(n * block, block)
        q, dout = q_ref[g, here, :], dout_ref[g, here, :]
        p = jnp.exp2(block_scores(q, k, end, n, m) * scale - lse_ref[g, here][:, None])
        ds = p * (product(dout, v, (1, 1)) - delta_ref[g, here][:, None])
        return dk + product(ds.astype(q.dtype), q, (0, 0)), dv + product(p.astype(dout.dtype), dout, (0, 0))

    def add_head(g: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jax.lax.fori_loop(0, count_ref[0], functools.partial(add_queries, g), carry)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, groups, add_head, (zeros, zeros))
    dk_ref[...], dv_ref[...] = (dk * root).astype(dk_ref.dtype), dv.astype(dv_ref.dtype)


def backward(
    arrays: tuple[jax.Array, ...],
    lists: tuple[jax.Array, jax.Array],
    lists_of_keys: tuple[jax.Array, jax.Array],
    *,
    block: int,
    scale: float,
    root: float,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv.

    arrays: q [R, G, T, d], k, v [R, T, d], end [R, T], the output's gradient [R, G, T, d], L and Σ do ⊙ o, float32 [R, G, T];
    lists: of the keys that each block of queries sees; lists_of_keys: of the queries that see each block of keys.
    root: 1 / √d, of the true d.
    """
    q, k, v = arrays[:3]
    r, g, t, d = q.shape
    n = t // block
    call = functools.partial(
        pl.pallas_call,
        compiler_params=triton.CompilerParams(num_warps=4 if d <= 64 else 8, num_stages=2),
        interpret=interpret,
    )
    queries = pl.BlockSpec((None, None, block, d), lambda n, r, g: (r, g, n, 0))
    per_query = pl.BlockSpec((None, None, block), lambda n, r, g: (r, g, n))
    all_keys = pl.BlockSpec((None, t, d), lambda n, r, g: (r, 0, 0))
    dq = call(
        functools.partial(_dq_kernel, scale=scale, root=root),
        grid=(n, r, g),
        in_specs=[
            *(queries, all_keys, all_keys, pl.BlockSpec((None, t), lambda n, r, g: (r, 0)), queries, per_query, per_query),
            pl.BlockSpec((None, None, n), lambda n, r, g: (r, n, 0)),
            pl.BlockSpec((None, 1), lambda n, r, g: (r, n)),
        ],
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="tree_attention_dq",
    )(*arrays, *lists)

    keys = pl.BlockSpec((None, block, d), lambda n, r: (r, n, 0))
    all_queries = pl.BlockSpec((None, g, t, d), lambda n, r: (r, 0, 0, 0))
    all_per_query = pl.BlockSpec((None, g, t), lambda n, r: (r, 0, 0))
    dk, dv = call(
        functools.partial(_dkv_kernel, scale=scale, root=root, groups=g),
        grid=(n, r),
        in_specs=[
            *(all_queries, keys, keys, pl.BlockSpec((None, block), lambda n, r: (r, n)), all_queries, all_per_query, all_per_query),
            pl.BlockSpec((None, None, n), lambda n, r: (r, n, 0)),
            pl.BlockSpec((None, 1), lambda n, r: (r, n)),
        ],
        out_specs=[keys, keys],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        name="tree_attention_dkv",
    )(*arrays, *lists_of_keys)
    return dq, dk, dv
