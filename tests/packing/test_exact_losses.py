"""The objective and its gradient are those of plain rows, for every loss under every aggregation.

One side is what a train step does: tries packed into rows, micro-batches that are added up, denominators of the whole batch. The other is
written here, and packs nothing: every call is a row of its own under a causal mask, a micro-batch of its own for its loss, and each of its
tokens weighs what its aggregation says, counted in Python.

Losses read scores of edges and nothing else of the policy. So each example runs the model once on either side: the slopes of all
objectives in the scores are then carried back to the parameters together.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl import losses
from lightningrl.model import decoder
from lightningrl.model.attention import attend
from lightningrl.model.config import ModelConfig
from lightningrl.model.params import init_params
from lightningrl.packing.rows import Rows, RowSettings, pack
from lightningrl.table import LossInputs, TokenTable
from lightningrl.tabulate import table_from_rollouts
from lightningrl.train import EdgeBatch, Scores, loss_inputs, score_edges
from lightningrl.types import Rollout, Task, Transition
from tests.conversations import call

LONGEST, CALLS, RESPONSE = 12, 12, 3  # tokens of a call, calls of a batch and tokens of a response, at most
BATCHES = CALLS // 2  # micro-batches of two rows, at most: a row holds a call at least
ROWS = RowSettings(lengths=(LONGEST,), tokens=2 * LONGEST, edges=CALLS * RESPONSE)  # so many edges that all have one shape
CONFIG = ModelConfig(8, 8, 2, 2, 1, 4, 12, LONGEST, qk_norm=True, qkv_bias=True, value_head=True)

# ---- what there is to compare

RETURNS = {"tuple[Array, Array, Metrics]": "loss", "Aggregate": "aggregation", "Weights": "correction", "jax.Array": "kl"}
APART = {"Metrics", "States", "count_units", "metric_means", "value_states"}  # no part of an objective


def kind(name: str) -> str | None:
    signature = inspect.signature(getattr(losses, name))
    return "selection" if name not in SELECTIONS and "key" in signature.parameters else RETURNS.get(signature.return_annotation)


SELECTIONS = {"clip_cov": losses.clip_cov_selection, "kl_cov": losses.kl_cov_selection, "m2po": losses.second_moment_keep}
# Ranges are such that some of a handful of tokens fall on either side.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "gspo": [{"clip_low": 0.1, "clip_high": 0.1}],
    "gspo_token": [{"clip_low": 0.1, "clip_high": 0.1}],
    "luspo": [{"clip_low": 0.1, "clip_high": 0.1}],
    "gmpo": [{"clip_low": 0.1, "clip_high": 0.1}],
    "vespo": [{}, {"anchor": "behaviour"}],
    "cispo": [{"lower": 0.8, "upper": 1.2}],
    "dro": [{"beta": 0.5}],
    "decoupled_ppo": [{"max_weight": 1.2, "dual_clip": 1.5}],
    "dppo_tv": [{"limit_low": 0.02, "limit_high": 0.02, "max_ratio": 1.2}],
    "dppo_kl": [{"limit_low": 0.002, "limit_high": 0.002, "max_ratio": 1.2}],
    "opsm": [{"threshold": 0.1}, {"threshold": 0.1, "anchor": "old", "loss": functools.partial(losses.gspo, clip_low=0.1, clip_high=0.1)}],
    "m2po": [{"threshold": 0.04}],
    "clip_cov": [{"fraction": 0.3, "cov_low": -1.0, "cov_high": 10.0}],
    "kl_cov": [{"fraction": 0.3}],
    "negative_log_likelihood": [{"weighted": False}, {"weighted": True}],
    "value_loss": [{"states": "calls"}, {"states": "tokens"}, {"states": "tokens", "clip": None}],
    "token_truncation": [{"cap": 1.1}],
    "sequence_truncation": [{"cap": 1.1}],
    "token_masking": [{"low": 0.8, "high": 1.2}],
    "sequence_masking": [{"low": 0.8, "high": 1.2}],
    "geometric": [{"low": 0.8, "high": 1.2}],
    "rejection": [
        {"estimator": "k1", "level": "token", "high": 1.2},
        {"estimator": "k1", "level": "sequence_mean", "high": 1.2},
        {"estimator": "k2", "level": "sequence_sum", "high": 0.05},
        {"estimator": "k3", "level": "sequence_max", "high": 0.05},
    ],
    "batch_normalised": [{"mean": np.float32(0.9)}],
    "sequence_sum": [{}, {"length": 7.0}],
}


PUBLIC = {name: kind(name) for name in losses.__all__ if name not in APART}


def variants(kind: str) -> dict[str, Callable[..., Any]]:
    """Every public function of a kind with each of its settings; one that is not named above stands with its defaults."""
    names = [name for name, its in PUBLIC.items() if its == kind and name != "corrected"]
    return {name + str(chosen or ""): functools.partial(getattr(losses, name), **chosen) for name in names for chosen in SETTINGS.get(name, [{}])}


Term = Callable[[LossInputs], tuple[jax.Array, Any]]  # [micro-batches, E] -> what is aggregated and the mask to do it under, of the same shape


def of_loss(loss: Callable[..., Any], select: Callable[..., Any] | None, *, masks_itself: bool = False) -> Term:
    def term(inputs: LossInputs) -> tuple[jax.Array, Any]:
        selected = {} if select is None else {"selected": select(inputs, key=jax.random.key(0))}
        values, keep, _ = jax.vmap(loss)(inputs, **selected)
        return jnp.where(keep, values, 0.0), keep if masks_itself else inputs.tokens.mask

    return term


def all_terms() -> dict[str, Term]:
    terms: dict[str, Term] = {"entropy": lambda inputs: (inputs.entropy, inputs.tokens.mask)}
    for name, kl in variants("kl").items():
        terms[name] = lambda inputs, kl=kl: (jax.vmap(kl)(inputs), inputs.tokens.mask)
    for name, loss in variants("loss").items():
        select = SELECTIONS.get(loss.func.__name__)
        chosen = None if select is None else functools.partial(select, **loss.keywords)
        terms[name] = of_loss(loss, chosen, masks_itself=loss.func is losses.value_loss)
    for name, correction in variants("correction").items():
        terms[f"corrected {name}"] = of_loss(functools.partial(losses.corrected, loss=losses.gpg, correction=correction), None)
    selecting = functools.partial(losses.corrected, loss=losses.kl_cov, correction=losses.token_truncation)
    terms["corrected kl_cov"] = of_loss(selecting, functools.partial(losses.kl_cov_selection, fraction=0.3))
    return terms


TERMS, AGGREGATIONS = all_terms(), variants("aggregation")

# ---- the two sides


def objectives(scores: Scores, batch: EdgeBatch, aggregate: Callable[[jax.Array, Any], jax.Array]) -> tuple[jax.Array, Scores]:
    """Of every term and aggregation [L, A] the objective, and its slopes in the scores [L, A, micro-batches, E]."""

    def of_term(term: Term) -> tuple[Scores, jax.Array]:
        def objective(scores: Scores) -> tuple[jax.Array, jax.Array]:
            value = aggregate(*term(loss_inputs(scores, batch)))
            return value, value

        return jax.jacrev(objective, has_aux=True)(scores)

    found = [of_term(term) for term in TERMS.values()]
    return jnp.stack([value for _, value in found]), jax.tree.map(lambda *x: jnp.stack(x), *(slopes for slopes, _ in found))


@jax.jit
def packed_objectives(scores: Scores, batch: EdgeBatch) -> tuple[jax.Array, Scores]:
    def aggregate(values: jax.Array, mask: Any) -> jax.Array:
        pairs = [jax.vmap(aggregation)(values, mask, batch.counts) for aggregation in AGGREGATIONS.values()]
        return jnp.stack([jnp.sum(total) / jnp.sum(denominator) for total, denominator in pairs])

    return objectives(scores, batch, aggregate)


@jax.jit
def plain_objectives(scores: Scores, batch: EdgeBatch, weights: Any, norms: Any) -> tuple[jax.Array, Scores]:
    def aggregate(values: jax.Array, mask: Any) -> jax.Array:
        return jnp.sum(weights * values, axis=(1, 2)) / jnp.sum(jnp.where(mask, norms, 0.0), axis=(1, 2))

    return objectives(scores, batch, aggregate)


def packed_scores(params: Any, rows: Rows, edges: TokenTable) -> Scores:
    return jax.vmap(lambda r, e: score_edges(params, CONFIG, r, e))(rows, edges)


def plain_scores(params: Any, tokens: Any, edges: TokenTable) -> Scores:
    """Of one call a row: tokens [calls, LONGEST], edges [calls, RESPONSE]."""
    before = jnp.tril(jnp.ones((1, LONGEST, LONGEST), bool))
    places = jnp.broadcast_to(jnp.arange(LONGEST), tokens.shape)
    hidden = decoder.forward(params, CONFIG, tokens, places, places, attention=lambda q, k, v, _: attend(q, k, v, before))
    read = jnp.take_along_axis(hidden, edges.node[..., None], axis=1)
    logp = jax.nn.log_softmax(decoder.logits(params, CONFIG, read) / edges.temperature[..., None])
    p = jnp.exp(logp)
    return Scores(
        logp=jnp.take_along_axis(logp, edges.token[..., None], axis=-1)[..., 0],
        entropy=-jnp.sum(p * logp, axis=-1),
        value=read @ params["value_head"],
        sum_pi2=jnp.sum(p**2, axis=-1),
    )


def gradients(scores_of: Callable[..., Scores]) -> Callable[..., Any]:
    """Slopes in scores [L, A, ...] to gradients in all parameters [L, A, P]."""

    def carried(params: Any, rows: Any, edges: TokenTable, slopes: Scores) -> jax.Array:
        back = jax.vjp(lambda p: scores_of(p, rows, edges), params)[1]
        flat = jax.vmap(jax.vmap(lambda s: jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(back(s))])))
        return flat(slopes)

    return jax.jit(carried)


SCORES = {side: jax.jit(side) for side in (packed_scores, plain_scores)}
GRADIENTS = {side: gradients(side) for side in (packed_scores, plain_scores)}
