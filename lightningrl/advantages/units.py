"""What a statistic counts, and which credit may have a baseline taken off."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp

from lightningrl.table import Credit, TransitionTable

Count = Literal["rollouts", "transitions"]


def statistics_weights(table: TransitionTable, count: Count) -> jax.Array:
    """How much each transition weighs in a mean, f32[N]; 0 at padding.

    "rollouts": 1 / transitions of its rollout, so that every rollout weighs one, however many calls it made and whichever of
    its roles are trained. "transitions": every call of a trained role weighs one, as in arXiv 2508.03680, §3.3.2, where all
    policy calls of a task form one group; a rollout of nine calls then weighs as much as nine rollouts of one.

    Args:
      table: N transitions.
      count: "rollouts" or "transitions".

    Raises:
      ValueError: an unknown count.
    """
    chex.assert_equal_shape([table.rollout, table.weight, table.trainable, table.valid])
    chex.assert_type([table.weight, table.trainable, table.valid], [float, bool, bool])
    if count == "rollouts":
        return jnp.where(table.valid, table.weight, 0.0)
    if count == "transitions":
        return jnp.where(jnp.logical_and(table.valid, table.trainable), 1.0, 0.0)
    raise ValueError(f"Statistics cannot count {count!r}: choose one of {', '.join(get_args(Count))}.")


def require_return(credit: Credit, what: str) -> None:
    """Raises if a baseline has been taken off already."""
    if credit.kind != "return":
        raise ValueError(
            f"{what} takes a baseline off, but this credit is already an advantage and may only be scaled: "
            "use whiten with shift_mean=False."
        )
