"""Attention: the seams behind which kernels are exchanged, `attend_tree` for rows of tries and `attend` against a cache.

Layout is [batch, kv_heads, …, tokens, head_dim] with the query heads of a key/value head beside each other, so that every
product is a plain batched matmul over (batch, kv_heads): the [B, T, H, d] layout is several times slower on CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from lightningrl.model.attention_blocks import attend_blocks
from lightningrl.model.visible import MASKED
from lightningrl.table import Array

# (q [B, K, G, T, d], k [B, K, T, d], v [B, K, T, d], end [B, T]) -> [B, K, G, T, d]
TreeAttention = Callable[[jax.Array, jax.Array, jax.Array, Array], jax.Array]
Implementation = Literal["dense", "blocks", "pallas"]

# Forward and gradient of branching tries on a CPU, ms of CPU time, dense : blocks, rows of T that hold 2,048 tokens together.
#   T                      256      512    1,024    2,048
#   2 × 2 heads of 32    16:16    31:25    92:35
#   4 × 2 heads of 64    57:57   137:71  261:103  474:132
# On the clock dense gains more from a second core (wall half of CPU time; blocks hardly), so a tie goes to dense.
LONGEST_DENSE = 256


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
    return _mix(jnp.where(mask[:, None, None], _scores(q, k), MASKED), v)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q kᵀ / √d, [B, K, G, T, S], in float32 at least."""
    b, kv, g, t, d = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    products = jnp.einsum("bkxd,bksd->bkxs", q.reshape(b, kv, g * t, d) * d**-0.5, k, preferred_element_type=wide)
    return products.reshape(b, kv, g, t, -1)


def _mix(scores: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(scores) v, of the type of v."""
    b, kv, g, t, s = scores.shape
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    mixed = jnp.einsum("bkxs,bksd->bkxd", weights.reshape(b, kv, g * t, s).astype(v.dtype), v).reshape(b, kv, g, t, -1)
    return (mixed / jnp.sum(weights, axis=-1, keepdims=True)).astype(v.dtype)


def attend_dense(q: jax.Array, k: jax.Array, v: jax.Array, end: Array, *, block: int = 64) -> jax.Array:
    """`attend` for short rows of tries: each block of queries skips the keys after it, which nobody there sees.

    On CPU a block's scores stay in the cache between the two products, which makes this three times as fast as one `attend`. The
    mask is added to the scores, not selected by: its gradient is one pass less. Memory is quadratic in T.

    Args:
      q: float [B, K, G, T, d]; k, v: float [B, K, T, d]; end: int32 [B, T], see `tree_mask`.
      block: queries in a block, > 0. T need not be a multiple of it.

    Returns:
      float [B, K, G, T, d], of the type of v.
    """
    hidden = jnp.where(tree_mask(end), 0.0, MASKED)[:, None, None]  # [B, 1, 1, T, T]
    parts = []
    for lo in range(0, q.shape[3], block):
        hi = lo + block
        scores = _scores(q[:, :, :, lo:hi], k[:, :, :hi]) + hidden[:, :, :, lo:hi, :hi]
        parts.append(_mix(scores, v[:, :, :hi]))
    return jnp.concatenate(parts, axis=3)


def choose_attention(t: int, backend: str) -> Implementation:
    """The implementation for rows of t tokens on a backend ("cpu", "gpu", "tpu").

    "pallas" on a GPU; elsewhere "dense" up to LONGEST_DENSE tokens and "blocks" beyond, where it is faster and far smaller.
    """
    if backend == "gpu":
        return "pallas"
    return "dense" if t <= LONGEST_DENSE else "blocks"


def attend_tree(q: jax.Array, k: jax.Array, v: jax.Array, end: Array, *, implementation: Implementation | TreeAttention) -> jax.Array:
    """softmax(q kᵀ / √d) v where a token sees its ancestors in the trie and itself. All implementations agree to rounding.

    Args:
      q: float [B, K, G, T, d]; G query heads share each of the K key/value heads.
      k, v: float [B, K, T, d].
      end: int32 [B, T], one past the last token of each token's subtree; ≤ its own index for padding, see `tree_mask`.
      implementation: "dense", `attend_dense`: memory quadratic in T; "blocks", `attention_blocks.attend_blocks`: linear; "pallas",
        `attention_pallas.attend_pallas`: a GPU kernel, interpreted (slowly) elsewhere; or a function of the four arrays.
        `choose_attention` is the rule.

    Returns:
      float [B, K, G, T, d], of the type of v.

    Raises:
      ValueError: no implementation has that name.
    """
    if callable(implementation):
        return implementation(q, k, v, end)
    match implementation:
        case "dense":
            return attend_dense(q, k, v, end)
        case "blocks":
            return attend_blocks(q, k, v, end)
        case "pallas":
            # Imported when asked for: Pallas' GPU backends come and go with jax versions.
            from lightningrl.model.attention_pallas import attend_pallas

            return attend_pallas(q, k, v, end)
    raise ValueError(f"attention implementation {implementation!r} must be one of {', '.join(get_args(Implementation))}, or a function")
