"""The loop: agents run, calls earn credit, the policy improves, agents run again.

collect ─► table ─► pack ─► score ─► evidence ─► credit ─► advantage ─► spread ─► update ─► sync ─► evaluate ─► record
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightningrl.checkpoint import Checkpoints
from lightningrl.errors import UserError
from lightningrl.evidence.critic import turn_values
from lightningrl.gateway import SamplingOverrides
from lightningrl.losses import count_units
from lightningrl.metrics import MetricsLog
from lightningrl.model.params import Params
from lightningrl.packing.rows import PackedBatch, RowSettings, pack
from lightningrl.recipes import Recipe
from lightningrl.runtime.runner import RolloutRequest, Runner
from lightningrl.sampler.engine import PolicySampler
from lightningrl.sharding import batch_multiple
from lightningrl.table import Array, Evidence, TokenTable, TransitionTable
from lightningrl.tabulate import table_from_rollouts, trained_rollouts
from lightningrl.train import EdgeBatch, Scores, TrainState, TrainStep
from lightningrl.types import Rollout, Task

TABLE_MULTIPLE = 256  # tables are padded to multiples of this, so that few shapes are compiled
EDGE_BATCH_MULTIPLE = 8


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


class Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


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
        batches = pack_updates(run, used, table)
    with clock("train"):
        batches, scores = score(run, state, batches)
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


def pack_updates(run: Run, rollouts: Sequence[Rollout], table: TransitionTable) -> list[PackedBatch]:
    """One batch an update; a group is never cut."""
    transitions = [t for r in rollouts for t in sorted(r.transitions, key=lambda t: t.turn)]
    updates = run.settings.updates_per_iteration
    batches = []
    for u in range(updates):
        index = [i for i in range(len(transitions)) if table.trainable[i] and table.group[i] % updates == u]
        if index:
            chosen = [transitions[i] for i in index]
            owner = [int(table.rollout[i]) for i in index]
            batches.append(pack(chosen, index, owner, run.rows, multiple=batch_multiple(run.step.mesh)))
    return batches


def score(run: Run, state: TrainState, batches: Sequence[PackedBatch]) -> tuple[list[PackedBatch], list[Scores]]:
    """What the policy that the update starts from, and the reference, say of every edge."""
    scored, scores = [], []
    for batch in batches:
        s = run.step.score(state.params, batch.rows, batch.edges)
        edges = dataclasses.replace(batch.edges, old_logp=s.logp)
        if run.reference is not None:
            edges = dataclasses.replace(edges, ref_logp=run.step.score(run.reference, batch.rows, batch.edges).logp)
        scored.append(dataclasses.replace(batch, edges=edges))
        scores.append(s)
    return scored, scores


@functools.partial(jax.jit, static_argnums=0)
def assign(recipe: Recipe, table: TransitionTable, evidence: Evidence) -> tuple[Array, Array]:
    """Evidence to credit to advantage, and what a critic learns; both float32 [N]."""
    credit = recipe.credit(table, evidence)
    target = jnp.zeros_like(credit.value) if recipe.value_target is None else recipe.value_target(table, evidence)
    return recipe.advantage(table, credit, evidence), target


def edge_batch(
    recipe: Recipe,
    table: TransitionTable,
    edges: TokenTable,
    scores: Scores,
    advantage: Array,
    value_target: Array,
    evidence: Evidence,
) -> EdgeBatch:
    """What the loss needs of each edge. Padded to few shapes before it is compiled, cut back after."""
    count = edges.mask.shape[0]
    padding = -count % EDGE_BATCH_MULTIPLE
    padded = jax.tree.map(lambda x: jnp.pad(jnp.asarray(x), ((0, padding), (0, 0))), edges)
    spread, target, counts = _on_edges(recipe, table, padded, advantage, value_target, evidence)
    return EdgeBatch(
        tokens=edges,
        counts=jax.tree.map(lambda x: x[:count], counts),
        advantage=spread[:count],
        old_value=scores.value,
        value_target=target[:count],
    )


@functools.partial(jax.jit, static_argnums=0)
def _on_edges(recipe: Recipe, table: TransitionTable, edges: TokenTable, advantage: Array, value_target: Array, evidence: Evidence) -> Any:
    flat = jax.tree.map(jnp.ravel, edges)
    shape = edges.mask.shape
    spread = recipe.spread(table, flat, advantage, evidence).reshape(shape)
    return spread, value_target[edges.transition], count_units(table, edges)


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
    """The tasks of an iteration: a fresh seeded shuffle for every pass over them."""
    s, n = run.settings, len(run.tasks)
    per = min(s.tasks_per_iteration, n)
    chosen: list[Task] = []
    for position in range((iteration - 1) * per, iteration * per):
        order = np.random.default_rng([s.seed, position // n]).permutation(n)
        task = run.tasks[order[position % n]]
        if task not in chosen:  # a batch that spans two passes may meet a task again
            chosen.append(task)
    return chosen


def tasks_seen(run: Run, iteration: int) -> int:
    return iteration * min(run.settings.tasks_per_iteration, len(run.tasks))


def describe_rollouts(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Counts and means over rollouts, and whether continuing calls extend the earlier call's ids exactly."""
    ok = [r for r in rollouts if r.status == "ok"]
    transitions = [t for r in ok for t in r.transitions]
    continuing = [(r.transitions[t.continues], t) for r in ok for t in r.transitions if t.continues is not None]
    exact = sum(
        np.array_equal(t.prompt_ids[: len(b.prompt_ids) + len(b.response_ids)], np.concatenate([b.prompt_ids, b.response_ids]))
        for b, t in continuing
    )
    return {
        "train_reward": float(np.mean([r.reward for r in ok])) if ok else 0.0,
        "rollouts": len(rollouts),
        "failed": sum(r.status == "failed" for r in rollouts),
        "timed_out": sum(r.status == "timed_out" for r in rollouts),
        "calls": len(transitions),
        "calls_per_rollout": len(transitions) / max(len(ok), 1),
        "prompt_tokens": int(sum(len(t.prompt_ids) for t in transitions)),
        "response_tokens": int(sum(len(t.response_ids) for t in transitions)),
        "continuing_calls": len(continuing),
        "continuing_calls_exact": int(exact),
        "intermediate_reward": float(np.mean([sum(t.reward for t in r.transitions) for r in ok])) if ok else 0.0,
    }


def describe_gap(batches: Sequence[PackedBatch], scores: Sequence[Scores]) -> dict[str, float]:
    """How far the sampler's log-probs are from the trainer's, of the same weights."""
    gaps = np.concatenate([np.abs(np.asarray(s.logp) - b.edges.behaviour_logp)[b.edges.mask] for b, s in zip(batches, scores, strict=True)])
    return {"logprob_gap_max": float(gaps.max()), "logprob_gap_mean": float(gaps.mean(dtype=np.float64))}


def describe_time(clock: Clock, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of every stage, and tokens per second of those that have tokens."""
    times = {f"{name}_seconds": clock.seconds.get(name, 0.0) for name in ("agent", "sample", "credit", "pack", "train", "sync", "eval")}
    rates = {
        "sampled_tokens_per_second": (metrics.get("response_tokens", 0), clock.seconds.get("sample", 0.0)),
        "read_tokens_per_second": (metrics.get("prompt_tokens", 0), clock.seconds.get("sample", 0.0)),
        "trained_tokens_per_second": (metrics.get("trained_tokens", 0), clock.seconds.get("train", 0.0)),
    }
    return times | {name: tokens / seconds for name, (tokens, seconds) in rates.items() if seconds > 0}


def dataclass_dict(state: TrainState) -> dict[str, Any]:
    """The train state as the plain tree that is checkpointed."""
    return {"params": state.params, "opt_state": state.opt_state, "step": state.step}
