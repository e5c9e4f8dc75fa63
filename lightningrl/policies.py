"""The policies of a run: one that answers every call, or one for each trained role, an adapter on a base that all share.

Policies of roles are trained apart. They share rollouts, credit and advantages; each has its own batches of the calls it answered,
its own denominators, optimizer and step. A role's update is the one that a run which trains that role alone would make of
the same rollouts. Calls of one rollout that different policies answered share no tokens: their hidden states differ.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lightningrl.batches import edge_batches, pack_updates, score
from lightningrl.distributed import is_first
from lightningrl.errors import UserError
from lightningrl.evidence.scorer import table_calls
from lightningrl.model.lora import init_lora, merge
from lightningrl.model.lora_files import base_hash, load_adapter, save_adapter
from lightningrl.model.params import Params
from lightningrl.packing.rows import PackedBatch, RowSettings
from lightningrl.policy import Policy, load_policy, save_policy
from lightningrl.recipe import Recipe
from lightningrl.sharding import HOST, gathered, params_sharding
from lightningrl.table import Array, Evidence, TransitionTable
from lightningrl.train import EdgeBatch, Scores, TrainState, TrainStep
from lightningrl.types import Rollout

EVERY_ROLE = "*"
Policies = dict[str, TrainState]  # by role; under EVERY_ROLE the one that answers all calls, and then no other
ASKS_ONE_POLICY = ("hindsight_logp", "answer_logp")  # fields of Evidence that a policy is asked for under prompts of any role


def check_roles(roles: Sequence[str], recipe: Recipe) -> None:
    """Raises UserError for roles that cannot each have a policy with this recipe."""
    if not roles:
        raise UserError("lora_per_role needs the roles that get an adapter: name them in --train_roles=writer,rewriter")
    for role in roles:
        if not re.fullmatch(r"\w[\w.-]*", role):
            raise UserError(f"the role {role!r} cannot name the file of its adapter: use letters, digits, '_', '.' and '-'")
    if asked := [name for name in ASKS_ONE_POLICY if name in recipe.needs]:
        raise UserError(f"recipe {recipe.name} asks one policy for {asked[0]}, but lora_per_role has one for each role: leave it off")


def start_policies(step: TrainStep, params: Params, roles: Sequence[str] = (), seed: int = 0) -> Policies:
    """Every policy as it starts.

    Args:
      params: what training starts from; the base of every adapter.
      roles: those that get an adapter of their own; none: one policy for every role.
    """
    if step.lora is None:
        return {EVERY_ROLE: step.init(params)}
    params = step.placed(params)  # once for all
    init = jax.jit(functools.partial(init_lora, step.config, settings=step.lora))
    keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(max(len(roles), 1))]
    return {role: step.init(params, init(key)) for role, key in zip(roles or [EVERY_ROLE], keys, strict=True)}


def weights(step: TrainStep, policies: Policies, at: Any) -> dict[str, Params]:
    """What every policy computes with, in arrays that no update consumes, where `at` says: see `sharding.gathered`."""
    return {role: gathered(step.weights(state), at) for role, state in policies.items()}


def pack_policies(
    policies: Policies, rollouts: Sequence[Rollout], table: TransitionTable, updates: int, rows: RowSettings, multiple: int
) -> tuple[list[str], list[PackedBatch]]:
    """The batches of every policy's updates, and whose each is. The arguments are those of `pack_updates`."""
    packed = {role: pack_updates(rollouts, _calls_of(role, table, rollouts), updates, rows, multiple) for role in policies}
    return [role for role, batches in packed.items() for _ in batches], [batch for batches in packed.values() for batch in batches]


def score_policies(
    step: TrainStep, policies: Policies, start: Params | None, whose: Sequence[str], batches: Sequence[PackedBatch]
) -> tuple[list[PackedBatch], list[Scores]]:
    """What each batch's policy, and its reference, say of every edge.

    Args:
      start: the reference of a recipe with a KL term, where it is not the policy's moving mean; None for a recipe without one.
    """
    scored: list[PackedBatch] = []
    scores: list[Scores] = []
    for role, state in policies.items():
        reference = start if state.reference is None else step.reference(state)
        mine = [batch for other, batch in zip(whose, batches, strict=True) if other == role]
        done = score(step, step.weights(state), reference, mine)
        scored, scores = scored + done[0], scores + done[1]
    return scored, scores


def edges_of_policies(
    recipe: Recipe,
    table: TransitionTable,
    whose: Sequence[str],
    batches: Sequence[PackedBatch],
    scores: Sequence[Scores],
    advantage: Array,
    value_target: Array,
    evidence: Evidence,
) -> list[EdgeBatch]:
    """What the losses of all batches need of each edge: `batches.edge_batches` of every policy's updates."""
    edges: list[EdgeBatch] = []
    for role in dict.fromkeys(whose):
        mine = [i for i, other in enumerate(whose) if other == role]
        parts = [batches[i].edges for i in mine], [scores[i] for i in mine]
        edges += edge_batches(recipe, table, *parts, advantage, value_target, evidence)
    return edges


def update_policies(
    step: TrainStep, policies: Policies, whose: Sequence[str], batches: Sequence[PackedBatch], edges: Sequence[EdgeBatch]
) -> tuple[Policies, dict[str, Any]]:
    """One update a batch, of the policy whose it is; `policies` are consumed.

    Returns:
      The policies, and the metrics of each one's last update; those of a role's policy are named `metric/role`.
    """
    after = dict(policies)
    metrics: dict[str, Any] = {}
    for role, batch, batch_edges in zip(whose, batches, edges, strict=True):
        after[role], of_update = step.update(after[role], batch.rows, batch_edges)
        metrics |= {name if role == EVERY_ROLE else f"{name}/{role}": value for name, value in of_update.items()}
    return after, metrics


def as_tree(policies: Policies) -> dict[str, Any]:
    """The policies as the plain tree that is checkpointed: what is trained and what its updates need, and no base."""

    def of(state: TrainState) -> dict[str, Any]:
        trained = {"params": state.params} if state.adapter is None else {"adapter": state.adapter}
        reference = {} if state.reference is None else {"reference": state.reference}
        return {**trained, **reference, "opt_state": state.opt_state, "step": state.step}

    return of(policies[EVERY_ROLE]) if EVERY_ROLE in policies else {"roles": {role: of(state) for role, state in policies.items()}}


def from_tree(policies: Policies, tree: Mapping[str, Any]) -> Policies:
    """`policies`, of the same run, as they were when `tree` was made of them."""
    trees = {EVERY_ROLE: tree} if EVERY_ROLE in policies else tree["roles"]
    return {role: dataclasses.replace(state, **trees[role]) for role, state in policies.items()}


def merged(step: TrainStep, state: TrainState) -> Params:
    """The whole parameters of a policy, in float32 whatever is computed in."""
    if state.adapter is None or step.lora is None:
        return state.params
    whole = jax.jit(functools.partial(merge, scale=step.lora.scale), out_shardings=params_sharding(step.config, step.mesh))
    return whole(state.params, state.adapter)


def save_policies(directory: Path, start: Policy, step: TrainStep, policies: Policies) -> Policy:
    """Writes a run's policy: the whole model, and its adapter on its own; of policies of roles the base, and each one's adapter.

    With several processes all of them call it, and the first writes.

    Args:
      start: what training started from, the base of every adapter.

    Returns:
      What is in the folder without its adapters.
    """
    shared = policies.get(EVERY_ROLE)
    saved = start if shared is None else dataclasses.replace(start, params=merged(step, shared))
    at = HOST if is_first() else None
    params, adapters = gathered(saved.params, at), {role: gathered(state.adapter, at) for role, state in policies.items()}
    under = None if step.lora is None else gathered(start.params, at)
    if is_first():
        save_policy(directory, dataclasses.replace(saved, params=params))
        base = "" if under is None else base_hash(under)
        for role, adapter in adapters.items():
            if step.lora is not None:
                save_adapter(directory / adapter_name(role), adapter, step.lora, base)
    return saved


def adapter_name(role: str) -> str:
    """The file of a role's adapter, or of the only one."""
    return "adapter.safetensors" if role == EVERY_ROLE else f"adapter-{role}.safetensors"


def load_adapted(base: Path, adapter: Path) -> Policy:
    """The policy of a folder with an adapter of `save_policies` merged into it.

    Raises:
      UserError: either cannot be read, or the adapter was trained on another base.
    """
    policy = load_policy(base)
    arrays, settings = load_adapter(adapter, policy.config, base_hash(policy.params))
    return dataclasses.replace(policy, params=merge(policy.params, arrays, settings.scale))


def _calls_of(role: str, table: TransitionTable, rollouts: Sequence[Rollout]) -> TransitionTable:
    """The table in which only the calls that this policy answered are trained."""
    if role == EVERY_ROLE:
        return table
    speaks = np.zeros(len(table.trainable), bool)
    calls, _ = table_calls(rollouts)
    speaks[: len(calls)] = [call.role == role for call in calls]
    return dataclasses.replace(table, trainable=table.trainable & speaks)
