"""Per-token estimators of KL(π ‖ π_ref) from samples of π (Schulman, "Approximating KL divergence", 2020).

With d = log π(a) - log π_ref(a), clamped to ±20. All are `(LossInputs) -> f32[E]`, 0 where the mask is false, and read `logp`,
`tokens.ref_logp` and `tokens.mask`. As a term of the loss, on samples of π: the gradient of k2 is that of the KL; that of
k1 is 0 in expectation, so k1 is for watching; that of k3 is the gradient of KL(π_ref ‖ π). `k3_plus` and `k3_unbiased` have the
value of k3 and the gradient of the KL.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lightningrl.ratio import log_ratio
from lightningrl.table import LossInputs


def k1(inputs: LossInputs) -> jax.Array:
    """k1 = d: unbiased, negative half the time."""
    chex.assert_equal_shape([inputs.logp, inputs.tokens.ref_logp, inputs.tokens.mask])
    chex.assert_type([inputs.logp, inputs.tokens.ref_logp, inputs.tokens.mask], [float, float, bool])
    return _log_ratio_to_reference(inputs)


def k2(inputs: LossInputs) -> jax.Array:
    """k2 = ½ d²: biased as a value, with the right gradient."""
    chex.assert_equal_shape([inputs.logp, inputs.tokens.ref_logp, inputs.tokens.mask])
    chex.assert_type([inputs.logp, inputs.tokens.ref_logp, inputs.tokens.mask], [float, float, bool])
    return 0.5 * _log_ratio_to_reference(inputs) ** 2


def k3(inputs: LossInputs) -> jax.Array:
    """k3 = e⁻ᵈ - 1 + d: unbiased and never negative (GRPO, arXiv 2402.03300, eq. 4).

    Near d = 0 computed as expm1(-d) + d, since e⁻ᵈ - 1 loses the digits that matter. verl caps the value at 10; here only d is
    clamped.
    """
    chex.assert_equal_shape([inputs.logp, inputs.tokens.ref_logp, inputs.tokens.mask])
    chex.assert_type([inputs.logp, inputs.tokens.ref_logp, inputs.tokens.mask], [float, float, bool])
    d = _log_ratio_to_reference(inputs)
    return jnp.expm1(-d) + d


def k3_plus(inputs: LossInputs) -> jax.Array:
    """The value of k3 with the gradient of k2:  sg(k3) + k2 - sg(k2)  (verl's "k3+").

    On samples of π the value is unbiased and the gradient d ∇log π is that of the KL.
    """
    chex.assert_equal_shape([inputs.logp, inputs.tokens.ref_logp, inputs.tokens.mask])
    chex.assert_type([inputs.logp, inputs.tokens.ref_logp, inputs.tokens.mask], [float, float, bool])
    value, slope = k3(inputs), k2(inputs)
    return jax.lax.stop_gradient(value) + (slope - jax.lax.stop_gradient(slope))


def k3_unbiased(inputs: LossInputs) -> jax.Array:
    """k3 · π(a)/π_old(a), both differentiable: unbiased on samples of π_old, in value and in gradient.

    DeepSeek-V3.2 (arXiv 2512.02556, §3.1) and TRL's `use_bias_correction_kl`. The ratio has a gradient: without it the product would
    only be unbiased in value. Also reads `tokens.old_logp`; the log of the ratio is clamped to ±20.
    """
    chex.assert_equal_shape([inputs.logp, inputs.tokens.ref_logp, inputs.tokens.old_logp, inputs.tokens.mask])
    chex.assert_type([inputs.logp, inputs.tokens.ref_logp, inputs.tokens.old_logp, inputs.tokens.mask], [float, float, float, bool])
    return k3(inputs) * jnp.exp(log_ratio(inputs.logp, jax.lax.stop_gradient(inputs.tokens.old_logp), inputs.tokens.mask))


def _log_ratio_to_reference(inputs: LossInputs) -> jax.Array:
    return log_ratio(inputs.logp, jax.lax.stop_gradient(inputs.tokens.ref_logp), inputs.tokens.mask)
