"""Policy losses of sequence scope. The sequence is the transition: one LLM call.

A loss needs sums over the edges of a transition. Their ids index the TransitionTable, whose size a loss doesn't know and which may
be larger than E, so they are numbered anew within the edges given (`sequence_ids`). That is exact as long as all edges of a
transition are among them, which packing promises: they lie in one row. For the same reason no second pass over the batch is needed.

A sequence's loss stands at each of its masked edges, so `sequence_mean` gives every sequence one vote, as in the papers; under
`token_mean` a sequence would weigh its length. Cutting a rollout into calls changes these losses, for it changes the sequences.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lightningrl.losses.metrics import Metrics, metric_means
from lightningrl.losses.terms import Anchor, fixed_advantage, log_ratio_to, masked_logp, ratio_rates
from lightningrl.ratio import MAX_LOG_RATIO
from lightningrl.segments import segment_mean, segment_sum
from lightningrl.table import Array, LossInputs, TokenTable


def sequence_ids(tokens: TokenTable) -> jax.Array:
    """int32[E] in 0 … E-1: equal where the transition is, in order of the transitions. Sorts once; there are no more ids than edges."""
    chex.assert_rank([tokens.transition, tokens.mask], 1)
    chex.assert_equal_shape([tokens.transition, tokens.mask])
    size = tokens.transition.shape[0]
    return jnp.unique(tokens.transition, return_inverse=True, size=size)[1].astype(jnp.int32)


def sum_over_sequence(values: Array, tokens: TokenTable) -> jax.Array:
    """Σ over the masked edges of each edge's transition: f32[E], 0 where the mask is false."""
    ids = sequence_ids(tokens)
    return jnp.where(tokens.mask, segment_sum(values, ids, ids.shape[0], mask=tokens.mask)[ids], 0.0)


def mean_over_sequence(values: Array, tokens: TokenTable) -> jax.Array:
    """The mean over the masked edges of each edge's transition: f32[E], 0 where the mask is false."""
    ids = sequence_ids(tokens)
    return jnp.where(tokens.mask, segment_mean(values, ids, ids.shape[0], mask=tokens.mask)[ids], 0.0)


def gspo(inputs: LossInputs, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> tuple[Array, Array, Metrics]:
    """GSPO (arXiv 2507.18071, §4.1). Scope: sequence; aggregate with `sequence_mean`.

      s = exp(mean of log π(a)/π_old(a) over the sequence),   ℓ = max(-Ā s, -Ā clip(s, 1 - εl, 1 + εh))

    Ā is the mean over the sequence: the paper has one advantage a sequence. The sequence's loss stands at each of its n edges; its
    gradient in the log-prob of each is -Ā s / n where it isn't clipped.

    Args:
      inputs: E edges; reads `logp`, `advantage`, `tokens.old_logp`, `tokens.transition` and `tokens.mask`. Per-token log-ratios are
        clamped to ±20, and so is their mean. (verl clamps log s to 10 from above.)
      clip_low: εl in [0, 1).
      clip_high: εh ≥ 0. The defaults are the paper's (§5.1): a mean of log-ratios moves far less than each of them.

    Returns:
      loss f32[E], 0 where the mask is false; keep bool[E], the mask; and pairs (sum, tokens) of `clip_fraction_high`,
      `clip_fraction_low`, `sequence_ratio_mean`, `ratio_mean`, `ratio_squared_mean` and `old_kl_mean`. An empty mask gives zeros.

    Raises:
      ValueError: a clip range outside the above.
    """
    logs = log_ratio_to(inputs, "old")
    ratio = jnp.exp(mean_over_sequence(logs, inputs.tokens))
    return _clipped(inputs, logs, ratio, mean_over_sequence(fixed_advantage(inputs), inputs.tokens), clip_low, clip_high)


def gspo_token(inputs: LossInputs, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> tuple[Array, Array, Metrics]:
    """GSPO-token (arXiv 2507.18071, §4.3). Scope: sequence; aggregate with `sequence_mean`.

      sₖ = sg(s) π(aₖ) / sg(π(aₖ)),   ℓ = max(-A sₖ, -A clip(sₖ, 1 - εl, 1 + εh)),   s as in `gspo`

    Equal to `gspo` in value and in the gradient of the sequence's mean where A is constant over the sequence; here A may differ per
    token. Arguments, results, errors: `gspo`. verl's `gspo` is this one.
    """
    logs = log_ratio_to(inputs, "old")
    logp = masked_logp(inputs)
    sequence_log = jax.lax.stop_gradient(mean_over_sequence(logs, inputs.tokens))
    ratio = jnp.exp(sequence_log + (logp - jax.lax.stop_gradient(logp)))
    return _clipped(inputs, logs, ratio, fixed_advantage(inputs), clip_low, clip_high)


def luspo(inputs: LossInputs, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> tuple[Array, Array, Metrics]:
    """LUSPO (arXiv 2602.05261): the loss of GSPO times the length. Scope: sequence; aggregate with `sequence_mean`.

      ℓ = n · max(-Ā s, -Ā clip(s, 1 - εl, 1 + εh)),   n the sequence's masked tokens

    The same as `gspo` under `sequence_sum`. It takes back the 1/n of GSPO's gradient, which favours short answers when they are right
    and long ones when they are wrong. Arguments, results, errors: `gspo`. The formula was read in TRL's code, not in the paper, and
    so were no clip ranges: the defaults are GSPO's.
    """
    chex.assert_equal_shape([inputs.logp, inputs.counts.sequence_tokens, inputs.tokens.mask])
    loss, keep, aux = gspo(inputs, clip_low=clip_low, clip_high=clip_high)
    return jnp.where(keep, inputs.counts.sequence_tokens, 0.0) * loss, keep, aux


def gmpo(inputs: LossInputs, *, clip_low: float = 0.4, clip_high: float = 0.4) -> tuple[Array, Array, Metrics]:
    """GMPO (arXiv 2507.20673): the geometric mean of ratios that are clipped per token. Scope: sequence; `sequence_mean`.

      dₖ = log π(aₖ)/π_old(aₖ)
      dₖ′ = min(dₖ, εh) where A > 0,  max(dₖ, -εl) where A < 0,  0 where A = 0
      ℓ = -Ā exp(mean of dₖ′ over the sequence)

    Read in and compared with verl's and TRL's code; the sections of the paper were not checked.

    Args:
      inputs: as for `gspo`.
      clip_low: εl ≥ 0, of the *log*-ratio.
      clip_high: εh ≥ 0, likewise. The default range (e⁻⁰·⁴, e⁰·⁴) is the paper's.

    Returns:
      As for `gspo`; the clip fractions count tokens whose log-ratio was clipped. verl averages over rows and counts
      those without a masked token too; `sequence_mean` doesn't.

    Raises:
      ValueError: a clip range is negative.
    """
    if clip_low < 0 or clip_high < 0:
        raise ValueError(f"clip_low is {clip_low} and clip_high is {clip_high}: they bound a log-ratio and must not be negative.")
    mask = inputs.tokens.mask
    logs, advantage = log_ratio_to(inputs, "old"), fixed_advantage(inputs)
    clipped = jnp.where(advantage > 0, jnp.minimum(logs, clip_high), jnp.where(advantage < 0, jnp.maximum(logs, -clip_low), 0.0))
    ratio = jnp.exp(mean_over_sequence(clipped, inputs.tokens))
    loss = jnp.where(mask, -mean_over_sequence(advantage, inputs.tokens) * ratio, 0.0)
    rates = {
        "clip_fraction_high": (advantage > 0) & (logs > clip_high),
        "clip_fraction_low": (advantage < 0) & (logs < -clip_low),
        "sequence_ratio_mean": ratio,
        **ratio_rates(logs),
    }
    return loss, mask, metric_means(rates, mask)


def vespo(
    inputs: LossInputs,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
    anchor: Anchor = "old",
) -> tuple[Array, Array, Metrics]:
    """VESPO (arXiv 2602.10693): REINFORCE, weighted by a smooth function of the whole sequence's ratio. Scope: sequence.

      w = Π π(aₖ)/π′(aₖ) over the sequence,   φ(w) = exp(λ + k log w - λ w),   ℓ = -sg(φ(w)) A log π(a)

    φ(1) = 1 and φ is largest at w = k/λ: with the defaults it falls on both sides of ⅔ where A ≥ 0, of 1½ where A < 0. Nothing is
    divided by the length. Aggregate with `token_mean`. The formula and the defaults were read in TRL's code, not in the paper.

    Args:
      inputs: E edges; reads `logp`, `advantage`, `tokens.transition`, `tokens.mask` and the log-prob of the anchor. Per-token
        log-ratios are clamped to ±20, and so is log w (TRL: to log 10⁻⁸ from below, where φ is under 10⁻¹³ either way).
      k_pos, lambda_pos: k ≥ 0 and λ > 0 where A ≥ 0.
      k_neg, lambda_neg: the same where A < 0.
      anchor: π′. "behaviour" takes staleness and the mismatch of sampler and trainer in at once; no further correction then.

    Returns:
      loss f32[E], 0 where the mask is false; keep bool[E], the mask; and pairs (sum, tokens) of `phi_mean`, `ratio_mean`,
      `ratio_squared_mean` and `old_kl_mean`. An empty mask gives zeros.

    Raises:
      ValueError: k is negative, λ is not positive, or there is no such anchor.
    """
    if min(k_pos, k_neg) < 0 or min(lambda_pos, lambda_neg) <= 0:
        raise ValueError(f"k is {k_pos}, {k_neg} and must not be negative; λ is {lambda_pos}, {lambda_neg} and must be positive.")
    mask = inputs.tokens.mask
    logs, advantage = log_ratio_to(inputs, anchor), fixed_advantage(inputs)
    log_w = jnp.clip(sum_over_sequence(jax.lax.stop_gradient(logs), inputs.tokens), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    k, lambda_ = (jnp.where(advantage >= 0, a, b) for a, b in ((k_pos, k_neg), (lambda_pos, lambda_neg)))
    phi = jnp.exp(lambda_ + k * log_w - lambda_ * jnp.exp(log_w))
    return -phi * advantage * masked_logp(inputs), mask, metric_means({"phi_mean": phi, **ratio_rates(logs)}, mask)


def _clipped(
    inputs: LossInputs, logs: jax.Array, ratio: jax.Array, advantage: jax.Array, clip_low: float, clip_high: float
) -> tuple[Array, Array, Metrics]:
    if not 0 <= clip_low < 1 or clip_high < 0:
        raise ValueError(f"clip_low is {clip_low} and clip_high is {clip_high}: they must lie in [0, 1) and in [0, ∞).")
    mask = inputs.tokens.mask
    free, clipped = -advantage * ratio, -advantage * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    rates = {
        "clip_fraction_high": (clipped > free) & (ratio > 1.0),
        "clip_fraction_low": (clipped > free) & (ratio < 1.0),
        "sequence_ratio_mean": ratio,
        **ratio_rates(logs),
    }
    return jnp.where(mask, jnp.maximum(free, clipped), 0.0), mask, metric_means(rates, mask)
