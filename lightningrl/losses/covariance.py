"""Clip-Cov and KL-Cov (arXiv 2505.22617): policy losses of batch scope, against the collapse of entropy.

Entropy falls by the covariance of log-prob and advantage, and few tokens make most of it: these are held back. Which ones depends
on means and ranks over the whole batch. So each loss comes in two parts: a selection (`…_selection`, of edges in any shape, such
as [micro-batches, E], from a pass without gradient over the whole batch) and the loss, which takes its edges' part of it. A loss that is
given none takes its edges for the whole batch.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lightningrl.losses.metrics import Metrics, metric_means
from lightningrl.losses.policy import ppo_clip
from lightningrl.losses.terms import fixed_advantage, log_ratio_to, masked_logp, ratio_rates
from lightningrl.segments import masked_max, masked_mean, masked_min
from lightningrl.table import Array, LossInputs, TokenTable


def covariance(inputs: LossInputs) -> jax.Array:
    """Each token's part of the covariance: (A - mean of A) (log π(a) - mean of log π(a)), means over the masked tokens of the batch.

    f32 of the edges' shape, 0 where the mask is false, without gradient. 0 everywhere where the advantage is constant: left to
    rounding, which sums in the order that edges are packed in, the ranks of such a batch would depend on packing.
    """
    chex.assert_equal_shape([inputs.logp, inputs.advantage, inputs.tokens.mask])
    mask = inputs.tokens.mask
    advantage, logp = fixed_advantage(inputs), jax.lax.stop_gradient(masked_logp(inputs))
    signal = mask & (masked_min(advantage, mask) < masked_max(advantage, mask))
    return jnp.where(signal, (advantage - masked_mean(advantage, mask)) * (logp - masked_mean(logp, mask)), 0.0)


def clip_cov_selection(
    inputs: LossInputs,
    *,
    key: Array,
    fraction: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> jax.Array:
    """The tokens whose loss Clip-Cov takes away: bool, of the edges' shape, for the whole batch.

    max(1, ⌊fraction · tokens⌋) tokens drawn at random from those with cov_low < covariance < cov_high that PPO does not clip anyway; all
    of them where they are fewer. A token's number in the draw comes from `key`, its transition and its index in the
    response, so which tokens are drawn does not depend on how they are packed.

    Args:
      inputs: reads `logp`, `advantage`, `tokens.old_logp`, `tokens.transition`, `tokens.k` and `tokens.mask`.
      key: a JAX random key.
      fraction: in (0, 1]. The defaults are verl's, which are the authors'.
      cov_low, cov_high: cov_low < cov_high.
      clip_low, clip_high: those of the loss.

    Raises:
      ValueError: a setting outside the above.
    """
    tokens = inputs.tokens
    chex.assert_equal_shape([inputs.logp, inputs.advantage, tokens.old_logp, tokens.transition, tokens.k, tokens.mask])
    _check_fraction(fraction)
    if not cov_low < cov_high:
        raise ValueError(f"The covariances lie between {cov_low} and {cov_high}: the first must be smaller.")
    mask = tokens.mask
    advantage, ratio, cov = fixed_advantage(inputs), jnp.exp(log_ratio_to(inputs, "old")), covariance(inputs)
    clipped = ((advantage > 0) & (ratio > 1.0 + clip_high)) | ((advantage < 0) & (ratio < 1.0 - clip_low))
    eligible = mask & (cov > cov_low) & (cov < cov_high) & ~clipped
    lot = jnp.where(eligible, _lots(key, tokens), 2.0)
    return jnp.logical_and(eligible, _first(jnp.argsort(jnp.ravel(lot)), _number(fraction, mask)).reshape(jnp.shape(mask)))


def clip_cov(
    inputs: LossInputs,
    *,
    key: Array | None = None,
    selected: Array | None = None,
    fraction: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Array, Array, Metrics]:
    """Clip-Cov (arXiv 2505.22617): PPO, without the tokens that a draw among those of high covariance names. Scope: batch.

      ℓ = max(-A ρ, -A clip(ρ, 1 - εl, 1 + εh)),   kept where not drawn by `clip_cov_selection`

    The thresholds are of advantages as they come: an advantage divided by a token count hardly ever reaches them. Read in and compared
    with verl's code; the sections of the paper were not checked.

    Args:
      inputs: E edges.
      key: a JAX random key; not needed with `selected`.
      selected: bool[E], the drawn tokens among these edges; None: `inputs` are the whole batch, drawn from with `key`.
      fraction, cov_low, cov_high, clip_low, clip_high: those of `clip_cov_selection` and `ppo_clip`.

    Returns:
      loss f32[E], 0 where the mask is false; keep bool[E], the masked tokens that were not drawn; and the pairs of `ppo_clip` with
      `cov_clip_fraction`. An empty mask gives zeros.

    Raises:
      ValueError: a setting outside the above, or neither a key nor a selection.
    """
    mask = inputs.tokens.mask
    chex.assert_equal_shape([inputs.logp, inputs.advantage, inputs.tokens.old_logp, mask, mask if selected is None else selected])
    if selected is None:
        if key is None:
            raise ValueError("Clip-Cov draws tokens at random: give it a key, or the tokens selected.")
        limits = {"cov_low": cov_low, "cov_high": cov_high, "clip_low": clip_low, "clip_high": clip_high}
        selected = clip_cov_selection(inputs, key=key, fraction=fraction, **limits)
    loss, _, aux = ppo_clip(inputs, clip_low=clip_low, clip_high=clip_high, dual_clip=None)
    return loss, mask & ~selected, aux | metric_means({"cov_clip_fraction": selected}, mask)


def kl_cov_selection(inputs: LossInputs, *, key: Array | None = None, fraction: float = 2e-4) -> jax.Array:
    """The tokens that KL-Cov holds back: bool, of the edges' shape, for the whole batch.

    The max(1, ⌊fraction · tokens⌋) masked tokens of the largest covariance. Between equal ones the earlier transition and token is taken,
    wherever they are packed.

    Args:
      inputs: reads `logp`, `advantage`, `tokens.transition`, `tokens.k` and `tokens.mask`.
      key: not used, nothing is random; every selection is called with one.
      fraction: in (0, 1]. verl's default, from the paper, is 2·10⁻⁴; SkyRL's is 0.2.

    Raises:
      ValueError: the fraction is outside (0, 1].
    """
    chex.assert_equal_shape([inputs.logp, inputs.advantage, inputs.tokens.transition, inputs.tokens.k, inputs.tokens.mask])
    _check_fraction(fraction)
    mask = inputs.tokens.mask
    falling = jnp.where(mask, -covariance(inputs), jnp.inf)
    order = jnp.lexsort(tuple(jnp.ravel(x) for x in (inputs.tokens.k, inputs.tokens.transition, falling)))
    return jnp.logical_and(mask, _first(order, _number(fraction, mask)).reshape(jnp.shape(mask)))


def kl_cov(
    inputs: LossInputs, *, selected: Array | None = None, fraction: float = 2e-4, kl_coef: float = 1.0
) -> tuple[Array, Array, Metrics]:
    """KL-Cov (arXiv 2505.22617): no clip, and a penalty on the tokens of the largest covariance. Scope: batch.

      ρ = π(a)/π_old(a),   ℓ = -A ρ + c |log ρ| [selected]

    At ρ = 1 the penalty has no gradient: it holds from the second step on a batch. The mean over tokens of |log ρ| is what verl has. Read
    in and compared with verl's code; the sections of the paper were not checked.

    Args:
      inputs: E edges; reads what `kl_cov_selection` does and `tokens.old_logp`.
      selected: bool[E], its result for these edges; None: `inputs` are the whole batch.
      fraction: that of `kl_cov_selection`.
      kl_coef: c ≥ 0.

    Returns:
      loss f32[E], 0 where the mask is false; keep bool[E], the mask; and pairs (sum, tokens) of `cov_kl_fraction`, `ratio_mean`,
      `ratio_squared_mean` and `old_kl_mean`. An empty mask gives zeros.

    Raises:
      ValueError: a setting outside the above.
    """
    mask = inputs.tokens.mask
    chex.assert_equal_shape([inputs.logp, inputs.advantage, inputs.tokens.old_logp, mask, mask if selected is None else selected])
    if kl_coef < 0:
        raise ValueError(f"kl_coef is {kl_coef}: it must not be negative.")
    selected = kl_cov_selection(inputs, fraction=fraction) if selected is None else selected
    logs = log_ratio_to(inputs, "old")
    loss = -fixed_advantage(inputs) * jnp.exp(logs) + jnp.where(mask & selected, kl_coef * jnp.abs(logs), 0.0)
    return loss, mask, metric_means({"cov_kl_fraction": selected, **ratio_rates(logs)}, mask)


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"The fraction is {fraction}: it must lie in (0, 1].")


def _number(fraction: float, mask: Array) -> jax.Array:
    return jnp.maximum(jnp.floor(fraction * jnp.sum(mask).astype(jnp.float32)), 1.0).astype(jnp.int32)


def _first(order: jax.Array, number: jax.Array) -> jax.Array:
    """bool[E]: the first `number` entries of an order."""
    places = jnp.arange(order.shape[0])
    return jnp.zeros(order.shape, bool).at[order].set(places < number)


def _lots(key: Array, tokens: TokenTable) -> jax.Array:
    """A number in [0, 1) for every edge, of the edges' shape."""
    draw = jax.vmap(lambda n, k: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, n), k)))
    return draw(jnp.ravel(tokens.transition), jnp.ravel(tokens.k)).reshape(jnp.shape(tokens.mask))
