"""Branches under the runner, through the gateway: what they share with their parents, and when they are not used."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.agents.sql_langgraph import answer
from lightningrl.gateway import Gateway
from lightningrl.runtime import RolloutRequest, Runner, RunnerSettings, Store, rollout_requests
from lightningrl.tabulate import trained_rollouts
from lightningrl.types import Replay, Rollout, Task
from tests import chance
from tests.chance import ChanceSampler, chat, walk, words


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with Gateway(ChanceSampler(), chance.tokenizer()) as running:
        yield running


def runner(gateway: Gateway, agent: Any = walk, concurrency: int = 7, reward: Any = None, **options: Any) -> Runner:
    return Runner(gateway, agent, reward, RunnerSettings(concurrency=concurrency), **options)


def record(gateway: Gateway, agent: Any = walk, samples: int = 3, task: Task | None = None, **options: Any) -> list[Rollout]:
    requests = rollout_requests([task or Task("t", {"a": 1})], phase="train", iteration=0, samples=samples)
    rollouts = runner(gateway, agent, **options).run(requests, phase="train", iteration=0, seed=0)
    assert [rollout.status for rollout in rollouts] == ["ok"] * samples, rollouts[0].error
    return rollouts


def branches(parents: Sequence[Rollout], per_point: int = 2) -> list[RolloutRequest]:
    return [
        RolloutRequest(f"{p.id}@{turn}.{k}", p.task, p.group, k, Replay(p, turn))
        for p in parents
        for turn in range(len(p.transitions))
        for k in range(per_point)
    ]


def run(gateway: Gateway, requests: Sequence[RolloutRequest], agent: Any = walk, **options: Any) -> list[Rollout]:
    return runner(gateway, agent, **options).run(requests, phase="branch", iteration=0, seed=0)


def assert_shares(branch: Rollout, parent: Rollout, calls: int) -> None:
    for mine, theirs in zip(branch.transitions[:calls], parent.transitions[:calls], strict=True):
        np.testing.assert_array_equal(mine.prompt_ids, theirs.prompt_ids, strict=True)
        np.testing.assert_array_equal(mine.response_ids, theirs.response_ids, strict=True)
        np.testing.assert_array_equal(mine.logprobs, theirs.logprobs, strict=True)
        assert (mine.role, mine.policy_version, mine.turn, mine.messages) == (
            theirs.role,
            theirs.policy_version,
            theirs.turn,
            theirs.messages,
        )


def fields(rollout: Rollout) -> Any:
    calls = [(t.turn, t.role, t.prompt_ids.tolist(), t.response_ids.tolist(), t.logprobs.tolist()) for t in rollout.transitions]
    return rollout.id, rollout.status, rollout.parent, rollout.outcome, calls


def test_branches_repeat_their_parent_and_go_on_from_its_very_state(gateway: Gateway) -> None:
    parents = record(gateway)
    requests = branches(parents)
    made = run(gateway, requests)
    for request, branch in zip(requests, made, strict=True):
        parent, calls = request.replay.parent, request.replay.calls  # type: ignore[union-attr]
        assert (branch.status, branch.parent, branch.id) == ("ok", parent.id, request.id)
        assert (branch.task, branch.group, branch.sample) == (parent.task, parent.group, request.sample)
        assert branch.metrics["replayed_calls"] == calls
        assert_shares(branch, parent, calls)
        np.testing.assert_array_equal(branch.transitions[calls].prompt_ids, parent.transitions[calls].prompt_ids)
        assert branch.reward == chance.outcome(words(branch))
    assert len({words(branch) for branch in made}) > 2
    assert all(rollout.parent is None and "replayed_calls" not in rollout.metrics for rollout in parents)


def test_only_the_calls_after_the_branch_are_sampled(gateway: Gateway) -> None:
    parents = record(gateway)
    sampler = gateway._service.sampler
    assert isinstance(sampler, ChanceSampler)
    before = sampler.sampled
    made = run(gateway, branches(parents))
    assert sampler.sampled - before == sum(len(b.transitions) - int(b.metrics["replayed_calls"]) for b in made)


def test_the_same_branches_at_any_concurrency(gateway: Gateway) -> None:
    parents = record(gateway)
    requests = branches(parents)
    one, seven = ([fields(b) for b in run(gateway, requests, concurrency=n)] for n in (1, 7))
    assert one == seven
    backwards = run(gateway, requests[::-1], concurrency=7)
    assert [fields(b) for b in backwards[::-1]] == one


def test_branches_of_branches(gateway: Gateway) -> None:
    parents = record(gateway)
    (old,) = [p for p in parents if len(p.transitions) == 3][:1]
    (child,) = run(gateway, [RolloutRequest("child", old.task, old.group, 0, Replay(old, 1))])
    calls = len(child.transitions)
    (grandchild,) = run(gateway, [RolloutRequest("grandchild", old.task, old.group, 0, Replay(child, calls))])
    assert (grandchild.status, grandchild.parent, words(grandchild)) == ("ok", "child", words(child))
    assert_shares(grandchild, child, calls)


def test_intermediate_rewards_are_not_counted_twice(gateway: Gateway) -> None:
    parents = record(gateway, samples=6, intermediate=(chance.down_costs,))
    made = run(gateway, branches(parents, 1), intermediate=(chance.down_costs,))
    for rollout in [*parents, *made]:
        assert tuple(t.reward for t in rollout.transitions) == chance.down_costs(rollout)
    assert any("down" in words(b)[: int(b.metrics["replayed_calls"])] for b in made)


def test_branches_are_stored_with_their_parent_and_not_run_again(gateway: Gateway, tmp_path: Path) -> None:
    requests = branches(record(gateway))
    with Store(tmp_path / "rollouts.sqlite") as store:
        made = run(gateway, requests, store=store)
        for branch in made:
            kept = store.read_rollout(branch.id)
            assert (kept.parent, kept.metrics) == (branch.parent, branch.metrics)

        async def fail(*_: Any) -> float:
            raise AssertionError("must not be called")

        assert [fields(b) for b in run(gateway, requests, fail, store=store)] == [fields(b) for b in made]


# Divergence


def noisy(readings: Iterator[int]) -> Any:
    """An agent whose tool reads a clock: the second prompt differs from run to run."""

    async def agent(task: Any, base_url: str, api_key: str) -> float:
        reading = next(readings)
        messages = [{"role": "user", "content": "Climb."}]
        for k in range(3):
            word = await chat(base_url, api_key, messages)
            told = f"The clock shows {reading}." if k == 0 else "Go on."
            messages += [{"role": "assistant", "content": word}, {"role": "user", "content": told}]
        return 1.0

    return agent


def test_a_tool_that_answers_otherwise_diverges_is_counted_and_never_used(gateway: Gateway, tmp_path: Path) -> None:
    parents = record(gateway, noisy(itertools.repeat(0)), samples=1)
    requests = branches(parents, 4)
    with Store(tmp_path / "rollouts.sqlite") as store:
        made = run(gateway, requests, noisy(itertools.cycle([0, 1])), store=store, concurrency=1)
        # Four branches before each call; every second run reads another time, which those before the last call are to repeat.
        assert [b.status for b in made] == ["ok"] * 8 + ["ok", "diverged"] * 2
        assert store.ids("branch", 0, "diverged") == [made[9].id, made[11].id]
        bad = store.read_rollout(made[9].id)
    assert bad.outcome == {} and bad.error.startswith(f"the replay of rollout {parents[0].id} diverged after 1 of 2 calls")
    assert "shows 0" in bad.error and "shows 1" in bad.error
    assert (bad.metrics["replayed_calls"], len(bad.transitions), bad.attempt) == (1.0, 1, 0)
    assert trained_rollouts(made) == [b for b in made if b.status == "ok"]


def test_an_agent_that_swallows_the_error_diverges_all_the_same(gateway: Gateway) -> None:
    parents = record(gateway, noisy(itertools.repeat(0)), samples=1)

    async def optimist(task: Any, base_url: str, api_key: str) -> float:
        try:
            return await noisy(itertools.repeat(1))(task, base_url, api_key)
        except Exception:
            return 100.0

    (branch,) = run(gateway, branches(parents, 1)[2:], optimist)
    assert (branch.status, branch.outcome) == ("diverged", {})


def test_an_agent_that_takes_it_for_a_server_error_is_not_run_again(gateway: Gateway) -> None:
    parents = record(gateway, noisy(itertools.repeat(0)), samples=1)

    async def wraps(task: Any, base_url: str, api_key: str) -> float:
        try:
            return await noisy(itertools.repeat(1))(task, base_url, api_key)
        except Exception as problem:
            raise ConnectionError from problem

    (branch,) = run(gateway, branches(parents, 1)[2:], wraps)
    assert (branch.status, branch.attempt) == ("diverged", 0)


def test_a_run_that_ends_before_its_branch_diverges(gateway: Gateway) -> None:
    parents = record(gateway, noisy(itertools.repeat(0)), samples=1)

    async def lazy(task: Any, base_url: str, api_key: str) -> float:
        await chat(base_url, api_key, [{"role": "user", "content": "Climb."}])
        return 1.0

    (branch,) = run(gateway, branches(parents, 1)[2:], lazy)
    sentence = f"the run ended after 1 of the 2 calls of rollout {parents[0].id} that it was to repeat"
    assert (branch.status, branch.outcome, branch.error) == ("diverged", {}, sentence)


def test_a_run_that_breaks_off_by_itself_has_failed(gateway: Gateway) -> None:
    parents = record(gateway, noisy(itertools.repeat(0)), samples=1)

    async def broken(task: Any, base_url: str, api_key: str) -> float:
        raise ValueError("no such column")

    (branch,) = run(gateway, branches(parents, 1)[2:], broken)
    assert branch.status == "failed" and "no such column" in branch.error


def test_an_infrastructure_failure_is_tried_again_with_the_replay(gateway: Gateway) -> None:
    parents = record(gateway)
    attempts = itertools.count()

    async def flaky(task: Any, base_url: str, api_key: str) -> float:
        result = await walk(task, base_url, api_key)
        if next(attempts) == 0:
            raise ConnectionResetError
        return result

    request = branches(parents, 1)[1:2]
    (branch,) = run(gateway, request, flaky)
    (smooth,) = run(gateway, request)
    assert (branch.status, branch.attempt) == ("ok", 1)
    assert fields(branch) == fields(smooth)


# Agents of other kinds


async def votes(task: Any, base_url: str, api_key: str) -> float:
    """Four calls side by side, two of them alike, then one that sees what they said."""
    questions = ("left", "right", "right", "back")
    said = await asyncio.gather(*(chat(base_url, api_key, [{"role": "user", "content": q}]) for q in questions))
    last = await chat(base_url, api_key, [{"role": "user", "content": " ".join(sorted(said))}], model="policy:judge")
    return float(len(last))


def test_calls_side_by_side_branch_too(gateway: Gateway) -> None:
    parents = record(gateway, votes, samples=2)
    requests = branches(parents, 3)
    made = run(gateway, requests, votes)
    assert [b.status for b in made] == ["ok"] * len(requests), made[0].error
    for request, branch in zip(requests, made, strict=True):
        assert request.replay is not None
        calls = request.replay.calls
        assert_shares(branch, request.replay.parent, calls)
        for mine, theirs in zip(branch.transitions[calls:4], request.replay.parent.transitions[calls:4], strict=True):
            np.testing.assert_array_equal(mine.prompt_ids, theirs.prompt_ids)
        assert branch.transitions[4].role == "judge"


def test_the_text_to_sql_agent_branches_before_every_call() -> None:
    """LangGraph and langchain's client, three roles of which one continues another's conversation."""
    task = {"question": "How many singers?", "schema": "singer: id, name", "database": "music.sqlite"}
    chances = {"SELECT 3": 0.3, "INCORRECT": 0.3, "SELECT x": 0.3, "CORRECT": 0.1}
    execute = {"SELECT 3": "3"}.get
    agent = functools.partial(answer, execute=lambda database, sql: execute(sql, "error: no such column"))
    with Gateway(ChanceSampler(lambda said: chances), chance.tokenizer()) as gateway:
        reward = lambda task, target, sql: float(sql == "SELECT 3")  # noqa: E731
        parents = record(gateway, agent, task=Task("t", task), reward=reward)
        assert max(len(p.transitions) for p in parents) > 2
        requests = branches(parents, 1)
        made = run(gateway, requests, agent, reward=reward)
    assert [b.status for b in made] == ["ok"] * len(requests), made[0].error
    for request, branch in zip(requests, made, strict=True):
        assert request.replay is not None
        assert_shares(branch, request.replay.parent, request.replay.calls)
        mine, theirs = (r.transitions[request.replay.calls] for r in (branch, request.replay.parent))
        np.testing.assert_array_equal(mine.prompt_ids, theirs.prompt_ids)
        assert (mine.role, mine.continues) == (theirs.role, theirs.continues)
