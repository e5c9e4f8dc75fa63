"""Per-token estimators of KL(π ‖ π_ref) from samples of π (Schulman, "Approximating KL divergence", 2020).

With d = log π(a) - log π_ref(a), clamped to ±20. All are `(LossInputs) -> f32[E]`, 0 where the mask is false, and read `logp`,
`tokens.ref_logp` and `tokens.mask`. As a term of the loss, on samples of π: the gradient of k2 is that of the KL; that of
k1 is 0 in expectation, so k1 is for watching; that of k3 is the gradient of KL(π_ref ‖ π).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lightningrl.losses.ratio import log_ratio
from lightningrl.table import LossInputs


def k1(inputs: LossInputs) -> jax.Array:
    """k1 = d: unbiased, negative half the time."""
    return _log_ratio_to_reference(inputs)


def k2(inputs: LossInputs) -> jax.Array:
    """k2 = ½ d²: biased as a value, with the right gradient."""
    return 0.5 * _log_ratio_to_reference(inputs) ** 2


def k3(inputs: LossInputs) -> jax.Array:
    """k3 = e⁻ᵈ - 1 + d: unbiased and never negative (GRPO, arXiv 2402.03300, eq. 4).

    Near d = 0 computed as expm1(-d) + d, since e⁻ᵈ - 1 loses the digits that matter. verl caps the value at 10; here only d is
    clamped.
    """
    d = _log_ratio_to_reference(inputs)
    return jnp.expm1(-d) + d


def _log_ratio_to_reference(inputs: LossInputs) -> jax.Array:
    return log_ratio(inputs.logp, jax.lax.stop_gradient(inputs.tokens.ref_logp), inputs.tokens.mask)
