"""Recipes that need more than the rollouts: through `fit`, with the agent run again for it, and the same when stopped and gone on with."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import httpx
import jax
import numpy as np
import pytest

from lightningrl.evidence.producer import Producer, arrays, first_aux, numbers, produce_evidence
from lightningrl.fit import CommandConfig, fit
from lightningrl.producers import MAKERS, SCORED
from lightningrl.recipes import RECIPES
from lightningrl.runtime.store import Store
from lightningrl.table import Evidence
from lightningrl.types import Rollout, Task
from tests.test_fit import TINY

TASKS = [Task(f"t{i}", {"say": f"word {i}"}) for i in range(3)]


async def agent(task: dict, base_url: str, api_key: str) -> float:
    """Two calls of two roles, the second in the conversation of the first; paid by the ASCII character of both, 1 at most."""
    async with httpx.AsyncClient(base_url=base_url, headers={"Authorization": f"Bearer {api_key}"}, timeout=60) as client:
        messages, said = [{"role": "user", "content": task["say"]}], ""
        for role in ("writer", "rewriter"):
            reply = await client.post("/chat/completions", json={"model": f"policy:{role}", "messages": messages})
            reply.raise_for_status()
            text = reply.json()["choices"][0]["message"]["content"]
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "again"}]
            said += text
        return min(1.0, sum(character.isascii() for character in said) / 12)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Of compiled programs, shared by all runs here."""
    return tmp_path_factory.mktemp("cache")


def trained(
    out: pathlib.Path, recipe: str, cache: pathlib.Path, settings: Mapping[str, Any] = MappingProxyType({}), **changes: Any
) -> list[dict[str, Any]]:
    config = CommandConfig(out=str(out), cache=str(cache), recipe=recipe, **TINY)  # type: ignore[arg-type]
    config = dataclasses.replace(config, branches_per_call=2, rollouts_per_task=2, **settings)
    metrics = fit(agent, TASKS[:2], None, config, heldout={"heldout": TASKS[2:]}, **changes).metrics
    return [{k: v for k, v in row.items() if not k.endswith(("_seconds", "_per_second"))} for row in metrics]


def stored(out: pathlib.Path, phase: str, iteration: int) -> list[Rollout]:
    store = Store(out / "rollouts.sqlite")
    try:
        return store.read(phase, iteration)
    finally:
        store.close()


@pytest.mark.slow
def test_branches_are_run_by_the_policy_that_sampled_and_counted(tmp_path: pathlib.Path, cache: pathlib.Path) -> None:
    metrics = trained(tmp_path / "out", "vineppo", cache)
    # Two tasks, two rollouts of two calls each, two branches before every call.
    assert [row.get("branches/branch_rollouts") for row in metrics] == [None, 16.0, 32.0]
    assert metrics[-1]["branches/branch_failed"] == metrics[-1]["branches/branch_diverged"] == 0
    branches = stored(tmp_path / "out", "branch", 2)
    assert len(branches) == 16 and all(b.status == "ok" and b.parent is not None for b in branches)
    assert {t.policy_version for b in branches for t in b.transitions} == {1}
    assert metrics[-1]["rollouts"] == 4  # branches are no rollouts of the batch
    assert [row["rollouts_so_far"] for row in metrics] == [0, 20, 40]


@pytest.mark.slow
def test_a_tree_is_trained_on_with_its_branches(tmp_path: pathlib.Path, cache: pathlib.Path) -> None:
    metrics = trained(tmp_path / "out", "spo_tree", cache)
    assert [row.get("branch_rollouts") for row in metrics] == [None, 8.0, 8.0]  # two at one call of each of four rollouts
    parents, branches = (stored(tmp_path / "out", phase, 1) for phase in ("train", "branch"))
    sampled = [t for r in parents for t in r.transitions]
    sampled += [t for b in branches for t in b.transitions[int(b.metrics["replayed_calls"]) :]]
    # What is trained on once: every call that was sampled, and no repeated one a second time.
    assert metrics[1]["branch_calls"] == len(sampled) - 8
    assert [row["rollouts_so_far"] for row in metrics] == [0, 12, 24]
    assert metrics[1]["tokens_so_far"] == sum(len(t.prompt_ids) + len(t.response_ids) for t in sampled)
    assert metrics[1]["trained_tokens"] <= sum(len(t.prompt_ids) + len(t.response_ids) for t in sampled)


@pytest.mark.slow
def test_the_greedy_rollout_of_every_task(tmp_path: pathlib.Path, cache: pathlib.Path) -> None:
    metrics = trained(tmp_path / "out", "remax", cache)
    assert metrics[-1]["greedy/greedy_rollouts"] == 4 and metrics[-1]["greedy/greedy_failed"] == 0
    assert [row["rollouts_so_far"] for row in metrics] == [0, 6, 12]
    greedy = stored(tmp_path / "out", "greedy", 1)
    assert len(greedy) == 2 and {t.temperature for r in greedy for t in r.transitions} == {0.0}
    assert not any(t.trainable for r in greedy for t in r.transitions)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["vineppo", "prime"])
def test_a_run_that_is_stopped_goes_on_with_the_producers_state(tmp_path: pathlib.Path, cache: pathlib.Path, recipe: str) -> None:
    def stop(rollouts: Sequence[Rollout], iteration: int) -> Sequence[Rollout]:
        if iteration == 2:
            raise KeyboardInterrupt
        return rollouts

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", recipe, cache, alter=stop)
    assert trained(tmp_path / "stopped", recipe, cache) == trained(tmp_path / "whole", recipe, cache)


@pytest.mark.slow
def test_a_run_ends_when_its_rollouts_are_spent_also_where_it_was_stopped_before(tmp_path: pathlib.Path, cache: pathlib.Path) -> None:
    """20 rollouts an iteration: evaluated where five iterations without branches would be, and at the end, past 45."""
    settings = {"iterations": 9, "eval_every": 5, "rollout_budget": 45}

    def stop(rollouts: Sequence[Rollout], iteration: int) -> Sequence[Rollout]:
        if iteration == 3:
            raise KeyboardInterrupt
        return rollouts

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", "vineppo", cache, settings, alter=stop)
    metrics = trained(tmp_path / "stopped", "vineppo", cache, settings)
    assert [row["rollouts_so_far"] for row in metrics] == [0, 20, 40, 60]
    assert all("heldout_reward" in row for row in metrics)
    assert trained(tmp_path / "stopped", "vineppo", cache, settings) == metrics  # given again it runs no more
    assert trained(tmp_path / "whole", "vineppo", cache, settings) == metrics
    rarely = trained(tmp_path / "rarely", "vineppo", cache, settings | {"eval_every": 8})  # every 32 rollouts
    assert ["heldout_reward" in row for row in rarely] == [True, False, True, True]


def test_producers_fill_their_fields_in_turn_and_keep_their_state() -> None:
    def count(policy: Any, aux: dict[str, float], rollouts: Any, key: Any) -> Any:
        return Evidence(judge=np.ones(2), value=np.ones(2)), {"calls": aux.get("calls", 0.0) + 1.0}

    def draw(policy: Any, aux: Any, rollouts: Any, key: Any, *, run: Any) -> Any:
        return Evidence(potential=jax.random.normal(key, (2, 2))), aux + run(["request"], phase="branch")

    producers = (
        Producer("count", ("judge",), count, lambda policy: {}),
        Producer("draw", ("potential",), draw, lambda policy: policy + 1, keeps="arrays", runs_agents=True),
    )
    aux = first_aux(producers, 4)  # type: ignore[arg-type]
    for _ in range(2):
        evidence, aux = produce_evidence(producers, {}, aux, [], jax.random.key(0), run=lambda requests, phase: len(requests))
    assert aux == {"count": {"calls": 2.0}, "draw": 7} and numbers(producers, aux) == {"count": {"calls": 2.0}}
    assert arrays(producers, aux) == {"draw": 7}
    assert evidence.value is None and evidence.judge.tolist() == [1.0, 1.0]  # a producer fills what it says it fills
    assert (np.asarray(evidence.potential) == jax.random.normal(jax.random.fold_in(jax.random.key(0), 1), (2, 2))).all()


def test_every_recipe_has_a_source_for_what_it_needs() -> None:
    filled = {name for fills in MAKERS for name in fills} | set(SCORED)
    assert {name: set(recipe.needs) - filled for name, recipe in RECIPES.items() if set(recipe.needs) - filled} == {}
