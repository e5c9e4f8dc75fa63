"""What answers the agents' calls, and where the agents run: what the settings say of both."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from lightningrl.config import FitConfig
from lightningrl.distributed import SamplerElsewhere, SharedRunner, is_first
from lightningrl.gateway import Gateway, GatewaySettings
from lightningrl.model.params import Params
from lightningrl.policy import Policy, export_policy
from lightningrl.recipe import Recipe, with_correction
from lightningrl.recipes import get_recipe
from lightningrl.runtime.intermediate import intermediate_rewards
from lightningrl.runtime.local import CallAgent
from lightningrl.runtime.on_processes import OnProcesses
from lightningrl.runtime.on_ray import OnRay
from lightningrl.runtime.runner import Agent, Reward, Runner, RunnerSettings
from lightningrl.runtime.store import Store
from lightningrl.sampler.by_role import RoleSampler
from lightningrl.sampler.engine import PolicySampler, SamplerSettings
from lightningrl.sampler.remote import EngineSettings, RemoteSampler, reload_requests
from lightningrl.sharding import HOST, ShardingRules, gathered, params_sharding, sampling_mesh
from lightningrl.train import TrainStep

AnySampler = PolicySampler | RoleSampler | RemoteSampler | SamplerElsewhere
AnyRunner = Runner | SharedRunner


def sampler_settings(config: FitConfig) -> SamplerSettings:
    """Raises ValueError for some that no sampler can have."""
    return SamplerSettings(
        slots=config.slots,
        context_length=config.context_length,
        group=config.decode_group,
        chunk=config.prefill_chunk,
        prefill_rows=config.prefill_rows,
        steps=config.decode_steps,
        prefix_cache_mb=config.prefix_cache_mb,
        deterministic=config.deterministic,
    )


def make_sampler(step: TrainStep, roles: Sequence[str], policy: Policy, config: FitConfig) -> tuple[AnySampler, Any]:
    """What answers calls: a sampler, one for each of `roles`, or the engine behind `--engine`, which then has been asked for a token.

    With several processes, process 0 alone has it.

    Returns:
      It, with the weights that training starts from, and how it wants the later ones to lie: see `sharding.gathered`.
    """
    if config.engine is not None:
        return (outside_engine(config.engine, policy, config), HOST) if is_first() else (SamplerElsewhere(), None)
    here = sampling_mesh(step.mesh)
    weights_at = params_sharding(policy.config, here, ShardingRules(embed=None))  # each decoding step reads every weight
    start = gathered(step.rounded(policy.params), weights_at if is_first() else None)
    if not is_first():
        return SamplerElsewhere(), None
    settings = sampler_settings(config)

    def make(params: Params) -> PolicySampler:
        return PolicySampler(params, policy.config, policy.tokenizer, settings, mesh=here, end_ids=policy.end_ids)

    return RoleSampler(make, dict.fromkeys(roles, start), start) if roles else make(start), weights_at


@contextlib.contextmanager
def serving(
    sampler: AnySampler, policy: Policy, agent: Agent, reward: Reward | None, config: FitConfig, rollouts: Path
) -> Iterator[AnyRunner]:
    """What runs the agents, for the block, with a gateway before the sampler and `rollouts` as its store; at process 0."""
    if isinstance(sampler, SamplerElsewhere):
        yield SharedRunner(None)
        return
    with contextlib.closing(Store(rollouts)) as store, sampler, place_of_agents(agent, config) as call_agent:
        settings = GatewaySettings(host=config.host, port=config.port, default_max_tokens=config.max_tokens)
        gateway = Gateway(sampler, policy.tokenizer, settings)
        gateway.start()
        try:
            limits = RunnerSettings(config.concurrency, config.time_limit, config.max_attempts)
            intermediate = intermediate_rewards(config.intermediate, reward)
            runner = Runner(gateway, agent, reward, limits, intermediate=intermediate, store=store, call_agent=call_agent)
            yield runner if jax.process_count() == 1 else SharedRunner(runner)
        finally:
            gateway.stop()


def outside_engine(url: str, policy: Policy, config: FitConfig) -> RemoteSampler:
    folder = Path(config.engine_folder or Path(config.out) / "engine")
    engine = EngineSettings(url, folder, config.engine_model, reload_requests(config.engine_reload), config.context_length)

    def export(folder: Path, params: Any) -> None:
        export_policy(folder, dataclasses.replace(policy, params=params))

    sampler = RemoteSampler(engine, policy.tokenizer, export)
    sampler.check()
    return sampler


def place_of_agents(agent: Agent, config: FitConfig) -> contextlib.AbstractContextManager[CallAgent | None]:
    if config.runner == "local":
        return contextlib.nullcontext()
    if config.runner == "processes":
        return OnProcesses(agent, config.agent_processes)
    return OnRay(agent, address=config.ray_address, cpus=config.ray_cpus, gateway_host=config.host)


def corrected_recipe(config: FitConfig) -> Recipe:
    """The recipe of that name; where an older policy or another program samples, with a correction for the difference in log-probs."""
    recipe = get_recipe(config.recipe)
    engine = config.engine is not None and config.engine_correction != "none"
    if not engine and not config.max_staleness:
        return recipe
    corrected = with_correction(recipe)
    if corrected is not recipe and is_first():
        why = "an engine samples; --engine_correction=none leaves it out" if engine else "an older policy samples"
        print(f"recipe {recipe.name} with truncated importance sampling, since {why}")
    return corrected
