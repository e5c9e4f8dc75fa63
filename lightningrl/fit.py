"""Trains the policy behind an agent, any agent.

    python -m lightningrl.fit --agent package.module:function --tasks tasks.jsonl --out DIR

An agent is a function of a task (a dict), a `base_url` and an `api_key`, in any framework, sync or async. It returns its
reward, or `--reward` scores what it returns, or it posts the reward to the gateway.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lightningrl import flags
from lightningrl.checkpoint import Checkpoints
from lightningrl.config import FitConfig, cache_folder, most_iterations, same_run, setting
from lightningrl.distributed import check_same, check_shared, is_first, joined, wait_for_all
from lightningrl.errors import UserError, settings_of_a_person
from lightningrl.evidence.producer import arrays, first_aux
from lightningrl.gateway import SamplingOverrides
from lightningrl.loop import TABLE_MULTIPLE, LoopSettings, Run, checkpoint_tree, train
from lightningrl.manifest import manifest
from lightningrl.metrics import MetricsLog, NoLog, plot_rewards, read_metrics
from lightningrl.model.lora import LoraSettings
from lightningrl.policies import check_roles, from_tree, merged, save_policies, start_policies, weights
from lightningrl.policy import Policy
from lightningrl.producers import RUN_AGENTS, Sources, check_sources, make_producers
from lightningrl.progress import Progress
from lightningrl.recipe import Recipe
from lightningrl.runtime.agents import load_function, load_tasks
from lightningrl.runtime.intermediate import intermediate_rewards
from lightningrl.runtime.on_processes import as_sent
from lightningrl.runtime.on_ray import import_ray
from lightningrl.runtime.runner import Agent, Reward
from lightningrl.sampler.remote import reload_requests
from lightningrl.serving import corrected_recipe, make_sampler, sampler_settings, serving
from lightningrl.sharding import make_mesh
from lightningrl.start import row_settings, starting_policy
from lightningrl.train import OptimizerSettings, TrainStep, make_optimizer
from lightningrl.types import Rollout, Task
from lightningrl.warm_start import Demonstration


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What a run has come to."""

    policy: Policy  # what is in OUT/policy; of policies of roles, their base
    metrics: tuple[Mapping[str, Any], ...]  # the lines of metrics.jsonl
    out: Path
    compiled: int  # programs of the train step that were compiled: one for every shape of a micro-batch, to score and to add up
    by_role: Mapping[str, Policy] = dataclasses.field(default_factory=dict)  # with lora_per_role, each one's adapter merged


def fit(
    agent: Agent,
    tasks: Sequence[Task],
    reward: Reward | None,
    config: FitConfig,
    *,
    heldout: Mapping[str, Sequence[Task]] | None = None,
    demonstrations: Sequence[Demonstration] = (),
    alter: Callable[[Sequence[Rollout], int], Sequence[Rollout]] = lambda rollouts, iteration: rollouts,
    data_hash: str = "",
) -> Fitted:
    """Trains the policy that answers `agent`'s calls.

    Args:
      agent: `agent(task, base_url, api_key)`, sync or async; see the module.
      tasks: what is trained on. reward: `reward(task, target, answer)`, or None where the agent knows its reward.
      heldout: tasks that are only evaluated, by the name their reward gets in the metrics.
      demonstrations: runs to imitate before anything else, in which every call has its answer.
      alter: changes an iteration's rollouts before they are learned from; for control experiments.
      data_hash: names the data in the manifest; by default the hash of the tasks.

    Raises:
      UserError: a setting or a folder that cannot be used, or nothing to learn from.
    """
    check_tasks(tasks, heldout or {})
    with joined(config.coordinator, config.processes, config.process):
        return _fit(agent, tasks, reward, config, heldout or {}, demonstrations, alter, data_hash or tasks_hash(tasks))


def _fit(
    agent: Agent,
    tasks: Sequence[Task],
    reward: Reward | None,
    config: FitConfig,
    heldout: Mapping[str, Sequence[Task]],
    demonstrations: Sequence[Demonstration],
    alter: Callable[[Sequence[Rollout], int], Sequence[Rollout]],
    data_hash: str,
) -> Fitted:
    jax.config.update("jax_compilation_cache_dir", str(cache_folder(config) / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    out = Path(config.out)
    with settings_of_a_person():
        recipe = corrected_recipe(config)
        lora = LoraSettings(config.lora_rank, config.lora_alpha, config.lora_targets) if config.lora_rank else None
        mesh = make_mesh(config.data_parallel, config.fsdp, config.tensor_parallel)
    check_config(config, recipe, reward)
    if config.runner == "processes":
        as_sent(agent)
    roles = config.train_roles if config.lora_per_role else ()
    # An engine is another recipe, and a mesh of another shape another program.
    check_same("settings", json.dumps([same_run(config), config.engine is not None, mesh.devices.shape], sort_keys=True))
    check_same("tasks", data_hash)
    check_shared(out)
    if not same_manifest(out, config, data_hash) and is_first():
        shutil.rmtree(out / "start", ignore_errors=True)  # of a run that ended before it began
    policy = starting_policy(config, out, demonstrations, tasks, critic=recipe.critic_target is not None, mesh=mesh)
    optimizer = make_optimizer(
        OptimizerSettings(config.learning_rate, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm)
    )
    step = TrainStep(
        policy.config,
        recipe,
        optimizer,
        mesh,
        config.seed,
        lora=lora,
        compute_dtype=jnp.dtype(config.compute_dtype),
        ema_decay=config.ema_decay if config.reference == "ema" else None,
        remat=config.remat,
        attention=None if config.attention == "auto" else config.attention,
    )
    policies = start_policies(step, policy.params, roles, config.seed)
    sampler, sampling_at = make_sampler(step, roles, policy, config)
    # Only now, so that settings that were refused are not those of a run that has to be gone on with.
    if is_first():
        write_manifest(out, config, data_hash)
    producers = make_producers(Sources(recipe, config, policy, step, row_settings(config), TABLE_MULTIPLE))
    aux = first_aux(producers, policy.params)
    checkpoints = Checkpoints(out / "checkpoints", config=same_run(config))
    log = MetricsLog(out) if is_first() else NoLog()
    done, behind, cost, iterations = -1, [], dict[str, int](), most_iterations(config, len(tasks))
    if (latest := checkpoints.latest()) is not None:
        ahead = min(config.max_staleness, iterations - latest) if latest else 0  # iterations whose rollouts were begun
        kept = [weights(step, policies, sampling_at)] * ahead
        tree, host = checkpoints.restore(latest, checkpoint_tree(policies, arrays(producers, aux), kept))
        behind = tree.pop("behind", [])
        aux = host["evidence"] | tree.pop("evidence", {})
        policies, done, cost = from_tree(policies, tree), int(host["iteration"]), host["cost"]
    if isinstance(log, MetricsLog):
        log.truncate_after(done)

    try:
        rollouts = out / "rollouts.sqlite"
        with Progress(iterations, done) as progress, serving(sampler, policy, agent, reward, config, rollouts) as runner:
            run = Run(
                settings=LoopSettings(
                    seed=config.seed,
                    iterations=iterations,
                    rollout_budget=config.rollout_budget,
                    tasks_per_iteration=config.tasks_per_iteration,
                    rollouts_per_task=config.rollouts_per_task,
                    updates_per_iteration=config.updates_per_iteration,
                    eval_every=config.eval_every,
                    max_staleness=config.max_staleness,
                    train_roles=config.train_roles or None,
                    sampling=SamplingOverrides(temperature=config.temperature, top_p=1.0, top_k=0, max_tokens=config.max_tokens),
                ),
                runner=runner,
                sampler=sampler,
                sampling_at=sampling_at,
                step=step,
                rows=row_settings(config),
                tasks=tasks,
                heldout=heldout,
                reference=policy.params if recipe.kl is not None and config.reference == "start" else None,
                producers=producers,
                alter=alter,
                log=log,
                checkpoints=checkpoints,
                on_rollout=progress.on_rollout,
                on_iteration=progress.on_iteration,
            )
            policies = train(run, policies, aux, done, cost, behind)
    finally:
        checkpoints.close()
        log.close()
    trained = save_policies(out / "policy", policy, step, policies)
    if is_first():
        plot_rewards(read_metrics(out), out / "reward.png")
    wait_for_all("the run is over")
    by_role = {role: dataclasses.replace(policy, params=merged(step, policies[role])) for role in roles}
    return Fitted(trained, tuple(read_metrics(out)), out, step.compiled, by_role)


def check_config(config: FitConfig, recipe: Recipe, reward: Reward | None) -> None:
    """Refuses settings that don't fit together, before anything is written."""
    check_sources(recipe, config)
    if config.lora_per_role:
        check_roles(config.train_roles, recipe)
        if config.engine is not None:
            raise UserError("an engine samples from one policy, but --lora_per_role trains one for each role: leave one of the two out")
    if config.reference == "ema" and recipe.kl is None:
        raise UserError(f"recipe {recipe.name} has no KL term, so nothing would read the reference of --reference=ema: leave it off")
    if config.max_staleness and (recipe.branches or RUN_AGENTS & set(recipe.needs)):
        raise UserError(
            f"recipe {recipe.name} runs agents while it learns, so nothing can be sampled meanwhile: leave --max_staleness at 0"
        )
    if config.max_staleness and jax.process_count() > 1:
        raise UserError("sampling runs ahead of training in one process only: leave --max_staleness at 0, or start one")
    intermediate_rewards(config.intermediate, reward)
    reload_requests(config.engine_reload)
    with settings_of_a_person():
        sampler_settings(config)
    if config.agent_processes < 1:
        raise UserError(f"agent_processes={config.agent_processes} must be at least 1")
    if config.runner == "ray" and is_first():
        import_ray()


def check_tasks(tasks: Sequence[Task], heldout: Mapping[str, Sequence[Task]]) -> None:
    """Refuses no tasks, two of one id, and a held-out task that is also trained on."""
    if not tasks:
        raise UserError("there are no tasks to train on")
    ids = {task.id for task in tasks}
    if len(ids) < len(tasks):
        raise UserError("two tasks have the same id; every task needs one of its own")
    inputs = {json.dumps(dict(task.input), sort_keys=True) for task in tasks}
    for name, others in heldout.items():
        for task in others:
            if json.dumps(dict(task.input), sort_keys=True) in inputs:
                raise UserError(f"the {name} task {task.id} is also among the training tasks")


def tasks_hash(tasks: Sequence[Task]) -> str:
    text = json.dumps([[t.id, dict(t.input), t.target] for t in tasks], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def same_manifest(out: Path, config: FitConfig, data_hash: str) -> bool:
    """Whether `out` holds a run of these settings and data; False if it holds none. Raises UserError for another run."""
    path = out / "manifest.json"
    if not path.exists():
        if any((out / "checkpoints").glob("[0-9]*")):
            raise UserError(f"{out} holds checkpoints but no manifest.json, so nobody knows whose run they are; give another --out")
        return False
    try:
        before = json.loads(path.read_text())
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object, so nobody knows whose run this is; give another --out")
    ours, theirs = same_run(config) | {"data": data_hash}, before.get("settings", {}) | {"data": before.get("data_hash")}
    for k in sorted(ours.keys() | theirs.keys()):
        if ours.get(k) != theirs.get(k):
            raise UserError(
                f"{out} holds a run of another config ({k}={theirs.get(k)}, now {ours.get(k)}): give another --out or the same settings"
            )
    return True


def write_manifest(out: Path, config: FitConfig, data_hash: str) -> None:
    """Writes manifest.json; the one that is there stays."""
    path = out / "manifest.json"
    if path.exists():
        return
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(manifest(same_run(config), dataclasses.asdict(config), data_hash), indent=2, sort_keys=True) + "\n")
    os.replace(partial, path)


@dataclasses.dataclass(frozen=True)
class CommandConfig(FitConfig):
    """The command line's settings."""

    agent: str = setting("", "the agent, as package.module:function")
    tasks: str = setting("", "JSON lines, one task each; `id` and `target` are optional, the agent gets the rest")
    heldout: str | None = setting(None, "JSON lines of tasks that are only evaluated; none: every tenth task")
    reward: str | None = setting(None, "a reward function of (task, target, answer), as package.module:function")


def main() -> None:
    config = flags.config_from_flags(CommandConfig)
    if not config.agent or not config.tasks:
        raise UserError("give --agent=package.module:function and --tasks=tasks.jsonl")
    agent = load_function(config.agent)
    reward = load_function(config.reward) if config.reward else None
    tasks = load_tasks(Path(config.tasks))
    if config.heldout:
        heldout = load_tasks(Path(config.heldout))
    else:
        tasks, heldout = [t for i, t in enumerate(tasks) if i % 10], tasks[::10]
    started = time.time()
    fitted = fit(agent, tasks, reward, config, heldout={"heldout": heldout})
    if not is_first():
        return
    first, last = fitted.metrics[0], fitted.metrics[-1]
    print(
        f"held-out reward {first['heldout_reward']:.3f} -> {last['heldout_reward']:.3f} on {len(heldout)} tasks, "
        f"{time.time() - started:.0f} s; {fitted.compiled} programs compiled; policy in {fitted.out / 'policy'}"
    )


if __name__ == "__main__":
    flags.define_flags(CommandConfig)
    flags.run_app(main)
