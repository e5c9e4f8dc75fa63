"""Sharing changes no loss: the objective and its gradient are those of plain rows, for every loss under every aggregation.

One side is what a train step does: tries packed into rows, micro-batches that are added up, denominators of the whole batch. The other
packs nothing (`plain_rows`), and every call is a micro-batch of its own.

A loss reads scores of edges and nothing else of the policy. So an example runs the model once on either side, and the slopes of all
objectives in the scores are carried back to the parameters together.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightningrl import losses
from lightningrl.model.params import init_params
from lightningrl.packing.rows import PackedBatch, Rows, RowSettings, pack
from lightningrl.table import LossInputs, TokenTable, UnitCounts
from lightningrl.tabulate import table_from_rollouts
from lightningrl.train import EdgeBatch, Scores, loss_inputs, score_edges
from lightningrl.types import Rollout, Transition
from tests.conversations import call
from tests.packing.plain_rows import CALLS, CONFIG, EDGES, LONGEST, RESPONSE, batches, plain_rows, plain_scores, plain_weights, rollout

# ---- what there is to compare

RETURNS = {"tuple[Array, Array, Metrics]": "loss", "Aggregate": "aggregation", "Weights": "correction", "jax.Array": "kl"}
APART = {"Metrics", "States", "count_units", "metric_means", "value_states"}  # no part of an objective
SELECTIONS: dict[str, Callable[..., Any]] = {
    "clip_cov": losses.clip_cov_selection,
    "kl_cov": losses.kl_cov_selection,
    "m2po": losses.second_moment_keep,
}
NARROW = {"clip_low": 0.1, "clip_high": 0.1}
# Ranges such that of a handful of tokens, not far from the policy, some fall on either side.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "batch_normalised": [{"mean": np.float32(0.9)}],  # without a mean it is of a whole batch, and a recipe with it is refused
    "cispo": [{"lower": 0.8, "upper": 1.2}],
    "clip_cov": [{"fraction": 0.3, "cov_low": -1.0, "cov_high": 10.0}],
    "decoupled_ppo": [{"max_weight": 1.1, "dual_clip": 1.5}],
    "dppo_kl": [{"limit_low": 0.001, "limit_high": 0.001, "max_ratio": 1.2}],
    "dppo_tv": [{"limit_low": 0.01, "limit_high": 0.01, "max_ratio": 1.2}],
    "dro": [{"beta": 0.5}],
    "geometric": [{"low": 0.8, "high": 1.2}],
    "gmpo": [NARROW],
    "gspo": [NARROW],
    "gspo_token": [NARROW],
    "kl_cov": [{"fraction": 0.3}],
    "luspo": [NARROW],
    "opsm": [{"threshold": 0.1}, {"threshold": 0.0, "anchor": "old", "loss": functools.partial(losses.gspo, clip_low=0.1, clip_high=0.1)}],
    "rejection": [
        {"estimator": "k1", "level": "token", "high": 1.2},
        {"estimator": "k1", "level": "sequence_mean", "high": 1.2},
        {"estimator": "k2", "level": "sequence_sum", "high": 0.05},
        {"estimator": "k3", "level": "sequence_max", "high": 0.03},
    ],
    "sequence_masking": [{"low": 0.8, "high": 1.2}],
    "sequence_sum": [{}, {"length": 7.0}],
    "sequence_truncation": [{"cap": 1.1}],
    "token_masking": [{"low": 0.8, "high": 1.2}],
    "token_truncation": [{"cap": 1.1}],
    "value_loss": [{"states": "calls"}, {"states": "tokens"}, {"states": "tokens", "clip": None}],
    "vespo": [{}, {"anchor": "behaviour"}],
}
DROPPING = ("clip_cov", "decoupled_ppo", "dppo", "m2po", "opsm", "calls", "masking", "geometric", "rejection")  # in names of terms


def kind(name: str) -> str | None:
    if getattr(losses, name) in SELECTIONS.values():
        return "selection"
    signature = inspect.signature(getattr(losses, name))
    of_edges = next(iter(signature.parameters)) in ("inputs", "loss")  # else it is a part of what others do
    return RETURNS.get(signature.return_annotation) if of_edges else None


PUBLIC = {name: kind(name) for name in losses.__all__ if name not in APART}


def variants(kind: str) -> dict[str, Any]:
    """Every public function of a kind with each of its settings; one that has none above stands with its defaults."""
    return {
        name + str(chosen or ""): functools.partial(getattr(losses, name), **chosen)
        for name, its in PUBLIC.items()
        if its == kind and name != "corrected"
        for chosen in SETTINGS.get(name, [{}])
    }


@dataclasses.dataclass(frozen=True)
class Term:
    """What is aggregated, and over which edges: all of the mask, or with "calls" the first of each call."""

    of: Callable[[LossInputs], Any]  # of [micro-batches, E], in the same shape
    states: losses.States = "tokens"


def of_loss(loss: Any, states: losses.States = "tokens", select: Any = None) -> Term:
    def kept(inputs: LossInputs) -> jax.Array:
        selected = {} if select is None else {"selected": select(inputs, key=jax.random.key(0))}
        values, keep, _ = jax.vmap(loss)(inputs, **selected)
        return jnp.where(keep, values, 0.0)

    return Term(kept, states)


def all_terms() -> dict[str, Term]:
    terms = {"entropy": Term(lambda inputs: inputs.entropy)} | {name: Term(jax.vmap(kl)) for name, kl in variants("kl").items()}
    for name, loss in variants("loss").items():
        select = SELECTIONS.get(loss.func.__name__)
        terms[name] = of_loss(loss, loss.keywords.get("states", "tokens"), select and functools.partial(select, **loss.keywords))
    for name, correction in variants("correction").items():
        terms[f"corrected {name}"] = of_loss(functools.partial(losses.corrected, loss=losses.gpg, correction=correction))
    selecting = functools.partial(losses.corrected, loss=losses.kl_cov, correction=losses.token_truncation)
    return terms | {"corrected kl_cov": of_loss(selecting, select=functools.partial(losses.kl_cov_selection, fraction=0.3))}


TERMS, AGGREGATIONS = all_terms(), variants("aggregation")


def test_every_public_function_has_its_place() -> None:
    """A loss that is added is compared too, and one whose kind or settings are not known here fails."""
    assert set(PUBLIC.values()) == {"selection", *RETURNS.values()}, PUBLIC
    of_batch = {name for name, its in PUBLIC.items() if its == "loss" and "selected" in inspect.signature(getattr(losses, name)).parameters}
    assert of_batch == {*SELECTIONS, "corrected"} and SETTINGS.keys() <= PUBLIC.keys()
    one_token = [call([0], [0], 0)]
    assert plain_weights([rollout("r", "g", one_token)], np.asarray(plain_rows(one_token)[1].mask)).keys() == AGGREGATIONS.keys()


# ---- programs: each is compiled once for a dtype, and those that know no rows serve both sides


@jax.jit
def terms_and_slopes(scores: Scores, batch: EdgeBatch, weights: Any) -> tuple[jax.Array, Scores]:
    """Every term [L, micro-batches, E], and the slopes in the scores [L, A, …] of its sums under weights [L, A, …]."""
    found = []
    for term, weight in zip(TERMS.values(), weights, strict=True):
        values, back = jax.vjp(lambda s, term=term: term.of(loss_inputs(s, batch)), scores)
        found.append((values, jax.vmap(lambda w, back=back: back(w)[0])(weight)))
    return jax.tree.map(lambda *x: jnp.stack(x), *found)


@jax.jit
def aggregated(values: Any, masks: Any, counts: UnitCounts) -> tuple[jax.Array, jax.Array]:
    """By the library's aggregations: the objectives [L, A], and their slopes in the terms [L, A, …], which depend on no term."""

    def of_term(values: jax.Array, mask: Any) -> tuple[jax.Array, jax.Array]:
        pairs = [jax.vmap(aggregation)(values, mask, counts) for aggregation in AGGREGATIONS.values()]
        objectives = jnp.stack([jnp.sum(total) / jnp.sum(denominator) for total, denominator in pairs])
        return objectives, objectives

    slopes, objectives = jax.vmap(jax.jacrev(of_term, has_aux=True))(values, masks)
    return objectives, slopes


def packed_scores(params: Any, rows: Rows, edges: TokenTable) -> Scores:
    return jax.vmap(lambda r, e: score_edges(params, CONFIG, r, e))(rows, edges)


def with_gradients(scores_of: Callable[..., Scores]) -> tuple[Callable[..., Scores], Callable[..., jax.Array]]:
    """The scores, and what carries slopes in them [L, A, …] back to gradients in all parameters [L, A, P]."""

    def gradients(slopes: Scores, params: Any, *batch: Any) -> jax.Array:
        back = jax.vjp(lambda p: scores_of(p, *batch), params)[1]
        return jax.vmap(jax.vmap(lambda s: jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(back(s))])))(slopes)

    return jax.jit(scores_of), jax.jit(gradients)


PACKED, PLAIN, COUNT = with_gradients(packed_scores), with_gradients(plain_scores), jax.jit(losses.count_units)


# ---- the two sides


@dataclasses.dataclass(frozen=True)
class Found:
    terms: np.ndarray  # [L, CALLS, EDGES]
    objectives: np.ndarray  # [L, A]
    gradients: np.ndarray  # [L, A, P]
    weights: np.ndarray  # [L, A, CALLS, EDGES], of terms in objectives
    slopes: np.ndarray  # [4, L, A, CALLS, EDGES], of objectives in scores


@functools.cache
def params(dtype: Any) -> Any:
    drawn = jax.jit(functools.partial(init_params, CONFIG, dtype=dtype))(jax.random.key(0))
    return drawn | {"value_head": jnp.linspace(-1, 1, CONFIG.hidden_size, dtype=dtype)}


def packed_in_rows(calls: list[Transition]) -> PackedBatch:
    """A micro-batch is two rows; as many edges as there can be, so that there is one shape."""
    return pack(calls, range(len(calls)), RowSettings((LONGEST,), 2 * LONGEST, EDGES), multiple=2)


def packed_rows(calls: list[Transition]) -> tuple[Rows, TokenTable]:
    """With empty micro-batches up to CALLS."""
    packed = packed_in_rows(calls)
    missing = CALLS - len(packed.rows)
    rows = jax.tree.map(lambda *x: np.stack([*x, *[np.zeros_like(x[0])] * missing]), *packed.rows)
    edges = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x, shape=(missing, EDGES))]), packed.edges)
    return rows, dataclasses.replace(edges, temperature=np.where(edges.mask, edges.temperature, 1))


def both_sides(rollouts: list[Rollout], seed: int, dtype: Any) -> tuple[Found, Found]:
    """What tries give, and what plain rows do."""
    calls, rng = [t for r in rollouts for t in r.transitions], np.random.default_rng(seed)
    table = table_from_rollouts(rollouts, size=CALLS)
    (rows, packed), (tokens, plain) = packed_rows(calls), plain_rows(calls)
    of_packed, of_plain = PACKED[0](params(dtype), rows, packed), PLAIN[0](params(dtype), tokens, plain)

    def drawn(size: float) -> np.ndarray:  # by transition and k: half of it is of the call
        return rng.normal(0, size, (CALLS, 1)) + rng.normal(0, size, (CALLS, RESPONSE))

    of_edges = {name: drawn(1.0) for name in ("advantage", "old_value", "value_target")}
    policies = {name: np.asarray(of_plain.logp)[:, :RESPONSE] + drawn(0.15) for name in ("old_logp", "behaviour_logp", "ref_logp")}

    def batch(edges: TokenTable) -> EdgeBatch:
        at = (edges.transition, edges.k)
        # Counts are whole numbers, exact in float32 as their inverses are not.
        counts = jax.tree.map(lambda x: np.asarray(x, dtype), COUNT(table, edges))
        edges = dataclasses.replace(edges, **{name: x[at].astype(dtype) for name, x in policies.items()})
        return EdgeBatch(tokens=edges, counts=counts, **{name: x[at].astype(dtype) for name, x in of_edges.items()})

    made = batch(packed)
    masks = np.stack([losses.value_states(packed, term.states) for term in TERMS.values()])
    weights = aggregated(np.zeros(masks.shape, dtype), masks, made.counts)[1]
    terms, slopes = terms_and_slopes(of_packed, made, weights)
    objectives = aggregated(terms, masks, made.counts)[0]
    one = (terms, objectives, PACKED[1](slopes, params(dtype), rows, packed), weights, jax.tree.leaves(slopes))

    used = {"tokens": np.asarray(plain.mask), "calls": np.asarray(plain.mask) & (plain.k == 0)}
    known = {states: plain_weights(rollouts, mask) for states, mask in used.items()}
    weights = np.array([[known[term.states][name] for name in AGGREGATIONS] for term in TERMS.values()], dtype)
    terms, slopes = terms_and_slopes(of_plain, batch(plain), weights)
    objectives = np.sum(weights * np.asarray(terms)[:, None], axis=(2, 3))
    other = (terms, objectives, PLAIN[1](slopes, params(dtype), tokens, plain), weights, jax.tree.leaves(slopes))
    return Found(*map(np.asarray, one)), Found(*map(np.asarray, other))


def compare(rollouts: list[Rollout], seed: int, dtype: Any, rounding: float) -> None:
    one, other = both_sides(rollouts, seed, dtype)
    assert {x.dtype for found in (one, other) for x in (found.objectives, found.gradients)} == {np.dtype(dtype)}
    logp = -other.terms[list(TERMS).index("negative_log_likelihood")]
    # A token repeated may have one log-prob everywhere. Then covariances are 0 but for rounding, and KL-Cov takes the largest of them.
    assume(np.ptp(logp[logp != 0]) > 1e-3)
    # What is rounded are the summands, and terms of either sign cancel: nearly so in a call that is repeated. None counts for less
    # than a log-prob does, as a KL term is a small difference of log-probs.
    summands = (other.weights * np.maximum(np.abs(other.terms), 1)[:, None]).sum((-1, -2))
    slopes = np.maximum(np.abs(other.slopes).sum(0), other.weights).sum((-1, -2))
    equal = np.abs(one.objectives - other.objectives) <= rounding * summands
    equal &= np.abs(one.gradients - other.gradients).max(-1) <= rounding * slopes
    assert equal.all(), [(list(TERMS)[term], list(AGGREGATIONS)[aggregation]) for term, aggregation in np.argwhere(~equal)]


@pytest.mark.slow
@settings(max_examples=25)
@given(batches(), st.integers(0, 1000))
def test_every_objective_and_gradient_are_those_of_plain_rows_in_float64(rollouts: list[Rollout], seed: int) -> None:
    with jax.enable_x64(True):
        compare(rollouts, seed, np.float64, 1e-10)


@pytest.mark.slow
@settings(max_examples=25)
@given(batches(), st.integers(0, 1000))
def test_every_objective_and_gradient_are_those_of_plain_rows_in_float32(rollouts: list[Rollout], seed: int) -> None:
    compare(rollouts, seed, np.float32, 1e-5)


@pytest.mark.slow
def test_what_is_compared_is_not_nothing() -> None:
    """The trie is cut and shares tokens, every objective has a gradient, and what drops tokens drops some and not all."""
    first = [call([1, 2, 4], [3, 1], 0), call([1, 2, 4, 3, 1, 0], [2, 2], 1), call([1, 2, 4, 3, 1, 0, 2, 2], [1, 0], 2)]
    other = [call([1, 2, 4], [3, 3, 1], 0), call([1, 2, 4, 3, 3, 1, 0, 0], [1, 3], 1)]
    apart = [call([0, 5, 5, 5], [1, 1], 0), call([0, 5, 5, 5, 2], [0, 4, 2], 1)]
    made = [rollout("r0", "a", first), rollout("r1", "a", other), rollout("r2", "a", other), rollout("r3", "b", apart)]
    calls = [t for r in made for t in r.transitions]
    packed = packed_in_rows(calls)
    assert len(packed.rows) > 1 and packed.reuse_ratio > 1.5
    found = both_sides(made, 1, np.float32)[0]
    assert np.abs(found.gradients).max(axis=-1).min() > 1e-3
    tokens, kept = sum(len(t.response_ids) for t in calls), np.count_nonzero(found.terms, axis=(1, 2))
    assert kept.min() > 0
    assert {name for name, count in zip(TERMS, kept, strict=True) if count < tokens} == {n for n in TERMS if any(d in n for d in DROPPING)}
