"""The producers of the evidence that a recipe needs, put together from the settings of a run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lightningrl.config import FitConfig
from lightningrl.errors import UserError, settings_of_a_person
from lightningrl.evidence.answers import answer_logps, init_answers
from lightningrl.evidence.branches import branch_rollouts
from lightningrl.evidence.endpoint_judge import endpoint_judge
from lightningrl.evidence.greedy import greedy_rewards
from lightningrl.evidence.hindsight import hindsight_logps, init_hindsight
from lightningrl.evidence.judges import Judge, judge_rollouts, potentials
from lightningrl.evidence.process_rewards import (
    init_process_rewards,
    outcome_cross_entropy,
    process_reward_step,
    process_rewards,
    trajectory_dpo,
)
from lightningrl.evidence.producer import Producer
from lightningrl.evidence.return_model import Field, init_return_model, return_model
from lightningrl.evidence.role_baseline import role_baselines
from lightningrl.evidence.scorer import response_logps
from lightningrl.packing.rows import RowSettings
from lightningrl.policy import Policy
from lightningrl.recipe import Recipe, settings_of
from lightningrl.runtime.agents import load_function
from lightningrl.sharding import batch_multiple
from lightningrl.train import TrainStep

SCORED = ("value", "token_value", "sum_pi2")  # what the scoring pass of every iteration says by itself
OF_A_RETURN_MODEL: tuple[Field, ...] = ("predicted_return", "attention", "coalition")
OBJECTIVES = {"outcome_cross_entropy": outcome_cross_entropy, "trajectory_dpo": trajectory_dpo}


@dataclasses.dataclass(frozen=True)
class Sources:
    """What producers are made of."""

    recipe: Recipe
    config: FitConfig
    policy: Policy  # at the start of the run
    step: TrainStep
    rows: RowSettings
    multiple: int  # tables hold multiples of it

    @property
    def settings(self) -> dict[str, Any]:
        """How the recipe wants its evidence made, where there are several ways."""
        return dict(self.recipe.evidence_settings)

    @property
    def logps(self) -> Callable[..., Any]:
        """Scores responses under any prompts, with the policy's own programs."""
        return functools.partial(response_logps, score=self.step.score, rows=self.rows, multiple=batch_multiple(self.step.mesh))


def check_sources(recipe: Recipe, config: FitConfig) -> None:
    """Refuses a recipe whose judge or potential was not given or cannot be imported, before anything is written."""
    if "judge" in recipe.needs:
        judge_of(recipe, config)
    if "potential" in recipe.needs:
        potential_of(recipe, config)


def judge_of(recipe: Recipe, config: FitConfig) -> Judge:
    if config.judge:
        return load_function(config.judge)
    if config.judge_model:
        return endpoint_judge(model=config.judge_model, base_url=config.judge_url)
    raise UserError(f"recipe {recipe.name} needs a judge: give --judge=package.module:function or --judge_model=NAME")


def potential_of(recipe: Recipe, config: FitConfig) -> Callable[..., Any]:
    if config.potential:
        return load_function(config.potential)
    raise UserError(f"recipe {recipe.name} needs a potential: give --potential=package.module:function")


def make_producers(sources: Sources) -> tuple[Producer, ...]:
    """One for each source that fills something the recipe needs, and no other, in a fixed order."""
    return tuple(make(sources) for fills, make in MAKERS.items() if set(fills) & set(sources.recipe.needs))


def turn_discount(recipe: Recipe) -> float:
    """γ of the recipe's credit, 1 where it has none."""
    return float(settings_of(recipe.credit)[1].get("gamma", 1.0))


def _nothing(policy: Any) -> dict[str, float]:
    return {}


def _of_a_persons_tasks(produce: Callable[..., Any]) -> Callable[..., Any]:
    """A target that is no text, or a reward out of range, gets its sentence without a traceback."""

    def said(*arguments: Any) -> Any:
        with settings_of_a_person():
            return produce(*arguments)

    return said


def _branches(s: Sources) -> Producer:
    per_point, gamma = s.config.branches_per_call, turn_discount(s.recipe)

    def produce(policy: Any, aux: Mapping[str, float], rollouts: Any, key: Any, *, run: Any) -> Any:
        return branch_rollouts(policy, aux, rollouts, key, run=run, per_point=per_point, gamma=gamma, multiple=s.multiple)

    return Producer("branches", ("branch_value", "branch_count"), produce, _nothing, runs_agents=True)


def _greedy(s: Sources) -> Producer:
    produce = functools.partial(greedy_rewards, multiple=s.multiple)
    return Producer("greedy", ("greedy_reward",), produce, _nothing, runs_agents=True)


def _roles(s: Sources) -> Producer:
    return Producer("role_baseline", ("role_baseline",), functools.partial(role_baselines, multiple=s.multiple), _nothing)


def _returns(s: Sources) -> Producer:
    fields = tuple(name for name in OF_A_RETURN_MODEL if name in s.recipe.needs)
    produce = functools.partial(return_model, fields=fields, kind=s.settings.get("kind", "rudder"), multiple=s.multiple)
    key = jax.random.key(s.config.seed)
    return Producer("return_model", fields, produce, lambda policy: init_return_model(key), keeps="arrays")


def _hindsight(s: Sources) -> Producer:
    produce = functools.partial(hindsight_logps, logps=s.logps, tokenizer=s.policy.tokenizer, multiple=s.multiple)
    fills = ("hindsight_logp", "response_logp")
    return Producer("hindsight", fills, produce, lambda policy: init_hindsight())


def _answers(s: Sources) -> Producer:
    settings = {"logps": s.logps, "tokenizer": s.policy.tokenizer, "roles": s.config.train_roles or None, "multiple": s.multiple}
    produce = _of_a_persons_tasks(functools.partial(answer_logps, **settings))
    return Producer("answers", ("answer_logp",), produce, lambda policy: init_answers())


def _process_rewards(s: Sources) -> Producer:
    step = process_reward_step(s.policy.config, s.step.optimizer, s.step.mesh)
    beta = settings_of(s.recipe.spread)[1].get("beta")  # rewards must have the scale that the model's outcomes were learned at
    learn = functools.partial(
        process_rewards,
        step=step,
        rows=s.rows,
        reference=None if s.settings.get("reference") == "policy" else s.policy.params,
        objective=OBJECTIVES[s.settings.get("objective", "outcome_cross_entropy")],
        update_first=s.settings.get("rewards", "after_update") == "after_update",
        **({} if beta is None else {"beta": beta}),
        row_multiple=batch_multiple(s.step.mesh),
        multiple=s.multiple,
    )
    start = functools.partial(init_process_rewards, step)
    return Producer("process_rewards", ("prm_logp", "prm_ref_logp"), _of_a_persons_tasks(learn), start, keeps="arrays")


def _judge(s: Sources) -> Producer:
    concurrency = 1 if s.config.judge else s.config.concurrency
    produce = functools.partial(judge_rollouts, judge=judge_of(s.recipe, s.config), concurrency=concurrency, multiple=s.multiple)
    return Producer("judge", ("judge",), produce, _nothing, asks_outside=True)


def _potential(s: Sources) -> Producer:
    produce = functools.partial(potentials, potential=potential_of(s.recipe, s.config), multiple=s.multiple)
    return Producer("potential", ("potential",), produce, _nothing, asks_outside=True)


RUN_AGENTS = frozenset({"branch_value", "branch_count", "greedy_reward"})  # fields of Evidence whose producers run agents

MAKERS: dict[tuple[str, ...], Callable[[Sources], Producer]] = {
    ("branch_value", "branch_count"): _branches,
    ("greedy_reward",): _greedy,
    ("role_baseline",): _roles,
    OF_A_RETURN_MODEL: _returns,
    ("hindsight_logp", "response_logp"): _hindsight,
    ("answer_logp",): _answers,
    ("prm_logp", "prm_ref_logp"): _process_rewards,
    ("judge",): _judge,
    ("potential",): _potential,
}
