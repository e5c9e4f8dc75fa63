"""Corrections for a sampler that is not quite the policy: `(LossInputs) -> (weight[E], keep[E])`.

  w = π_old(a)/π_behaviour(a) = exp(log π_old(a) - log π_behaviour(a)), never differentiated, its log clamped to ±20

π_old is the trainer's own log-prob at the start of the update, π_behaviour what the sampler recorded: kernels, quantisation or stale
weights set them apart. `corrected` puts a correction around a loss. Weights are 0 where the mask is false or a token isn't kept;
what isn't kept leaves the numerator only. An empty mask gives zeros.

The sequence is the transition (`losses.sequence`). A product over a sequence collapses with its length: at a spread of 0.05 per
token a product truncated at 2 averages 0.9 at 256 tokens, and 0.03 at 8192.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from lightningrl.losses.aggregation import Aggregate, token_mean
from lightningrl.losses.metrics import Metrics, metric_means
from lightningrl.losses.sequence import mean_over_sequence, sequence_ids, sum_over_sequence
from lightningrl.ratio import MAX_LOG_RATIO, at_least_float32, log_ratio
from lightningrl.segments import safe_divide, segment_max
from lightningrl.table import Array, LossInputs, UnitCounts

Weights = tuple[jax.Array, jax.Array]
Correction = Callable[[LossInputs], tuple[Array, Array]]
PolicyLoss = Callable[[LossInputs], tuple[Array, Array, Metrics]]
Level = Literal["token", "sequence_sum", "sequence_mean", "sequence_max"]


def token_truncation(inputs: LossInputs, *, cap: float = 2.0) -> Weights:
    """Token-level truncated importance sampling:  min(wₖ, C).  Scope: token. All are kept.

    (Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025; verl, TRL, SkyRL.)

    Args:
      inputs: E edges; reads `tokens.old_logp`, `tokens.behaviour_logp` and `tokens.mask`.
      cap: C, positive.

    Raises:
      ValueError: C is not positive.
    """
    _check_bounds(0.0, cap)
    return _kept(jnp.minimum(jnp.exp(_log_weight(inputs)), cap), inputs.tokens.mask)


def sequence_truncation(inputs: LossInputs, *, cap: float = 2.0) -> Weights:
    """Sequence-level truncated importance sampling:  min(Π wₖ, C)  at each token. Scope: sequence. All are kept.

    Unbiased up to the truncation. Arguments, errors: `token_truncation`; also reads `tokens.transition`.
    """
    _check_bounds(0.0, cap)
    return _kept(jnp.minimum(_product(inputs), cap), inputs.tokens.mask)


def token_masking(inputs: LossInputs, *, low: float = 0.5, high: float = 5.0) -> Weights:
    """wₖ where low ≤ wₖ ≤ high; other tokens are dropped. Scope: token. IcePop (arXiv 2510.18855, §3), masked importance sampling.

    Args:
      inputs: E edges; reads `tokens.old_logp`, `tokens.behaviour_logp` and `tokens.mask`.
      low, high: 0 ≤ low ≤ high, high positive. The defaults are IcePop's, as reported.

    Raises:
      ValueError: bounds outside the above.
    """
    _check_bounds(low, high)
    weight = jnp.exp(_log_weight(inputs))
    return _kept(weight, inputs.tokens.mask & (weight >= low) & (weight <= high))


def sequence_masking(inputs: LossInputs, *, low: float = 0.0, high: float = 3.0) -> Weights:
    """Π wₖ at each token where low ≤ Π wₖ ≤ high; other sequences are dropped. Scope: sequence. TRL's default (C = 3, no lower bound).

    Arguments, errors: `token_masking`; also reads `tokens.transition`.
    """
    _check_bounds(low, high)
    weight = _product(inputs)
    return _kept(weight, inputs.tokens.mask & (weight >= low) & (weight <= high))


def geometric(inputs: LossInputs, *, low: float = 0.99, high: float = 1.01) -> Weights:
    """Weight 1 where low ≤ exp(mean of log wₖ) ≤ high; other sequences are dropped. Scope: sequence. SkyRL, AReaL.

    The mean doesn't collapse with length as a product does; a test of drift, not an importance weight, and so it weighs nothing.
    Arguments, errors: `token_masking`; also reads `tokens.transition`.
    """
    _check_bounds(low, high)
    mean = jnp.exp(mean_over_sequence(_log_weight(inputs), inputs.tokens))
    return _kept(jnp.ones_like(mean), inputs.tokens.mask & (mean >= low) & (mean <= high))


def rejection(
    inputs: LossInputs,
    *,
    high: float,
    low: float | None = None,
    estimator: Literal["k1", "k2", "k3"] = "k3",
    level: Level = "token",
) -> Weights:
    """Weight 1 where an estimate of KL(π_behaviour ‖ π_old) is small enough; the rest is dropped. Scope: of `level`.

      k2 = ½ (log w)²,  k3 = w - 1 - log w:  kept where it is ≤ high, per token or as the sum, mean or maximum over the sequence
      k1:  kept where low ≤ exp(Σ or mean of log w) ≤ high, which are bounds of the ratio π_old/π_behaviour itself

    verl's k1 modes bound π_behaviour/π_old: its `l_h` is low = 1/h, high = 1/l here.

    Args:
      inputs: E edges; reads `tokens.old_logp`, `tokens.behaviour_logp`, `tokens.transition` and `tokens.mask`.
      high: positive.
      low: with k1 only; in [0, high], 1/high if None.
      estimator: as above.
      level: what it is taken over; k1 has no maximum.

    Raises:
      ValueError: settings outside the above.
    """
    if estimator not in ("k1", "k2", "k3") or level not in ("token", "sequence_sum", "sequence_mean", "sequence_max"):
        raise ValueError(f"There is no rejection by {estimator!r} per {level!r}.")
    if estimator == "k1" and level == "sequence_max":
        raise ValueError("k1 has two signs, so its maximum over a sequence bounds nothing: choose k2 or k3, or its sum or mean.")
    if estimator != "k1" and low is not None:
        raise ValueError(f"{estimator} is never negative and small where policies agree: it has no lower bound, but low is {low}.")
    logs = _log_weight(inputs)
    if estimator == "k1":
        low = 1.0 / high if low is None and high > 0 else low or 0.0
        _check_bounds(low, high)
        # Bounds are compared in logs, as sums of log-ratios pass exp's range.
        value, lower, upper = logs, math.log(low) if low > 0 else -math.inf, math.log(high)
    else:
        _check_bounds(0.0, high)
        value, lower, upper = 0.5 * logs**2 if estimator == "k2" else jnp.expm1(logs) - logs, -math.inf, high
    value = _over(value, inputs, level)
    return _kept(jnp.ones_like(value), inputs.tokens.mask & (value >= lower) & (value <= upper))


def batch_normalised(
    inputs: LossInputs,
    *,
    correction: Correction = token_truncation,
    aggregation: Callable[[Array, Array, UnitCounts], Aggregate] = token_mean,
    mean: Array | None = None,
) -> Weights:
    """Another correction's weights over their mean in the batch. Scope: batch.

      wₖ / mean of w;   where the mean is 0, every weight is 0

    The mean is over all masked tokens, those that the correction drops counting as 0.

    Args:
      inputs: E edges.
      correction: whose weights they are.
      aggregation: whose mean: `token_mean`, or `sequence_mean` for weights of sequences.
      mean: f32[], the mean over the whole batch, from `aggregation` over all micro-batches (sums and denominators add up); None:
        `inputs` are the whole batch, which they are not in a train step: a recipe with it is refused.
    """
    weight, keep = correction(inputs)
    of_batch = safe_divide(*aggregation(weight, inputs.tokens.mask, inputs.counts)) if mean is None else mean
    return safe_divide(weight, jnp.broadcast_to(jax.lax.stop_gradient(of_batch), jnp.shape(weight))), jnp.asarray(keep)


def corrected(
    inputs: LossInputs, *, loss: Callable[..., tuple[Array, Array, Metrics]], correction: Correction, **selected: Array
) -> tuple[Array, Array, Metrics]:
    """A loss times a correction's weights, without what the correction drops. The scope is the wider of the two.

    A loss that has the behaviour policy in it needs none: `decoupled_ppo`, and `vespo` or `m2po` with that anchor. For a loss of
    sequences use weights of sequences.

    Args:
      selected: handed on to a loss of batch scope: what its recipe's `select` says.

    Returns:
      loss f32[E]; keep bool[E], what both keep; and the loss's pairs with `correction_weight_mean` and `correction_dropped_fraction`.
    """
    weight, kept = correction(inputs)
    values, keep, aux = loss(inputs, **selected)
    chex.assert_equal_shape([weight, values, kept, keep])
    mask = inputs.tokens.mask
    rates = {"correction_weight_mean": weight, "correction_dropped_fraction": jnp.logical_and(mask, jnp.logical_not(kept))}
    return jax.lax.stop_gradient(weight) * values, jnp.logical_and(keep, kept), aux | metric_means(rates, mask)


def _log_weight(inputs: LossInputs) -> jax.Array:
    tokens = inputs.tokens
    chex.assert_equal_shape([tokens.old_logp, tokens.behaviour_logp, tokens.mask])
    return jax.lax.stop_gradient(log_ratio(tokens.old_logp, tokens.behaviour_logp, tokens.mask))


def _product(inputs: LossInputs) -> jax.Array:
    return jnp.exp(jnp.clip(sum_over_sequence(_log_weight(inputs), inputs.tokens), -MAX_LOG_RATIO, MAX_LOG_RATIO))


def _over(value: jax.Array, inputs: LossInputs, level: Level) -> jax.Array:
    if level == "sequence_sum":
        return sum_over_sequence(value, inputs.tokens)
    if level == "sequence_mean":
        return mean_over_sequence(value, inputs.tokens)
    if level == "sequence_max":
        ids = sequence_ids(inputs.tokens)
        return segment_max(value, ids, ids.shape[0], mask=inputs.tokens.mask)[ids]
    return value


def _kept(weight: jax.Array, keep: Array) -> Weights:
    return at_least_float32(jnp.where(keep, weight, 0.0)), jnp.asarray(keep)


def _check_bounds(low: float, high: float) -> None:
    if not 0 <= low <= high or high <= 0:
        raise ValueError(f"The bounds are {low} and {high}: they need 0 ≤ low ≤ high, and high positive.")
