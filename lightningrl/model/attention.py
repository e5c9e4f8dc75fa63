"""Attention: the one seam, `attend`, behind which kernels are exchanged.

Layout is [batch, kv_heads, …, tokens, head_dim] with the query heads of a key/value head beside each other, so that every
product is a plain batched matmul over (batch, kv_heads): the [B, T, H, d] layout is several times slower on CPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lightningrl.table import Array


def tree_mask(end: Array) -> jax.Array:
    """Who sees whom in a row of tries: token j sees token i iff i ≤ j < end[i].

    Args:
      end: int32 [B, T], one past the last token of each token's subtree; ≤ its own index for padding, which nobody sees.

    Returns:
      bool [B, T, T], indexed [row, j, i]. A padding token sees only itself, so that no softmax is empty.
    """
    index = jnp.arange(end.shape[-1])
    sees = (index[None, :] <= index[:, None]) & (index[None, :, None] < end[:, None, :])
    return sees | jnp.eye(end.shape[-1], dtype=bool)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """softmax(q kᵀ / √d) v over the visible keys.

    The weights are divided by their sum after the product with v: one pass less over the largest array.

    Args:
      q: float [B, K, G, T, d]; G query heads share each of the K key/value heads.
      k, v: float [B, K, S, d].
      mask: bool [B, T, S], true where query t sees key s; at least one true for each t.

    Returns:
      float [B, K, G, T, d].
    """
    b, kv, g, t, d = q.shape
    scores = jnp.einsum("bkxd,bksd->bkxs", q.reshape(b, kv, g * t, d) * d**-0.5, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores.reshape(b, kv, g, t, -1), -1e30)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    mixed = jnp.einsum("bkxs,bksd->bkxd", weights.reshape(b, kv, g * t, -1).astype(v.dtype), v).reshape(q.shape)
    return (mixed / jnp.sum(weights, axis=-1, keepdims=True)).astype(v.dtype)


def attend_rows(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, block: int = 32) -> jax.Array:
    """`attend` for whole rows, S = T, whose mask shows nobody a later token: each block of queries skips the keys after it.

    On CPU a block's scores stay in the cache between the two products, which makes this three times as fast as one `attend`.
    """
    t = q.shape[3]
    parts = [
        attend(q[:, :, :, lo : lo + block], k[:, :, : lo + block], v[:, :, : lo + block], mask[:, lo : lo + block, : lo + block])
        for lo in range(0, t, block)
    ]
    return jnp.concatenate(parts, axis=3)
