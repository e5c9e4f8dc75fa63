"""What answers the agents' calls, and where the agents run: what the settings say of both."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from lightningrl.config import FitConfig
from lightningrl.model.params import Params
from lightningrl.policies import EVERY_ROLE, Policies, weights
from lightningrl.policy import Policy, export_policy
from lightningrl.recipe import Recipe, with_correction
from lightningrl.recipes import get_recipe
from lightningrl.runtime.local import CallAgent
from lightningrl.runtime.on_ray import OnRay
from lightningrl.runtime.runner import Agent
from lightningrl.sampler.by_role import RoleSampler
from lightningrl.sampler.engine import PolicySampler, SamplerSettings
from lightningrl.sampler.remote import EngineSettings, RemoteSampler, reload_requests
from lightningrl.train import TrainStep


def make_sampler(
    step: TrainStep, policies: Policies, policy: Policy, config: FitConfig, settings: SamplerSettings
) -> PolicySampler | RoleSampler | RemoteSampler:
    """One sampler, or one for each role that has a policy, or the engine behind `--engine`, which then has been asked for a token."""
    if config.engine is not None:
        return outside_engine(config.engine, policy, config)

    def make(params: Params) -> PolicySampler:
        return PolicySampler(params, policy.config, policy.tokenizer, settings)

    by_role = weights(step, policies)
    return make(by_role[EVERY_ROLE]) if EVERY_ROLE in by_role else RoleSampler(make, by_role, step.rounded(policy.params))


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
    return OnRay(agent, address=config.ray_address, cpus=config.ray_cpus, gateway_host=config.host)


def corrected_recipe(config: FitConfig) -> Recipe:
    """The recipe of that name; where another program samples, with a correction for what its log-probs differ from the trainer's."""
    recipe = get_recipe(config.recipe)
    if config.engine is None or config.engine_correction == "none":
        return recipe
    corrected = with_correction(recipe)
    if corrected is not recipe:
        print(f"recipe {recipe.name} with truncated importance sampling, since an engine samples; --engine_correction=none leaves it out")
    return corrected
