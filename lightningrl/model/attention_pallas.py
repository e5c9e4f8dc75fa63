"""Tree attention as a GPU kernel in Pallas: what `attention_blocks` computes, each block of queries or keys a program of its own.

It has been run in interpret mode on CPU only, and lowered to Triton's language there; no GPU has run it, so its block size, warps
and stages are guesses. Written for Pallas' Triton backend, which jax 0.10 to 0.12 have; from 0.11 on jax warns that it will go.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lightningrl.model.attention_pallas_backward import backward
from lightningrl.model.attention_pallas_forward import forward, q_scale
from lightningrl.model.visible import block_lists, subtree_end, visible_blocks
from lightningrl.table import Array

SMALLEST = 16  # the shortest side that Triton multiplies


def attend_pallas(q: jax.Array, k: jax.Array, v: jax.Array, end: Array, *, block: int = 64, interpret: bool | None = None) -> jax.Array:
    """softmax(q kᵀ / √d) v over the keys that each token of a trie sees, summed in float32.

    Args:
      q: float32 or bfloat16 [B, K, G, T, d]; G query heads share each of the K key/value heads.
      k, v: of the same type, [B, K, T, d].
      end: int32 [B, T], as in `attention.tree_mask`.
      block: tokens in a block of queries and in one of keys, a power of two ≥ 16. T and d are padded to what the kernel takes.
      interpret: run the kernel's Python instead of compiling it. None: wherever there is no GPU.

    Returns:
      [B, K, G, T, d] of the type of v.

    Raises:
      ValueError: `block` is not a power of two ≥ 16, or the arrays are of float64.
    """
    if block < SMALLEST or block & (block - 1):
        raise ValueError(f"block={block} must be a power of two of at least {SMALLEST}, as Triton's arrays are")
    if q.dtype == jnp.float64:
        raise ValueError("the kernel sums in float32: float64 is for attend_blocks or attend_dense")
    b, kv, g, t, d = q.shape
    over, wide = -t % block, max(SMALLEST, pl.next_power_of_2(d)) - d
    q, k, v = (jnp.pad(x.reshape(b * kv, *x.shape[2:]), [(0, 0)] * (x.ndim - 3) + [(0, over), (0, wide)]) for x in (q, k, v))
    end = jnp.repeat(jnp.pad(jnp.asarray(end), ((0, 0), (0, over))), kv, axis=0)
    use = jax.default_backend() != "gpu" if interpret is None else interpret
    out = _attend(block, d, use, q, k, v, subtree_end(end))
    return out[:, :, :t, :d].reshape(b, kv, g, t, d)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(block: int, head_dim: int, interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array) -> jax.Array:
    return _forward(block, head_dim, interpret, q, k, v, end)[0]


def _forward(
    block: int, head_dim: int, interpret: bool, q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    lists = block_lists(visible_blocks(end, block))
    out, lse = forward(q, k, v, end, lists, block=block, scale=q_scale(head_dim), interpret=interpret)
    return out, (q, k, v, end, out, lse)


def _backward(
    block: int, head_dim: int, interpret: bool, residuals: tuple[jax.Array, ...], dout: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, end, out, lse = residuals
    visible = visible_blocks(end, block)
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    gradients = backward(
        (q, k, v, end, dout, lse, delta),
        block_lists(visible),
        block_lists(visible.swapaxes(-1, -2)),
        block=block,
        scale=q_scale(head_dim),
        root=head_dim**-0.5,
        interpret=interpret,
    )
    return *gradients, None


_attend.defvjp(_forward, _backward)
