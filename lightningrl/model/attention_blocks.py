"""Tree attention in blocks with an online softmax: memory linear in the row's length, and no work for blocks that nobody sees.

The forward pass is that of FlashAttention-2 (arXiv 2307.08691, Algorithm 1): for a block of queries, over the blocks of keys
it sees, with m the running maximum and ℓ the running sum of weights,

    m' = max(m, max s),  ℓ' = e^(m − m') ℓ + Σ e^(s − m'),  o' = e^(m − m') o + e^(s − m') v.

It keeps only the output and L = m + ln ℓ; the backward pass (Algorithm 2) computes p = e^(s − L) again and

    dv = pᵀ do,  ds = p ⊙ (do vᵀ − Σ do ⊙ o),  dq = ds k / √d,  dk = dsᵀ q / √d.

Rows are computed one after another: which blocks are skipped differs from row to row.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lightningrl.model.visible import MASKED, block_lists, subtree_end, visible_blocks
from lightningrl.table import Array


def attend_blocks(q: jax.Array, k: jax.Array, v: jax.Array, end: Array, *, block: int = 64) -> jax.Array:
    """softmax(q kᵀ / √d) v over the keys that each token of a trie sees.

    Args:
      q: float [B, K, G, T, d]; G query heads share each of the K key/value heads.
      k, v: float [B, K, T, d].
      end: int32 [B, T], one past the last token of each token's subtree: token j sees token i iff i ≤ j < end[i]. A padding
        token, whose end is ≤ its own index, sees only itself.
      block: tokens in a block of queries and in one of keys, > 0. T need not be a multiple of it.

    Returns:
      float [B, K, G, T, d].
    """
    t = q.shape[3]
    block = min(block, t)
    over = -t % block
    if over:
        q, k, v = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, over), (0, 0)]) for x in (q, k, v))
        end = jnp.pad(jnp.asarray(end), ((0, 0), (0, over)))
    return _attend(block, q, k, v, subtree_end(end))[:, :, :, :t]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(block: int, q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array) -> jax.Array:
    return _forward(block, q, k, v, end)[0]


def _forward(block: int, q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    lists = block_lists(visible_blocks(end, block))
    rows = (_cut(q * q.shape[-1] ** -0.5, block), _cut(k[:, :, None], block), _cut(v[:, :, None], block), end, *lists)
    out, lse = jax.lax.map(lambda row: _forward_row(block, q.shape[2], *row), rows)
    out = _join(out, block).astype(v.dtype)
    return out, (q, k, v, end, out, lse)


def _backward(block: int, residuals: tuple[jax.Array, ...], dout: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, end, out, lse = residuals
    lists = block_lists(visible_blocks(end, block).swapaxes(-1, -2))
    delta = jnp.sum(dout.astype(lse.dtype) * out, axis=-1, keepdims=True)
    heads = (_cut(q * q.shape[-1] ** -0.5, block), _cut(dout, block), lse, _cut(delta, block))
    rows = (heads, (_cut(k[:, :, None], block), _cut(v[:, :, None], block)), end, *lists)
    dq, dk, dv = jax.lax.map(lambda row: _backward_row(block, q.shape[2], *row), rows)
    dq = _join(dq, block) * q.shape[-1] ** -0.5
    return dq.astype(q.dtype), _join(dk, block)[:, :, 0].astype(k.dtype), _join(dv, block)[:, :, 0].astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _cut(x: jax.Array, block: int) -> jax.Array:
    """[B, K, G, T, d] -> [B, T / block, K, G · block, d]: a block of all heads in one piece, ready for a matmul per key head."""
    b, k, g, t, d = x.shape
    return x.reshape(b, k, g, t // block, block, d).transpose(0, 3, 1, 2, 4, 5).reshape(b, t // block, k, g * block, d)


def _join(x: jax.Array, block: int) -> jax.Array:
    """`_cut` undone."""
    b, n, k, x_len, d = x.shape
    return x.reshape(b, n, k, x_len // block, block, d).transpose(0, 2, 3, 1, 4, 5).reshape(b, k, x_len // block, n * block, d)


def _scores(q: jax.Array, k: jax.Array, end: jax.Array, queries: jax.Array, keys: jax.Array, groups: int) -> jax.Array:
    """q kᵀ of block `queries` and block `keys`, [K, G · block, block]; MASKED where a token does not see the key. q is scaled."""
    block = k.shape[1]
    scores = jnp.einsum("kxd,ksd->kxs", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    j, i = queries * block + jnp.arange(block), keys * block + jnp.arange(block)
    ends = jax.lax.dynamic_slice_in_dim(end, keys * block, block)
    sees = (i[None, :] <= j[:, None]) & (j[:, None] < ends[None, :])
    return jnp.where(jnp.tile(sees, (groups, 1)), scores, MASKED)


def _forward_row(
    block: int, groups: int, q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array, order: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One row. q: [n, K, G · block, d], scaled; k, v: [n, K, block, d] -> out as q, and L, [n, K, G · block, 1]."""
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def of_queries(_: None, block_of_queries: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        n, q_n, order_n, count_n = block_of_queries

        def add_keys(at: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            out, top, total = carry
            m = order_n[at]
            scores = _scores(q_n, k[m], end, n, m, groups)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            # A query that has seen no key yet has weights of 1 here; the first key it sees scales them by e^(MASKED − m) = 0.
            weights, kept = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            mixed = jnp.einsum("kxs,ksd->kxd", weights.astype(v.dtype), v[m], preferred_element_type=wide)
            return out * kept + mixed, new_top, total * kept + jnp.sum(weights, axis=-1, keepdims=True)

        column = jnp.zeros((*q_n.shape[:2], 1), wide)
        out, top, total = jax.lax.fori_loop(0, count_n, add_keys, (jnp.zeros(q_n.shape, wide), column + MASKED, column))
        return None, (out / total, top + jnp.log(total))

    return jax.lax.scan(of_queries, None, (jnp.arange(q.shape[0]), q, order, count))[1]


def _backward_row(
    block: int,
    groups: int,
    heads: tuple[jax.Array, ...],
    keys_and_values: tuple[jax.Array, jax.Array],
    end: jax.Array,
    order: jax.Array,
    count: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One row, over blocks of keys and, of each, the blocks of queries that see it: dq (of the scaled q), dk, dv."""
    q, dout, lse, delta = heads
    wide = lse.dtype

    def of_keys(dq: jax.Array, block_of_keys: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        m, k_m, v_m, order_m, count_m = block_of_keys

        def add_queries(at: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = carry
            n = order_m[at]
            p = jnp.exp(_scores(q[n], k_m, end, n, m, groups) - lse[n])
            dv = dv + jnp.einsum("kxs,kxd->ksd", p.astype(dout.dtype), dout[n], preferred_element_type=wide)
            dp = jnp.einsum("kxd,ksd->kxs", dout[n], v_m, preferred_element_type=wide)
            ds = (p * (dp - delta[n])).astype(q.dtype)
            dk = dk + jnp.einsum("kxs,kxd->ksd", ds, q[n], preferred_element_type=wide)
            return dq.at[n].add(jnp.einsum("kxs,ksd->kxd", ds, k_m, preferred_element_type=wide)), dk, dv

        zeros = jnp.zeros(k_m.shape, wide)
        dq, dk, dv = jax.lax.fori_loop(0, count_m, add_queries, (dq, zeros, zeros))
        return dq, (dk, dv)

    k, v = keys_and_values
    dq, (dk, dv) = jax.lax.scan(of_keys, jnp.zeros(q.shape, wide), (jnp.arange(k.shape[0]), k, v, order, count))
    return dq, dk, dv
