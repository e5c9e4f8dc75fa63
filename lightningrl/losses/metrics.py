"""What a loss reports about itself, in a form that adds up."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lightningrl.segments import masked_count, masked_sum
from lightningrl.table import Array

Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, denominator)


def metric_means(rates: Mapping[str, Array], mask: Array) -> Metrics:
    """Means over the masked edges, not yet divided and without gradient."""
    count = masked_count(mask)
    return {name: (masked_sum(jax.lax.stop_gradient(rate).astype(jnp.float32), mask), count) for name, rate in rates.items()}
