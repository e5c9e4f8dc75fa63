"""Which blocks of keys a block of queries sees: what attention over long rows computes, and what it skips.

A block of queries reads a block of keys only if one of its tokens sees one of the keys. With b tokens in a block that is

    visible[n, m] ⇔ m < n and max(end of the keys of m) > n · b, or m = n:

a key before the block, m < n, is seen from its first query if its subtree ends after it, else from none. Each block sees
itself, as each token does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lightningrl.table import Array

MASKED = -1e30  # the score of a key that is not seen: finite, as ∞ − ∞ would be computed where a whole block is masked


def subtree_end(end: Array) -> jax.Array:
    """max(end[i], i + 1), int32 [..., T]: with it `i ≤ j < end[i]` also says that a padding token sees itself."""
    return jnp.maximum(jnp.asarray(end, jnp.int32), jnp.arange(1, end.shape[-1] + 1, dtype=jnp.int32))


def visible_blocks(end: Array, block: int) -> jax.Array:
    """Which blocks of `block` tokens see which.

    Args:
      end: int32 [..., T], one past the last token of each token's subtree (see `attention.tree_mask`); T a multiple of `block`.

    Returns:
      bool [..., T / block, T / block], indexed [..., queries, keys]. False: no token of the one sees a token of the other.

    Raises:
      ValueError: `block` does not divide T.
    """
    if end.shape[-1] % block:
        raise ValueError(f"rows of {end.shape[-1]} tokens cannot be cut into blocks of {block}")
    blocks = end.shape[-1] // block
    last = jnp.max(subtree_end(end).reshape(*end.shape[:-1], blocks, block), axis=-1)
    index = jnp.arange(blocks)
    return (index[None, :] <= index[:, None]) & (index[:, None] * block < last[..., None, :])


def block_lists(visible: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each block of queries the blocks of keys it sees, ascending, so that a loop visits these alone.

    Args:
      visible: bool [..., n, m]. Transposed, the lists are of the queries that see each block of keys.

    Returns:
      int32 [..., n, m], of which the first `count` are the blocks seen and the rest are the others; count: int32 [..., n].
    """
    return jnp.argsort(~visible, axis=-1, stable=True).astype(jnp.int32), jnp.sum(visible, axis=-1, dtype=jnp.int32)
