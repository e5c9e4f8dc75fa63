"""Policy losses that drop tokens or sequences which have moved too far. A dropped token leaves `keep`, never the mask."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from lightningrl.losses.metrics import Metrics, metric_means
from lightningrl.losses.policy import ppo_clip
from lightningrl.losses.sequence import mean_over_sequence
from lightningrl.losses.terms import Anchor, fixed_advantage, log_ratio_to, masked_logp, ratio_rates
from lightningrl.ratio import at_least_float32
from lightningrl.segments import safe_divide
from lightningrl.table import Array, LossInputs

PolicyLoss = Callable[[LossInputs], tuple[Array, Array, Metrics]]


def dppo_tv(
    inputs: LossInputs, *, limit_low: float = 0.2, limit_high: float = 0.2, max_ratio: float = 20.0
) -> tuple[Array, Array, Metrics]:
    """DPPO with the binary total variation (arXiv 2602.04879): a trust region in probabilities. Scope: token.

      ρ = π(a)/π_old(a),   ℓ = -sg(min(ρ, c)) A log π(a)
      kept where  π(a) - π_old(a) ≤ δh  if A > 0,  and  ≥ -δl  otherwise

    A ratio bounds rare tokens tightly and common ones hardly at all; a difference of probabilities treats them alike. Only the side on
    which the advantage pushes further out is bounded.

    Args:
      inputs: E edges; reads `logp`, `advantage`, `tokens.old_logp` and `tokens.mask`.
      limit_low: δl in [0, 1].
      limit_high: δh in [0, 1]. The defaults are prime-rl's; the paper's own were not checked.
      max_ratio: c, positive (20 in verl, whose ratio this is).

    Returns:
      loss f32[E], 0 where the mask is false; keep bool[E], the masked tokens inside the region; and pairs (sum, tokens) of
      `dropped_fraction`, `ratio_mean`, `ratio_squared_mean` and `old_kl_mean`. An empty mask gives zeros.

    Raises:
      ValueError: a setting outside the above.
    """
    if not (0 <= limit_low <= 1 and 0 <= limit_high <= 1):
        raise ValueError(f"The limits are {limit_low} and {limit_high}: they bound a difference of probabilities and must lie in [0, 1].")
    _, old, logp = _old_and_new(inputs)
    moved = jnp.exp(logp) - jnp.exp(old)
    inside = jnp.where(fixed_advantage(inputs) > 0, moved <= limit_high, moved >= -limit_low)
    return _inside_region(inputs, inside, max_ratio)


def dppo_kl(
    inputs: LossInputs, *, limit_low: float = 0.05, limit_high: float = 0.05, max_ratio: float = 20.0
) -> tuple[Array, Array, Metrics]:
    """DPPO with the binary KL (arXiv 2602.04879). Scope: token.

      D = p₀ log(p₀/p) + (1 - p₀) log((1 - p₀)/(1 - p)),   p₀ = π_old(a), p = π(a)
      kept where  D ≤ δh or p ≤ p₀  if A > 0,  and where  D ≤ δl or p ≥ p₀  otherwise;  loss as in `dppo_tv`

    1 - p is -expm1(log p), and a summand with 1 - p₀ = 0 is 0; p = 1 ≠ p₀ gives D = ∞. (verl adds 10⁻⁸ to both.)

    Args:
      inputs, max_ratio: as for `dppo_tv`.
      limit_low: δl ≥ 0.
      limit_high: δh ≥ 0. The defaults are ours, not the paper's, which were not checked.

    Returns, Raises: as `dppo_tv`.
    """
    if limit_low < 0 or limit_high < 0:
        raise ValueError(f"The limits are {limit_low} and {limit_high}: they bound a divergence and must not be negative.")
    mask, old, logp = _old_and_new(inputs)
    rest_old, rest = jnp.maximum(-jnp.expm1(old), 0.0), jnp.maximum(-jnp.expm1(logp), 0.0)
    some = mask & (rest_old > 0)
    of_rest = jnp.where(some, rest_old * (jnp.log(jnp.where(some, rest_old, 1.0)) - jnp.log(jnp.where(some, rest, 1.0))), 0.0)
    divergence = jnp.exp(old) * (old - logp) + of_rest
    up = (divergence <= limit_high) | (logp <= old)
    down = (divergence <= limit_low) | (logp >= old)
    return _inside_region(inputs, jnp.where(fixed_advantage(inputs) > 0, up, down), max_ratio)


def opsm(
    inputs: LossInputs, *, threshold: float, anchor: Anchor = "behaviour", loss: PolicyLoss = ppo_clip
) -> tuple[Array, Array, Metrics]:
    """Off-policy sequence masking (DeepSeek-V3.2, arXiv 2512.02556, §3.1), around another loss. Scope: sequence.

      a sequence is dropped where  Ā < 0  and  mean of log π′(a) - log π(a) over it > δ

    Bad answers that the policy would hardly give any more teach it little and destabilise it; good ones stay. Ā is the sequence's mean.

    Args:
      inputs: E edges; reads `logp`, `advantage`, `tokens.transition`, `tokens.mask`, the log-prob of the anchor, and what `loss` reads.
      threshold: δ ≥ 0, nats per token.
      anchor: π′; "behaviour" takes both the staleness and the mismatch of sampler and trainer in, as TRL does with vLLM.
      loss: whose tokens are dropped; its scope is what it was.

    Returns:
      the loss; keep bool[E], those of `loss` outside dropped sequences; and its pairs with `sequence_dropped_fraction` (of tokens).
      An empty mask gives zeros.

    Raises:
      ValueError: δ is negative or there is no such anchor.
    """
    if threshold < 0:
        raise ValueError(f"The threshold is {threshold}: it must not be negative.")
    drift = -mean_over_sequence(jax.lax.stop_gradient(log_ratio_to(inputs, anchor)), inputs.tokens)
    dropped = (mean_over_sequence(fixed_advantage(inputs), inputs.tokens) < 0) & (drift > threshold)
    values, keep, aux = loss(inputs)
    return values, keep & ~dropped, aux | metric_means({"sequence_dropped_fraction": dropped}, inputs.tokens.mask)


def second_moment_keep(inputs: LossInputs, *, key: Array | None = None, threshold: float = 0.04, anchor: Anchor = "behaviour") -> jax.Array:
    """Which tokens M2PO keeps: bool, of the edges' shape, for the *whole* batch, such as [micro-batches, E]. No gradient.

    Tokens with the largest (log ρ)² are dropped until the mean over the others is below the threshold. Of equal values all are dropped or
    none, so that the order of the edges doesn't matter; if even the smallest value is not below the threshold none is kept
    (AReaL then keeps one).

    Args:
      inputs: reads `logp`, `tokens.mask` and the log-prob of the anchor.
      key: not used, nothing is random; every selection is called with one.
      threshold: τ > 0 (0.04 in the paper).
      anchor: the policy in the ratio's denominator, in the paper the one that sampled.

    Raises:
      ValueError: τ is not positive, or there is no such anchor.
    """
    if threshold <= 0:
        raise ValueError(f"M2PO's threshold is {threshold}: it must be positive.")
    mask = jnp.ravel(inputs.tokens.mask)
    moment = jnp.where(mask, jnp.ravel(jax.lax.stop_gradient(log_ratio_to(inputs, anchor))) ** 2, jnp.inf)
    rising = jnp.sort(moment)
    used = jnp.arange(mask.shape[0]) < jnp.sum(mask)
    mean = safe_divide(jnp.cumsum(jnp.where(used, rising, 0.0)), jnp.arange(1, mask.shape[0] + 1, dtype=jnp.float32))
    first_dropped = jnp.min(jnp.where(used & (mean >= threshold), rising, jnp.inf), initial=jnp.inf)
    return (mask & (moment < first_dropped)).reshape(jnp.shape(inputs.tokens.mask))


def m2po(
    inputs: LossInputs, *, threshold: float = 0.04, anchor: Anchor = "behaviour", selected: Array | None = None
) -> tuple[Array, Array, Metrics]:
    """M2PO (arXiv 2510.01161): the second moment of the log-ratio is bounded, and nothing is clipped. Scope: batch.

      ρ = π(a)/π′(a),   ℓ = -A ρ,   kept where `second_moment_keep` says so

    Unsure: whether the paper measures the moment over all tokens, as here and in AReaL, or only over those that a clip could
    touch. AReaL measures it before the update and then runs decoupled PPO on what is kept.

    Args:
      inputs: E edges; reads `logp`, `advantage`, `tokens.mask` and the log-prob of the anchor.
      threshold, anchor: those of `second_moment_keep`.
      selected: bool[E], its result for these edges, from a pass without gradient over the whole batch; None: `inputs` are the whole batch.

    Returns:
      loss f32[E], 0 where the mask is false; keep bool[E]; and pairs (sum, tokens) of `dropped_fraction`, `ratio_mean`,
      `ratio_squared_mean` and `old_kl_mean`. An empty mask gives zeros.

    Raises:
      ValueError: a setting outside the above.
    """
    mask = inputs.tokens.mask
    chex.assert_equal_shape([inputs.logp, inputs.advantage, mask, mask if selected is None else selected])
    if selected is None:
        selected = second_moment_keep(inputs, threshold=threshold, anchor=anchor)
    logs = log_ratio_to(inputs, anchor)
    keep = mask & selected
    return -fixed_advantage(inputs) * jnp.exp(logs), keep, metric_means({"dropped_fraction": mask & ~keep, **ratio_rates(logs)}, mask)


def _old_and_new(inputs: LossInputs) -> tuple[Array, jax.Array, jax.Array]:
    """The mask, and log π_old(a) and log π(a), 0 where it is false, without gradient."""
    mask = inputs.tokens.mask
    chex.assert_equal_shape([inputs.logp, inputs.tokens.old_logp, mask])
    old = at_least_float32(jnp.where(mask, inputs.tokens.old_logp, 0.0))
    return mask, jax.lax.stop_gradient(old), jax.lax.stop_gradient(masked_logp(inputs))


def _inside_region(inputs: LossInputs, inside: jax.Array, max_ratio: float) -> tuple[Array, Array, Metrics]:
    if max_ratio <= 0:
        raise ValueError(f"max_ratio is {max_ratio}: it must be positive.")
    mask = inputs.tokens.mask
    logs = log_ratio_to(inputs, "old")
    keep = mask & inside
    weight = jax.lax.stop_gradient(jnp.minimum(jnp.exp(logs), max_ratio))
    loss = -weight * fixed_advantage(inputs) * masked_logp(inputs)
    return loss, keep, metric_means({"dropped_fraction": mask & ~keep, **ratio_rates(logs)}, mask)
