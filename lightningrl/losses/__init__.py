"""Per-token losses `(LossInputs) -> (loss[E], keep[E], aux)` and aggregations `(loss, mask, counts) -> (sum, denominator)`.

They take log-probs and values, never a model, and compute in float32, or in float64 where these are. `keep` is false where a
loss drops a token. A dropped token leaves the numerator and never the denominator: the step aggregates `where(keep, loss, 0)`
under the mask that the caller asked for.
(The value loss is about states, one a transition: its `keep` says which edges have one, and is its mask.)
`aux` holds named pairs (sum, denominator), like an aggregation, so that everything adds up over micro-batches and devices
and is divided once.
"""

from lightningrl.losses.aggregation import count_units, group_mean, rollout_mean, sequence_mean, sequence_sum, token_mean
from lightningrl.losses.correction import (
    batch_normalised,
    corrected,
    geometric,
    rejection,
    sequence_masking,
    sequence_truncation,
    token_masking,
    token_truncation,
)
from lightningrl.losses.covariance import clip_cov, clip_cov_selection, kl_cov, kl_cov_selection
from lightningrl.losses.kl import k1, k2, k3, k3_plus, k3_unbiased
from lightningrl.losses.likelihood import negative_log_likelihood
from lightningrl.losses.masks import dppo_kl, dppo_tv, m2po, opsm, second_moment_keep
from lightningrl.losses.metrics import Metrics, metric_means
from lightningrl.losses.policy import ppo_clip
from lightningrl.losses.sequence import gmpo, gspo, gspo_token, luspo, vespo
from lightningrl.losses.soft import cispo, decoupled_ppo, dro, gpg, sapo
from lightningrl.losses.value import States, value_loss, value_states

__all__ = [
    "Metrics",
    "States",
    "batch_normalised",
    "cispo",
    "clip_cov",
    "clip_cov_selection",
    "corrected",
    "count_units",
    "decoupled_ppo",
    "dppo_kl",
    "dppo_tv",
    "dro",
    "geometric",
    "gmpo",
    "gpg",
    "group_mean",
    "gspo",
    "gspo_token",
    "k1",
    "k2",
    "k3",
    "k3_plus",
    "k3_unbiased",
    "kl_cov",
    "kl_cov_selection",
    "luspo",
    "m2po",
    "metric_means",
    "negative_log_likelihood",
    "opsm",
    "ppo_clip",
    "rejection",
    "rollout_mean",
    "sapo",
    "second_moment_keep",
    "sequence_masking",
    "sequence_mean",
    "sequence_sum",
    "sequence_truncation",
    "token_masking",
    "token_mean",
    "token_truncation",
    "value_loss",
    "value_states",
    "vespo",
]
