"""The loop: agents run, calls earn credit, the policy improves, agents run again.

collect ─► branch ─► table ─► pack ─► score ─► evidence ─► credit ─► advantage ─► spread ─► update ─► sync ─► evaluate ─► record
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightningrl.ahead import SamplingJobs
from lightningrl.checkpoint import Checkpoints
from lightningrl.describe import Clock, describe_cost, describe_extra, describe_gap, describe_rollouts, describe_staleness, describe_time
from lightningrl.errors import UserError
from lightningrl.evidence.branches import branch_requests, describe_branches, random_calls
from lightningrl.evidence.critic import turn_values
from lightningrl.evidence.producer import Producer, arrays, numbers, produce_evidence
from lightningrl.gateway import SamplingOverrides
from lightningrl.metrics import MetricsLog, NoLog
from lightningrl.model.params import Params
from lightningrl.packing.rows import RowSettings
from lightningrl.policies import EVERY_ROLE, Policies, as_tree, edges_of_policies, pack_policies, score_policies, update_policies, weights
from lightningrl.recipe import Recipe
from lightningrl.serving import AnyRunner, AnySampler
from lightningrl.sharding import batch_multiple
from lightningrl.table import Array, Evidence, TransitionTable
from lightningrl.tabulate import table_size, trained_rollouts
from lightningrl.tabulate_tree import own_calls, table_from_branched_rollouts
from lightningrl.train import TrainStep
from lightningrl.types import Rollout, RolloutRequest, Task

TABLE_MULTIPLE = 256  # tables are padded to multiples of this, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    seed: int
    iterations: int
    rollout_budget: int  # of training, extra rollouts counted; 0: none
    tasks_per_iteration: int
    rollouts_per_task: int
    updates_per_iteration: int
    eval_every: int  # iterations that run no extra rollouts
    max_staleness: int  # policy versions that sampling may be ahead of training
    train_roles: tuple[str, ...] | None
    sampling: SamplingOverrides


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything the loop calls, put together by `fit`."""

    settings: LoopSettings
    runner: AnyRunner
    sampler: AnySampler
    sampling_at: Any  # how the sampler's weights lie, see `sharding.gathered`
    step: TrainStep
    rows: RowSettings
    tasks: Sequence[Task]
    heldout: Mapping[str, Sequence[Task]]  # by the name its reward has in the metrics
    reference: Params | None  # for the KL term of a recipe that has one, unless it is the policy's moving mean
    producers: Sequence[Producer]  # of the evidence that the recipe needs
    alter: Callable[[Sequence[Rollout], int], Sequence[Rollout]]  # between collecting and learning; identity but in controls
    log: MetricsLog | NoLog
    checkpoints: Checkpoints
    on_rollout: Callable[[str, int, Rollout], None]
    on_iteration: Callable[[Mapping[str, Any]], None]


def train(
    run: Run,
    policies: Policies,
    aux: dict[str, Any],
    done: int,
    cost: Mapping[str, int],
    behind: Sequence[Mapping[str, Any]] = (),
) -> Policies:
    """Goes on after iteration `done` (-1: nothing is done; iteration 0 only evaluates) until all are, or the budget is spent.

    Sampling runs `max_staleness` iterations ahead: the rollouts of iteration i are of the weights after i - 1 - max_staleness.

    Args:
      aux: the producers' state.
      cost: what training has come to, see `describe_cost`.
      behind: weights that sample the iterations after `done` whose rollouts were begun before the run was stopped, in order.
    """
    s = run.settings
    with SamplingJobs(beside=s.max_staleness > 0) as jobs:
        begun = collections.deque((old, begin(run, jobs, done + 1 + i, old)) for i, old in enumerate(behind))
        for iteration in range(done + 1, s.iterations + 1):
            if is_spent(s, cost):
                break
            clock = Clock()
            metrics: dict[str, Any] = {}
            if iteration > 0:
                for ahead in range(iteration + len(begun), min(iteration + s.max_staleness, s.iterations) + 1):
                    now = snapshot(run, policies, clock)
                    begun.append((now, begin(run, jobs, ahead, now)))
                rollouts = begun.popleft()[1](clock)
                metrics |= describe_rollouts(rollouts) | describe_staleness(rollouts, iteration - 1)
                branches = branch(run, iteration, rollouts, clock)
                metrics |= describe_branches(rollouts, branches) if run.step.recipe.branches else {}
                altered = run.alter([*rollouts, *branches], iteration)
                policies, aux, learned, extra = learn(run, policies, aux, altered, iteration, clock)
                metrics |= learned | describe_extra([*branches, *extra])
            before, cost = cost, describe_cost(cost, metrics)
            metrics |= cost
            last = iteration == s.iterations or is_spent(s, cost)
            if iteration == 0 or last or evaluation_is_due(run, before, cost):
                now = snapshot(run, policies, clock)
                with clock("eval"):
                    metrics |= jobs.submit(functools.partial(evaluate, run, jobs, iteration, now))()
            metrics |= describe_time(clock, metrics)
            run.log.append(iteration, metrics)
            kept = {"evidence": numbers(run.producers, aux), "cost": cost}
            host = {"iteration": iteration, "tasks_seen": tasks_seen(run, iteration), **kept}
            run.checkpoints.save(iteration, checkpoint_tree(policies, arrays(run.producers, aux), [old for old, _ in begun]), host)
            run.on_iteration({"iteration": iteration, **metrics})
    return policies


def is_spent(settings: LoopSettings, cost: Mapping[str, int]) -> bool:
    return 0 < settings.rollout_budget <= cost.get("rollouts_so_far", 0)


def evaluation_is_due(run: Run, before: Mapping[str, int], cost: Mapping[str, int]) -> bool:
    """Counted in rollouts, so that a recipe that runs extra ones is evaluated where others are: then they can be compared."""
    every = run.settings.eval_every * run.settings.rollouts_per_task * tasks_seen(run, 1)
    return cost["rollouts_so_far"] // every > before["rollouts_so_far"] // every


def snapshot(run: Run, policies: Policies, clock: Clock) -> dict[str, Any]:
    """The weights of every policy as the sampler takes them."""
    with clock("sync"):
        return weights(run.step, policies, run.sampling_at)


def sync(run: Run, jobs: SamplingJobs, by_role: Mapping[str, Any], version: int) -> None:
    """Hands the sampler the weights after iteration `version`, if it has others."""
    if jobs.version != version:
        run.sampler.set_params(by_role.get(EVERY_ROLE, by_role), version)
        jobs.version = version


def begin(run: Run, jobs: SamplingJobs, iteration: int, by_role: Mapping[str, Any]) -> Callable[[Clock], list[Rollout]]:
    """Has an iteration's rollouts sampled from some weights. What is returned waits for them, and adds up what they took."""

    def job() -> tuple[list[Rollout], Clock]:
        clock = Clock()
        with clock("sync"):
            sync(run, jobs, by_role, max(iteration - 1 - run.settings.max_staleness, 0))
        return collect(run, iteration, clock), clock

    wait = jobs.submit(job)

    def result(clock: Clock) -> list[Rollout]:
        rollouts, took = wait()
        clock.add(took)
        return rollouts

    return result


def collect(run: Run, iteration: int, clock: Clock) -> list[Rollout]:
    """Runs the agent `rollouts_per_task` times on each of this iteration's tasks."""
    s = run.settings
    requests = [
        RolloutRequest(id=f"train/{iteration}/{task.id}/{sample}", task=task, group=f"{iteration}/{task.id}", sample=sample)
        for task in tasks_of(run, iteration)
        for sample in range(s.rollouts_per_task)
    ]
    return run_agents(run, iteration, requests, phase="train", clock=clock)


def branch(run: Run, iteration: int, rollouts: Sequence[Rollout], clock: Clock) -> Sequence[Rollout]:
    """Starts rollouts anew in the middle, where the recipe trains on what they come to."""
    wanted = run.step.recipe.branches
    if wanted is None:
        return []
    points = functools.partial(random_calls, count=wanted.points)
    requests = branch_requests(rollouts, per_point=wanted.width, points=points, seed=(run.settings.seed, iteration))
    return run_agents(run, iteration, requests, phase="branch", clock=clock)


def run_agents(
    run: Run,
    iteration: int,
    requests: Sequence[RolloutRequest],
    *,
    phase: str,
    clock: Clock,
    temperature: float | None = None,
) -> list[Rollout]:
    """Their rollouts, in order; at the temperature of training, unless there is another, and then no call is for training."""
    sampling = run.settings.sampling
    busy = run.sampler.busy_seconds
    with clock("agent"):
        rollouts = run.runner.run(
            requests,
            phase=phase,
            iteration=iteration,
            seed=run.settings.seed,
            train_roles=run.settings.train_roles if temperature is None else (),
            sampling=sampling if temperature is None else dataclasses.replace(sampling, temperature=temperature),
            on_rollout=functools.partial(run.on_rollout, phase, len(requests)),
        )
    sampled = run.sampler.busy_seconds - busy
    clock.seconds["sample"] = clock.seconds.get("sample", 0.0) + sampled
    clock.seconds["agent"] -= sampled
    return rollouts


def learn(
    run: Run, policies: Policies, aux: dict[str, Any], rollouts: Sequence[Rollout], iteration: int, clock: Clock
) -> tuple[Policies, dict[str, Any], dict[str, float], list[Rollout]]:
    """From rollouts to updated policies, the producers' state, metrics, and what the producers had run."""
    used = trained_rollouts(own_calls(rollouts))
    table = tabulate(rollouts, used)
    with clock("pack"):
        updates, multiple = run.settings.updates_per_iteration, batch_multiple(run.step.mesh)
        whose, batches = pack_policies(policies, used, table, updates, run.rows, multiple)
    with clock("train"):
        batches, scores = jax.block_until_ready(score_policies(run.step, policies, run.reference, whose, batches))
    with clock("evidence"):
        evidence, aux, extra = gather_evidence(run, policies, aux, used, iteration)
    with clock("credit"):
        values = [turn_values(table, b.edges, s.value) for b, s in zip(batches, scores, strict=True)]
        evidence = dataclasses.replace(evidence, value=sum(values[1:], values[0]) if "value" in run.step.recipe.needs else None)
        advantage, value_target = assign(run.step.recipe, table, evidence)
        edges = edges_of_policies(run.step.recipe, table, whose, batches, scores, advantage, value_target, evidence)
    with clock("train"):
        policies, metrics = update_policies(run.step, policies, whose, batches, edges)
        metrics = jax.device_get(metrics)
    learned = {name: float(value) for name, value in metrics.items()}
    learned |= {} if run.settings.max_staleness else describe_gap(batches, scores)  # of one policy on both sides
    learned["reuse_ratio"] = sum(b.row_tokens for b in batches) / sum(b.computed_tokens for b in batches)
    learned["trained_tokens"] = sum(b.computed_tokens for b in batches)
    learned["advantage_zero_fraction"] = float(np.mean(np.asarray(advantage)[table.valid] == 0))
    learned |= {f"{name}/{key}": n for name, kept in numbers(run.producers, aux).items() for key, n in kept.items()}
    return policies, aux, learned, extra


def tabulate(rollouts: Sequence[Rollout], used: Sequence[Rollout]) -> TransitionTable:
    """The table of the calls that `used` sampled; the pairs of its tree are of all rollouts through each."""
    size = table_size(sum(len(r.transitions) for r in used), TABLE_MULTIPLE)
    pairs = max(size, table_size(sum(len(r.transitions) for r in trained_rollouts(rollouts)), TABLE_MULTIPLE))
    table = table_from_branched_rollouts(rollouts, size=size, pairs=pairs)
    if not table.trainable.any():
        error = next((r.error for r in rollouts if r.error), "no call of a trained role was made")
        raise UserError(f"there is nothing to learn from: {error.strip().splitlines()[-1]}")
    return table


def gather_evidence(
    run: Run, policies: Policies, aux: dict[str, Any], used: Sequence[Rollout], iteration: int
) -> tuple[Evidence, dict[str, Any], list[Rollout]]:
    """What the recipe's producers say, of the policy that sampled, and what they ran; agents are on the clock of evidence."""
    key = jax.random.fold_in(jax.random.key(run.settings.seed), iteration)
    extra: list[Rollout] = []

    def run_more(requests: Sequence[RolloutRequest], **how: Any) -> list[Rollout]:
        rollouts = run_agents(run, iteration, requests, clock=Clock(), **how)
        extra.extend(rollouts)
        return rollouts

    policy = run.step.weights(policies[EVERY_ROLE]) if EVERY_ROLE in policies else {}  # then no producer asks it: check_roles
    evidence, aux = produce_evidence(run.producers, policy, aux, used, key, run=run_more)
    return evidence, aux, extra


@functools.partial(jax.jit, static_argnums=0)
def assign(recipe: Recipe, table: TransitionTable, evidence: Evidence) -> tuple[Array, Array]:
    """Evidence to credit to advantage, and what a critic learns; both float32 [N]."""
    credit = recipe.credit(table, evidence)
    target = jnp.zeros_like(credit.value) if recipe.value_target is None else recipe.value_target(table, evidence)
    return recipe.advantage(table, credit, evidence), target


def evaluate(run: Run, jobs: SamplingJobs, iteration: int, by_role: Mapping[str, Any]) -> dict[str, float]:
    """Greedy reward of some weights on tasks that are never trained on. A run that failed counts as 0 here, and is shown."""
    sync(run, jobs, by_role, iteration)
    rewards = {}
    for name, tasks in run.heldout.items():
        requests = [RolloutRequest(f"{name}/{iteration}/{t.id}/0", t, f"{name}/{iteration}/{t.id}", 0) for t in tasks]
        rollouts = run_agents(run, iteration, requests, phase=name, clock=Clock(), temperature=0.0)
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


def checkpoint_tree(policies: Policies, evidence: Mapping[str, Any], behind: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The policies, the producers' arrays and the weights that sample what was begun as the plain tree that is checkpointed."""
    return as_tree(policies) | ({"evidence": dict(evidence)} if evidence else {}) | ({"behind": list(behind)} if behind else {})
