"""The loop: agents run, calls earn credit, the policy improves, agents run again.

collect ─► table ─► pack ─► score ─► evidence ─► credit ─► advantage ─► spread ─► update ─► sync ─► evaluate ─► record
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightningrl.batches import edge_batch, pack_updates, score
from lightningrl.checkpoint import Checkpoints
from lightningrl.describe import Clock, describe_gap, describe_rollouts, describe_time
from lightningrl.errors import UserError
from lightningrl.evidence.critic import turn_values
from lightningrl.gateway import SamplingOverrides
from lightningrl.metrics import MetricsLog
from lightningrl.model.params import Params
from lightningrl.packing.rows import RowSettings
from lightningrl.recipes import Recipe
from lightningrl.runtime.runner import RolloutRequest, Runner
from lightningrl.sampler.engine import PolicySampler
from lightningrl.sharding import batch_multiple
from lightningrl.table import Array, Evidence, TransitionTable
from lightningrl.tabulate import table_from_rollouts, trained_rollouts
from lightningrl.train import TrainState, TrainStep
from lightningrl.types import Rollout, Task

TABLE_MULTIPLE = 256  # tables are padded to multiples of this, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    seed: int
    iterations: int
    tasks_per_iteration: int
    rollouts_per_task: int
    updates_per_iteration: int
    eval_every: int
    train_roles: tuple[str, ...] | None
    sampling: SamplingOverrides


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything the loop calls, put together by `fit`."""

    settings: LoopSettings
    runner: Runner
    sampler: PolicySampler
    step: TrainStep
    rows: RowSettings
    tasks: Sequence[Task]
    heldout: Mapping[str, Sequence[Task]]  # by the name its reward has in the metrics
    reference: Params | None  # for the KL term of a recipe that has one
    alter: Callable[[Sequence[Rollout], int], Sequence[Rollout]]  # between collecting and learning; identity but in controls
    log: MetricsLog
    checkpoints: Checkpoints
    on_rollout: Callable[[str, int, Rollout], None]
    on_iteration: Callable[[Mapping[str, Any]], None]


def train(run: Run, state: TrainState, done: int) -> TrainState:
    """Goes on after iteration `done` (-1: nothing is done; iteration 0 only evaluates) until all are."""
    sync(run, state, max(done, 0))  # a resumed run samples from the weights it was stopped with
    for iteration in range(done + 1, run.settings.iterations + 1):
        clock = Clock()
        metrics: dict[str, Any] = {}
        if iteration > 0:
            rollouts = collect(run, iteration, clock)
            metrics |= describe_rollouts(rollouts)
            state, learned = learn(run, state, run.alter(rollouts, iteration), clock)
            metrics |= learned
        with clock("sync"):
            sync(run, state, iteration)
        if iteration % run.settings.eval_every == 0 or iteration == run.settings.iterations:
            with clock("eval"):
                metrics |= evaluate(run, iteration)
        metrics |= describe_time(clock, metrics)
        run.log.append(iteration, metrics)
        run.checkpoints.save(iteration, dataclass_dict(state), {"iteration": iteration, "tasks_seen": tasks_seen(run, iteration)})
        run.on_iteration({"iteration": iteration, **metrics})
    return state


def sync(run: Run, state: TrainState, version: int) -> None:
    """Hands the sampler a copy of the weights: the next update consumes those of the state."""
    run.sampler.set_params(jax.tree.map(jnp.copy, state.params), version)


def collect(run: Run, iteration: int, clock: Clock) -> list[Rollout]:
    """Runs the agent `rollouts_per_task` times on each of this iteration's tasks."""
    s = run.settings
    requests = [
        RolloutRequest(id=f"train/{iteration}/{task.id}/{sample}", task=task, group=f"{iteration}/{task.id}", sample=sample)
        for task in tasks_of(run, iteration)
        for sample in range(s.rollouts_per_task)
    ]
    busy = run.sampler.busy_seconds
    with clock("agent"):
        rollouts = run.runner.run(
            requests,
            phase="train",
            iteration=iteration,
            seed=s.seed,
            train_roles=s.train_roles,
            sampling=s.sampling,
            on_rollout=functools.partial(run.on_rollout, "train", len(requests)),
        )
    clock.seconds["sample"] = run.sampler.busy_seconds - busy
    clock.seconds["agent"] -= clock.seconds["sample"]
    return rollouts


def learn(run: Run, state: TrainState, rollouts: Sequence[Rollout], clock: Clock) -> tuple[TrainState, dict[str, float]]:
    """From rollouts to an updated policy."""
    used = trained_rollouts(rollouts)
    count = sum(len(r.transitions) for r in used)
    table = table_from_rollouts(rollouts, size=max(TABLE_MULTIPLE, -(-count // TABLE_MULTIPLE) * TABLE_MULTIPLE))
    if not table.trainable.any():
        error = next((r.error for r in rollouts if r.error), "no call of a trained role was made")
        raise UserError(f"there is nothing to learn from: {error.strip().splitlines()[-1]}")
    with clock("pack"):
        batches = pack_updates(used, table, run.settings.updates_per_iteration, run.rows, batch_multiple(run.step.mesh))
    with clock("train"):
        batches, scores = score(run.step, state.params, run.reference, batches)
    with clock("credit"):
        values = [turn_values(table, b.edges, s.value) for b, s in zip(batches, scores, strict=True)]
        evidence = Evidence(value=sum(values[1:], values[0]) if "value" in run.step.recipe.needs else None)
        advantage, value_target = assign(run.step.recipe, table, evidence)
        edges = [
            edge_batch(run.step.recipe, table, b.edges, s, advantage, value_target, evidence) for b, s in zip(batches, scores, strict=True)
        ]
    metrics: dict[str, Any] = {}
    with clock("train"):
        for batch, batch_edges in zip(batches, edges, strict=True):
            state, metrics = run.step.update(state, batch.rows, batch_edges)
        metrics = jax.device_get(metrics)
    learned = {name: float(value) for name, value in metrics.items()} | describe_gap(batches, scores)
    learned["reuse_ratio"] = sum(b.row_tokens for b in batches) / sum(b.computed_tokens for b in batches)
    learned["trained_tokens"] = sum(b.computed_tokens for b in batches)
    learned["advantage_zero_fraction"] = float(np.mean(np.asarray(advantage)[table.valid] == 0))
    return state, learned


@functools.partial(jax.jit, static_argnums=0)
def assign(recipe: Recipe, table: TransitionTable, evidence: Evidence) -> tuple[Array, Array]:
    """Evidence to credit to advantage, and what a critic learns; both float32 [N]."""
    credit = recipe.credit(table, evidence)
    target = jnp.zeros_like(credit.value) if recipe.value_target is None else recipe.value_target(table, evidence)
    return recipe.advantage(table, credit, evidence), target


def evaluate(run: Run, iteration: int) -> dict[str, float]:
    """Greedy reward on tasks that are never trained on. A run that failed counts as 0 here, and is shown."""
    rewards = {}
    for name, tasks in run.heldout.items():
        requests = [RolloutRequest(f"{name}/{iteration}/{t.id}/0", t, f"{name}/{iteration}/{t.id}", 0) for t in tasks]
        rollouts = run.runner.run(
            requests,
            phase=name,
            iteration=iteration,
            seed=run.settings.seed,
            train_roles=(),
            sampling=dataclasses.replace(run.settings.sampling, temperature=0.0),
            on_rollout=functools.partial(run.on_rollout, name, len(requests)),
        )
        rewards[f"{name}_reward"] = float(np.mean([r.reward if r.status == "ok" else 0.0 for r in rollouts]))
        rewards[f"{name}_failed"] = sum(r.status != "ok" for r in rollouts)
    return rewards


def tasks_of(run: Run, iteration: int) -> list[Task]:
    """The tasks of an iteration: a fresh seeded shuffle for every pass, cut into whole batches; what is left over waits for the next."""
    s, n = run.settings, len(run.tasks)
    per = min(s.tasks_per_iteration, n)
    passes, batch = divmod(iteration - 1, n // per)
    order = np.random.default_rng([s.seed, passes]).permutation(n)
    return [run.tasks[i] for i in order[batch * per : (batch + 1) * per]]


def tasks_seen(run: Run, iteration: int) -> int:
    return iteration * min(run.settings.tasks_per_iteration, len(run.tasks))


def dataclass_dict(state: TrainState) -> dict[str, Any]:
    """The train state as the plain tree that is checkpointed."""
    return {"params": state.params, "opt_state": state.opt_state, "step": state.step}
