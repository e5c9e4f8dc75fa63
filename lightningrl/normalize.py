"""Values relative to those of their group: the one function behind GRPO, RLOO and their family, and behind credit of that kind."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp

from lightningrl.segments import (
    EPSILON,
    safe_divide,
    safe_sqrt,
    segment_constant,
    segment_count,
    segment_mean,
    segment_sum,
    segment_var,
)
from lightningrl.table import Array

Center = Literal["mean", "leave_one_out", "none"]
Scale = Literal["std", "none"]
Singleton = Literal["zero", "raw"]
Degenerate = Literal["zero", "formula"]


def group_normalize(
    values: Array,
    ids: Array,
    weights: Array,
    *,
    units: Array | None = None,
    center: Center = "mean",
    scale: Scale = "std",
    ddof: float = 1.0,
    eps: float = EPSILON,
    singleton: Singleton = "zero",
    degenerate: Degenerate = "zero",
) -> jax.Array:
    """One function for the group-relative family. For an entry of group g and unit u:

      center   mean: b = μg = Σ wⱼ xⱼ / Σ wⱼ     leave_one_out: b = (Σ_{j∈g} wⱼxⱼ - Σ_{j∈u} wⱼxⱼ) / (Wg - Wu)     none: b = 0
      scale    std:  s = σg + eps,  σg² = Σ wⱼ (xⱼ - μg)² / (Wg - ddof)                                           none: s = 1
      A = (x - b) / s

    Libraries differ in `ddof`, `eps` and in what they do with groups of one; here those are arguments. In float32, seven
    rewards of 0.1 leave x - μ = -7.5e-9, which an epsilon of 1e-9 turns into an advantage of -0.8; so a constant group is
    recognised by max = min, not left to an epsilon.

    Args:
      values: f32[N].
      ids: int32[N], group of each entry, 0 … N-1.
      weights: f32[N] ≥ 0. An entry of weight 0 is in no statistic and gets 0; its value is not read.
      units: int32[N], 0 … N-1, what is left out by leave-one-out and what a group may have one of: the rollout. Each unit
        lies in one group. Every entry is its own by default.
      center, scale, ddof, eps: as above; Wg - ddof ≤ 0 counts as σg = 0.
      singleton: a group of one unit gets "zero", or "raw": x itself.
      degenerate: a constant group of several units gets "zero", or what the "formula" gives.

    Returns:
      f32[N].

    Raises:
      ValueError: an unknown center, scale, singleton or degenerate.
    """
    chex.assert_rank([values, ids, weights], 1)
    chex.assert_equal_shape([values, ids, weights])
    chex.assert_type([values, ids, weights], [float, int, float])
    chex.assert_equal_shape([ids, ids if units is None else units])
    for name, choice, choices in (
        ("center", center, Center),
        ("scale", scale, Scale),
        ("singleton", singleton, Singleton),
        ("degenerate", degenerate, Degenerate),
    ):
        if choice not in get_args(choices):
            raise ValueError(f"group_normalize has no {name} {choice!r}: choose one of {', '.join(get_args(choices))}.")

    size = values.shape[0]
    used = weights > 0
    x = jnp.where(used, values, 0.0)
    units = jnp.arange(size, dtype=jnp.int32) if units is None else units
    alone = segment_constant(units, ids, size, mask=used)[ids]
    constant = segment_constant(x, ids, size, mask=used)[ids]

    advantage = x - _baseline(x, ids, weights, units, center)
    if scale == "std":
        deviation = safe_sqrt(segment_var(x, ids, size, weights=weights, ddof=ddof))[ids]
        advantage = safe_divide(advantage, deviation + eps)
    if degenerate == "zero":
        advantage = jnp.where(constant, 0.0, advantage)
    advantage = jnp.where(alone, x if singleton == "raw" else 0.0, advantage)
    return jnp.where(used, advantage, 0.0)


def _baseline(x: jax.Array, ids: Array, weights: Array, units: Array, center: Center) -> jax.Array:
    size = x.shape[0]
    if center == "none":
        return jnp.zeros_like(x)
    if center == "mean":
        return segment_mean(x, ids, size, weights=weights)[ids]
    others = segment_sum(x, ids, size, weights=weights)[ids] - segment_sum(x, units, size, weights=weights)[units]
    weight = segment_count(ids, size, weights=weights)[ids] - segment_count(units, size, weights=weights)[units]
    return safe_divide(others, weight)
