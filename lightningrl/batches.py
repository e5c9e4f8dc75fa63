"""The batches of an iteration's updates: packed, scored, and with what the loss needs of every edge."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lightningrl.losses import count_units
from lightningrl.model.params import Params
from lightningrl.packing.rows import PackedBatch, RowSettings, pack
from lightningrl.recipe import Recipe
from lightningrl.table import Array, Evidence, TokenTable, TransitionTable, UnitCounts
from lightningrl.train import EdgeBatch, Scores, TrainStep
from lightningrl.types import Rollout

OF_TOKENS = ("prm_logp", "prm_ref_logp")  # fields of Evidence that producers fill for every token of every response
EDGE_BATCH_MULTIPLE = 8  # edge tables are padded to multiples of this many micro-batches, so that few shapes are compiled


def pack_updates(rollouts: Sequence[Rollout], table: TransitionTable, updates: int, rows: RowSettings, multiple: int) -> list[PackedBatch]:
    """One batch an update; a group is never cut.

    Args:
      rollouts: those of `table`, in its order.
      multiple: rows of a micro-batch are a multiple of it, the number of devices that share them.
    """
    transitions = [t for r in rollouts for t in sorted(r.transitions, key=lambda t: t.turn)]
    batches = []
    for u in range(updates):
        index = [i for i in range(len(transitions)) if table.trainable[i] and table.group[i] % updates == u]
        if index:
            chosen = [transitions[i] for i in index]
            batches.append(pack(chosen, index, rows, multiple=multiple))
    return batches


def score(
    step: TrainStep, params: Params, reference: Params | None, batches: Sequence[PackedBatch]
) -> tuple[list[PackedBatch], list[Scores]]:
    """What the policy that the update starts from, and the reference, say of every edge."""
    scored, scores = [], []
    for batch in batches:
        s = step.score(params, batch.rows, batch.edges)
        edges = dataclasses.replace(batch.edges, old_logp=s.logp)
        if reference is not None:
            edges = dataclasses.replace(edges, ref_logp=step.score(reference, batch.rows, batch.edges).logp)
        scored.append(dataclasses.replace(batch, edges=edges))
        scores.append(s)
    return scored, scores


def edge_batches(
    recipe: Recipe,
    table: TransitionTable,
    edges: Sequence[TokenTable],
    scores: Sequence[Scores],
    advantage: Array,
    value_target: Array,
    evidence: Evidence,
) -> list[EdgeBatch]:
    """What the loss needs of each edge, for the updates of one policy: together, since a spread may take statistics of all edges.

    Args:
      edges: of every update [micro-batches, E], where E differs by powers of 2. `scores`: of the same.
    """
    width = min(x.mask.shape[-1] for x in edges)
    sizes = [x.mask.size // width for x in edges]
    padding = -sum(sizes) % EDGE_BATCH_MULTIPLE  # few shapes are compiled

    def together(*parts: Array) -> jax.Array:
        return jnp.pad(jnp.concatenate([jnp.reshape(x, (-1, width)) for x in parts]), ((0, padding), (0, 0)))

    whole, whole_scores = jax.tree.map(together, *edges), jax.tree.map(together, *scores)
    made = _on_edges(recipe, table, whole, whole_scores, advantage, value_target, evidence)
    bounds = np.cumsum([0, *sizes])

    def of_update(i: int) -> EdgeBatch:
        mine = slice(bounds[i], bounds[i + 1])
        spread, target, counts = jax.tree.map(lambda x: x[mine].reshape(edges[i].mask.shape), made)
        return EdgeBatch(tokens=edges[i], counts=counts, advantage=spread, old_value=scores[i].value, value_target=target)

    return [of_update(i) for i in range(len(edges))]


@functools.partial(jax.jit, static_argnums=0)
def _on_edges(
    recipe: Recipe, table: TransitionTable, edges: TokenTable, scores: Scores, advantage: Array, value_target: Array, evidence: Evidence
) -> tuple[Array, Array, UnitCounts]:
    shape, flat = edges.mask.shape, jax.tree.map(jnp.ravel, edges)
    evidence = token_evidence(recipe.needs, scores, at_edges(table, flat, evidence))
    spread = recipe.spread(table, flat, advantage, evidence).reshape(shape)
    if recipe.token_value_target is not None:
        target = recipe.token_value_target(table, flat, advantage, evidence).reshape(shape)
    else:
        target = value_target[edges.transition]
    return spread, target, count_units(table, edges)


def at_edges(table: TransitionTable, tokens: TokenTable, evidence: Evidence) -> Evidence:
    """With what producers said of tokens, flat over the responses of the table's transitions in order, gathered to the edges."""
    lengths = jnp.where(table.valid, table.num_tokens, 0)
    place = (jnp.cumsum(lengths) - lengths)[tokens.transition] + tokens.k
    given = {name: getattr(evidence, name) for name in OF_TOKENS}
    return dataclasses.replace(evidence, **{name: jnp.asarray(value)[place] for name, value in given.items() if value is not None})


def token_evidence(needs: Sequence[str], scores: Scores, evidence: Evidence) -> Evidence:
    """With what one pass of the policy says of each edge, where it is needed: a token critic's values, and Σₐ π(a)²."""
    made = {"token_value": scores.value, "sum_pi2": scores.sum_pi2}
    return dataclasses.replace(evidence, **{name: jnp.ravel(value) for name, value in made.items() if name in needs})
