"""Masked and segment reductions, and the scans that respect masks and segments.

Every function reads an entry only where its mask is true and its weight is not 0. The `where` sits on the *inputs*, so
that a NaN in an unused entry reaches neither a value nor a gradient (0 · NaN is NaN, also backwards). Empty segments give
0 unless told otherwise. This is the only module with an epsilon, and no rule of the library rests on it: what happens to a
constant group or to a group of one is decided by comparisons.

Shapes: `[N]` entries, `[S]` segments; ids lie in 0 … S-1 and `num_segments` is static.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lightningrl.table import Array

EPSILON = 1e-6


def safe_divide(numerator: Array | float, denominator: Array, otherwise: float = 0.0) -> jax.Array:
    """numerator / denominator, and `otherwise` where the denominator is 0, with finite gradients there too."""
    nonzero = jnp.not_equal(denominator, 0)
    return jnp.where(nonzero, numerator / jnp.where(nonzero, denominator, 1.0), otherwise)


def safe_sqrt(x: Array) -> jax.Array:
    """√x, and 0 with gradient 0 where x ≤ 0."""
    positive = jnp.greater(x, 0)
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def masked_sum(values: Array, mask: Array, weights: Array | None = None) -> jax.Array:
    """Σ wᵢ xᵢ over the masked entries, any shape; 0 for an empty mask."""
    x, w = _used_entries(values, mask, weights)
    return jnp.sum(w * x)


def masked_count(mask: Array, weights: Array | None = None) -> jax.Array:
    """Σ wᵢ over the masked entries: their number without weights."""
    return masked_sum(jnp.ones(jnp.shape(mask), jnp.float32), mask, weights)


def masked_mean(values: Array, mask: Array, weights: Array | None = None) -> jax.Array:
    """Σ wᵢ xᵢ / Σ wᵢ over the masked entries, any shape; 0 for an empty mask."""
    return safe_divide(masked_sum(values, mask, weights), masked_count(mask, weights))


def masked_var(values: Array, mask: Array, weights: Array | None = None, *, ddof: float = 0.0) -> jax.Array:
    """Σ wᵢ (xᵢ - μ)² / (Σ wᵢ - ddof) over the masked entries; 0 where the weights sum to no more than ddof."""
    x, w = _used_entries(values, mask, weights)
    deviation = x - masked_mean(values, mask, weights)
    return _per_degree_of_freedom(jnp.sum(w * deviation**2), jnp.sum(w), ddof)


def masked_min(values: Array, mask: Array, *, empty: float = 0.0) -> jax.Array:
    """The smallest masked entry; `empty` for an empty mask."""
    return jnp.where(jnp.any(mask), jnp.min(jnp.where(mask, values, _largest(values)), initial=_largest(values)), empty)


def masked_max(values: Array, mask: Array, *, empty: float = 0.0) -> jax.Array:
    """The largest masked entry; `empty` for an empty mask."""
    return jnp.where(jnp.any(mask), jnp.max(jnp.where(mask, values, _smallest(values)), initial=_smallest(values)), empty)


def segment_sum(values: Array, ids: Array, num_segments: int, *, mask: Array | None = None, weights: Array | None = None) -> jax.Array:
    """Σ wᵢ xᵢ per segment: [N] -> [S]."""
    _check_segments(values, ids, mask, weights)
    x, w = _used_entries(values, mask, weights)
    return jax.ops.segment_sum(w * x, ids, num_segments)


def segment_count(ids: Array, num_segments: int, *, mask: Array | None = None, weights: Array | None = None) -> jax.Array:
    """Σ wᵢ per segment, f32[S]: the number of its entries without weights."""
    return segment_sum(jnp.ones(jnp.shape(ids), jnp.float32), ids, num_segments, mask=mask, weights=weights)


def segment_mean(values: Array, ids: Array, num_segments: int, *, mask: Array | None = None, weights: Array | None = None) -> jax.Array:
    """μ = Σ wᵢ xᵢ / Σ wᵢ per segment: [N] -> [S]; 0 for an empty one."""
    total = segment_sum(values, ids, num_segments, mask=mask, weights=weights)
    return safe_divide(total, segment_count(ids, num_segments, mask=mask, weights=weights))


def segment_var(
    values: Array,
    ids: Array,
    num_segments: int,
    *,
    mask: Array | None = None,
    weights: Array | None = None,
    ddof: float = 0.0,
) -> jax.Array:
    """Σ wᵢ (xᵢ - μ)² / (Σ wᵢ - ddof) per segment: [N] -> [S], in two passes.

    Weights count units (a rollout of n transitions with weights 1/n is one unit), so `ddof` counts units too. 0 where the
    weights sum to no more than `ddof`: a segment of one unit has no unbiased variance.
    """
    x, w = _used_entries(values, mask, weights)
    mean = segment_mean(values, ids, num_segments, mask=mask, weights=weights)
    squares = jax.ops.segment_sum(w * (x - mean[ids]) ** 2, ids, num_segments)
    return _per_degree_of_freedom(squares, jax.ops.segment_sum(w, ids, num_segments), ddof)


def segment_min(values: Array, ids: Array, num_segments: int, *, mask: Array | None = None, empty: float = 0.0) -> jax.Array:
    """The smallest entry per segment, in the dtype of `values`: [N] -> [S]; `empty` for an empty one."""
    _check_segments(values, ids, mask, None)
    x = values if mask is None else jnp.where(mask, values, _largest(values))
    filled = segment_count(ids, num_segments, mask=mask) > 0
    return jnp.where(filled, jax.ops.segment_min(x, ids, num_segments), jnp.asarray(empty, values.dtype))


def segment_max(values: Array, ids: Array, num_segments: int, *, mask: Array | None = None, empty: float = 0.0) -> jax.Array:
    """The largest entry per segment, in the dtype of `values`: [N] -> [S]; `empty` for an empty one."""
    _check_segments(values, ids, mask, None)
    x = values if mask is None else jnp.where(mask, values, _smallest(values))
    filled = segment_count(ids, num_segments, mask=mask) > 0
    return jnp.where(filled, jax.ops.segment_max(x, ids, num_segments), jnp.asarray(empty, values.dtype))


def segment_constant(values: Array, ids: Array, num_segments: int, *, mask: Array | None = None) -> jax.Array:
    """bool[S]: all entries of the segment are equal, compared and not subtracted; true of one entry and of none."""
    return segment_min(values, ids, num_segments, mask=mask) == segment_max(values, ids, num_segments, mask=mask)


def reverse_affine_scan(factors: Array, terms: Array, ids: Array, mask: Array) -> jax.Array:
    """The recursion behind returns and GAE, backwards and within segments.

      xₜ = aₜ xₜ₊₁ + bₜ,   where t+1 is the next unmasked entry of the same segment, and x is 0 after the last one.

    An entry with mask 0 is padding or an observation: xₜ₊₁ is carried across it unchanged, and its id is not read, so it
    never ends a segment. Only a change of id between unmasked entries does.

    Args:
      factors: f32[T], aₜ.
      terms: f32[T], bₜ.
      ids: int32[T]; the unmasked entries of a segment have no unmasked entry of another one between them.
      mask: bool[T].

    Returns:
      f32[T]; at a masked entry the value that is carried across it.
    """
    chex.assert_rank([factors, terms, ids, mask], 1)
    chex.assert_equal_shape([factors, terms, ids, mask])
    chex.assert_type([factors, terms, ids, mask], [float, float, int, bool])

    def step(carry, entry):
        following, following_id = carry
        factor, term, id_, used = entry
        value = term + factor * jnp.where(id_ == following_id, following, 0.0)
        carry = (jnp.where(used, value, following), jnp.where(used, id_, following_id))
        return carry, carry[0]

    entries = (jnp.where(mask, factors, 0.0), jnp.where(mask, terms, 0.0), jnp.asarray(ids), jnp.asarray(mask))
    start = (jnp.zeros((), entries[1].dtype), jnp.zeros((), entries[2].dtype))
    return jax.lax.scan(step, start, entries, reverse=True)[1]


def next_in_segment(values: Array, ids: Array, mask: Array, *, end: float = 0.0) -> jax.Array:
    """xₜ₊₁ for every t, where t+1 is the next unmasked entry of the same segment, and `end` if there is none.

    The mask and ids are those of `reverse_affine_scan`. f32[T]; `end` at masked entries.
    """
    chex.assert_rank([values, ids, mask], 1)
    chex.assert_equal_shape([values, ids, mask])
    chex.assert_type([values, ids, mask], [float, int, bool])

    def step(carry, entry):
        following, following_id, exists = carry
        value, id_, used = entry
        result = jnp.where(used & exists & (id_ == following_id), following, end)
        carry = (jnp.where(used, value, following), jnp.where(used, id_, following_id), used | exists)
        return carry, result

    entries = (jnp.where(mask, values, 0.0), jnp.asarray(ids), jnp.asarray(mask))
    start = (jnp.zeros((), entries[0].dtype), jnp.zeros((), entries[1].dtype), jnp.zeros((), bool))
    return jax.lax.scan(step, start, entries, reverse=True)[1]


def last_in_segment(ids: Array, mask: Array) -> jax.Array:
    """bool[T]: unmasked entries with no unmasked entry of the same segment after them."""
    following = next_in_segment(jnp.ones(jnp.shape(ids), jnp.float32), ids, mask)
    return jnp.logical_and(mask, following == 0.0)


def joint_ids(mask: Array, *keys: Array) -> jax.Array:
    """0, 1, 2 … for the distinct tuples (key₀[n], key₁[n], …) of the masked entries, in order of the tuples.

    A pair of ids is not multiplied into one number, which would overflow int32 from 46341 entries on: the tuples are
    sorted, and a new id starts where one differs from the one before it.

    Args:
      mask: bool[N].
      keys: at least one int32[N]; any values.

    Returns:
      int32[N], 0 … N-1; 0 where the mask is false, and where it is true the ids are dense.
    """
    chex.assert_rank([mask, *keys], 1)
    chex.assert_equal_shape([mask, *keys])
    chex.assert_type([mask, *keys], [bool, *(int for _ in keys)])
    unmasked = jnp.logical_not(mask)
    used = [jnp.where(unmasked, 0, key) for key in keys]
    order = jnp.lexsort((*reversed(used), unmasked))
    starts = jnp.zeros(mask.shape, bool)
    for key in used:
        along = key[order]
        starts = starts | jnp.concatenate([jnp.zeros((1,), bool), along[1:] != along[:-1]])
    ids = jnp.zeros(mask.shape, jnp.int32).at[order].set(jnp.cumsum(starts, dtype=jnp.int32))
    return jnp.where(unmasked, 0, ids)


def _check_segments(values: Array, ids: Array, mask: Array | None, weights: Array | None) -> None:
    given = [array for array in (values, ids, mask, weights) if array is not None]
    chex.assert_rank(given, 1)
    chex.assert_equal_shape(given)
    chex.assert_type(ids, int)


def _used_entries(values: Array, mask: Array | None, weights: Array | None) -> tuple[jax.Array, jax.Array]:
    """Values and weights, both 0 wherever the mask is false or the weight is 0."""
    ones = jnp.ones(jnp.shape(values), jnp.float32)
    w = ones if weights is None else jnp.asarray(weights)
    w = w if mask is None else jnp.where(mask, w, 0.0)
    return jnp.where(w != 0, values, 0.0), w


def _per_degree_of_freedom(squares: jax.Array, count: jax.Array, ddof: float) -> jax.Array:
    return jnp.where(count > ddof, squares / jnp.where(count > ddof, count - ddof, 1.0), 0.0)


def _largest(values: Array):
    return jnp.inf if jnp.issubdtype(values.dtype, jnp.floating) else jnp.iinfo(values.dtype).max


def _smallest(values: Array):
    return -jnp.inf if jnp.issubdtype(values.dtype, jnp.floating) else jnp.iinfo(values.dtype).min
