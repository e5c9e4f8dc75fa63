"""Per-token losses `(LossInputs) -> (loss[E], keep[E], aux)` and aggregations `(loss, mask, counts) -> (sum, denominator)`.

They take log-probs and values, never a model. `keep` is false where a loss drops a token. A dropped token leaves the
numerator and never the denominator: the step aggregates `where(keep, loss, 0)` under the mask that the caller asked for.
(The value loss is about states, one a transition: its `keep` says which edges have one, and is its mask.)
`aux` holds named pairs (sum, denominator), like an aggregation, so that everything adds up over micro-batches and devices
and is divided once.
"""

from lightningrl.losses.aggregation import (
    count_units,
    group_mean,
    rollout_mean,
    sequence_mean,
    sequence_sum,
    token_mean,
)
from lightningrl.losses.kl import k1, k2, k3
from lightningrl.losses.likelihood import negative_log_likelihood
from lightningrl.losses.metrics import Metrics, metric_means
from lightningrl.losses.policy import ppo_clip
from lightningrl.losses.ratio import MAX_LOG_RATIO, log_ratio
from lightningrl.losses.value import value_loss

__all__ = [
    "MAX_LOG_RATIO",
    "Metrics",
    "count_units",
    "group_mean",
    "k1",
    "k2",
    "k3",
    "log_ratio",
    "metric_means",
    "negative_log_likelihood",
    "ppo_clip",
    "rollout_mean",
    "sequence_mean",
    "sequence_sum",
    "token_mean",
    "value_loss",
]
