"""What an agent may be, its rewards, the order of rollouts and what is not run again."""

from __future__ import annotations

import asyncio
import functools
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightningrl.runtime import Runner, RunnerSettings, Store, rollout_requests
from lightningrl.types import Rollout, Task
from tests.runtime.fake_gateway import FakeGateway
from tests.runtime.running import fail, one, requests, run

# What may be an agent


async def coroutine_agent(task: dict, base_url: str, api_key: str) -> float:
    return float(task["i"])


class CallableObject:
    async def __call__(self, task: dict, base_url: str, api_key: str) -> float:
        return float(task["i"])


def with_setting(setting: str, task: dict, base_url: str, api_key: str) -> float:
    return float(task["i"])


@pytest.mark.parametrize(
    "agent",
    [
        coroutine_agent,
        CallableObject(),
        lambda task, base_url, api_key: float(task["i"]),
        lambda task, base_url, api_key: coroutine_agent(task, base_url, api_key),
        functools.partial(with_setting, "setting"),
        functools.partial(coroutine_agent),
    ],
    ids=["async", "async object", "sync", "sync that returns a coroutine", "partial", "async partial"],
)
def test_agents_sync_and_async(agent: Any) -> None:
    assert [rollout.reward for rollout in run(agent, 5)] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_rollouts_come_in_the_order_of_the_requests_whatever_finishes_first() -> None:
    turn = [asyncio.Event() for _ in range(5)]
    turn[4].set()
    finished = []

    async def last_first(task: dict, base_url: str, api_key: str) -> float:
        await turn[task["i"]].wait()
        finished.append(task["i"])
        if task["i"]:
            turn[task["i"] - 1].set()
        return task["i"]

    rollouts = run(last_first, 5)
    assert finished == [4, 3, 2, 1, 0]
    assert [rollout.reward for rollout in rollouts] == [0, 1, 2, 3, 4]


def test_groups_and_ids() -> None:
    tasks = [Task("a", {}), Task("b", {})]
    made = rollout_requests(tasks, phase="eval", iteration=7, samples=2)
    assert [request.id for request in made] == ["eval/7/a/0", "eval/7/a/1", "eval/7/b/0", "eval/7/b/1"]
    assert [request.group for request in made] == ["eval/7/a", "eval/7/a", "eval/7/b", "eval/7/b"]
    assert [request.sample for request in made] == [0, 1, 0, 1]


def test_two_requests_of_one_id_are_refused() -> None:
    with pytest.raises(ValueError, match="two rollout requests have the id 'train/0/t0/0'"):
        Runner(FakeGateway(), fail, None).run(requests(1) * 2, phase="train", iteration=0, seed=0)


def test_no_requests() -> None:
    assert run(fail, 0) == []


@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_no_more_rollouts_at_a_time_than_allowed(limit: int, kind: str) -> None:
    running, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(limit) if kind == "sync" else None

    def enter(change: int) -> None:
        nonlocal running, most
        with lock:
            running += change
            most = max(most, running)

    def sync_agent(*_: Any) -> int:
        enter(1)
        assert together is not None
        together.wait(10)  # fails unless `limit` agents really run at once
        enter(-1)
        return 1

    async def async_agent(*_: Any) -> int:
        enter(1)
        for _i in range(5):
            await asyncio.sleep(0)
        enter(-1)
        return 1

    agent = sync_agent if kind == "sync" else async_agent
    rollouts = run(agent, 6, settings=RunnerSettings(concurrency=limit))
    assert [rollout.status for rollout in rollouts] == ["ok"] * 6
    assert most == limit


def test_an_agent_gets_its_own_copy_of_the_input_and_never_the_target() -> None:
    task = Task("t", {"list": [1]}, target="secret")
    seen = []

    def spoil(task: dict, base_url: str, api_key: str) -> int:
        seen.append(repr(task))
        task["list"].append(2)
        return 1

    made = rollout_requests([task], phase="train", iteration=0, samples=3)
    Runner(FakeGateway(), spoil, None, RunnerSettings(concurrency=1)).run(made, phase="train", iteration=0, seed=0)
    assert seen == ["{'list': [1]}"] * 3


# Rewards


@pytest.mark.parametrize("returned", [1, 1.0, True, np.float32(1), np.int64(1), np.bool_(True)])
def test_an_agent_returns_its_reward(returned: Any) -> None:
    rollout = one(lambda *_: returned)
    assert (rollout.status, rollout.outcome) == ("ok", {"reward": 1.0})
    assert type(rollout.reward) is float


def test_an_agent_returns_named_rewards_beside_its_answer() -> None:
    rollout = one(lambda *_: {"reward": 0.5, "format": 1, "sql": "SELECT 1"})
    assert rollout.outcome == {"reward": 0.5, "format": 1.0}
    assert rollout.answer == {"reward": 0.5, "format": 1, "sql": "SELECT 1"}


def test_a_reward_function_scores_the_answer_even_if_it_is_a_number() -> None:
    rollout = one(lambda task, *_: 42, lambda given, target, answer: {"reward": answer == 42, "target": target["answer"]})
    assert rollout.outcome == {"reward": 1.0, "target": 0.0}
    assert rollout.answer == 42


def test_an_agent_posts_its_reward() -> None:
    gateway = FakeGateway()

    def post(task: dict, base_url: str, api_key: str) -> dict:
        gateway.open_sessions[api_key].posted = {"reward": 0.25, "style": 1.0}
        return {"answer": "done"}

    rollout = one(post, gateway=gateway)
    assert rollout.outcome == {"reward": 0.25, "style": 1.0}
    assert rollout.answer == {"answer": "done"}


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        (math.nan, "the agent returned the reward nan: a reward is a finite float32"),
        (-math.inf, "the agent returned the reward -inf: a reward is a finite float32"),
        (1e39, "the agent returned the reward 1e+39: a reward is a finite float32"),
        ({"reward": 1, "style": math.nan}, "the agent returned the reward 'style' nan: a reward is a finite float32"),
        ({"reward": "1"}, "the agent returned the reward '1' of type str: a reward is a number"),
        ({"score": 1}, 'the run has no reward: the agent returned a dict without a "reward" (score); '),
        ("SELECT 1", "the run has no reward: the agent returned 'SELECT 1'; "),
        (None, "the run has no reward: the agent returned None; return a number"),
    ],
)
def test_a_bad_reward_fails_the_rollout_with_one_sentence(returned: Any, sentence: str) -> None:
    rollout = one(lambda *_: returned)
    assert (rollout.status, rollout.outcome) == ("failed", {})
    assert rollout.error.startswith(sentence)
    assert "\n" not in rollout.error


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        (math.nan, "the reward function returned the reward nan: a reward is a finite float32"),
        ("0.5", "the reward function returned the reward '0.5' of type str: a reward is a number"),
        (None, "the reward function returned the reward None of type NoneType: a reward is a number"),
        ({"f1": 0.5}, 'the reward function returned a dict without a "reward" (f1): give the one that is trained on that name'),
        ({"reward": 1, "is": "good"}, "the reward function returned the reward 'is' 'good' of type str: a reward is a number"),
    ],
)
def test_a_bad_reward_of_a_reward_function_fails_the_rollout(returned: Any, sentence: str) -> None:
    rollout = one(lambda *_: "answer", lambda *_: returned)
    assert (rollout.status, rollout.outcome, rollout.error) == ("failed", {}, sentence)


def test_a_reward_function_that_raises_fails_the_rollout_with_its_traceback() -> None:
    def broken(given: Any, target: Any, answer: Any) -> float:
        return target["missing"]

    rollout = one(lambda *_: "answer", broken)
    assert (rollout.status, rollout.outcome, rollout.answer) == ("failed", {}, "answer")
    assert 'return target["missing"]' in rollout.error and "KeyError: 'missing'" in rollout.error


def test_a_run_without_a_call_is_a_run() -> None:
    rollout = one(lambda *_: 1.0)
    assert (rollout.status, rollout.reward, rollout.transitions) == ("ok", 1.0, ())
    assert rollout.metrics["calls"] == 0.0 and rollout.metrics["response_tokens"] == 0.0


# Intermediate rewards


def test_agent_lightning_discarded_intermediate_rewards(tmp_path: Path) -> None:
    gateway = FakeGateway()

    def two_calls(task: dict, base_url: str, api_key: str) -> float:
        for k in range(2):
            gateway.call(api_key, [{"role": "user", "content": f"turn {k}"}], "text")
        return 1.0

    with Store(tmp_path / "rollouts.sqlite") as store:
        functions = (lambda rollout: (-0.5, 0.0), lambda rollout: (0.25, 0.125))
        rollout = one(two_calls, gateway=gateway, intermediate=functions, store=store)
        assert [transition.reward for transition in rollout.transitions] == [-0.25, 0.125]
        assert rollout.outcome == {"reward": 1.0}
        stored = store.read_rollout(rollout.id)
        assert [transition.reward for transition in stored.transitions] == [-0.25, 0.125]


@pytest.mark.parametrize("given", [(), (0.0, 0.0), (math.nan,)])
def test_intermediate_rewards_that_fit_no_calls_fail_the_rollout(given: tuple[float, ...]) -> None:
    gateway = FakeGateway()

    def one_call(task: dict, base_url: str, api_key: str) -> float:
        gateway.call(api_key, [{"role": "user", "content": "hi"}], "text")
        return 1.0

    def shaping(rollout: Rollout) -> tuple[float, ...]:
        return given

    rollout = one(one_call, gateway=gateway, intermediate=(shaping,))
    assert (rollout.status, rollout.outcome) == ("failed", {})
    assert "the intermediate reward shaping gave" in rollout.error


def test_agent_lightning_prompt_dedup_dropped_honest_repeats(tmp_path: Path) -> None:
    """Two calls of one prompt, as in best-of-n or voting, are two transitions."""
    gateway = FakeGateway()

    def vote(task: dict, base_url: str, api_key: str) -> float:
        for text in ("yes", "yes", "no"):
            gateway.call(api_key, [{"role": "user", "content": "is it?"}], text)
        return 1.0

    with Store(tmp_path / "rollouts.sqlite") as store:
        rollout = one(vote, gateway=gateway, store=store)
        for kept in (rollout, store.read_rollout(rollout.id)):
            assert [transition.text for transition in kept.transitions] == ["yes", "yes", "no"]


# Resuming


def test_rollouts_that_are_in_the_store_are_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.sqlite"
    with Store(path) as store:
        first = run(lambda task, *_: task["i"] if task["i"] != 1 else "no reward", 3, store=store)
    again, heard = [], []

    def agent(task: dict, base_url: str, api_key: str) -> float:
        again.append(task["i"])
        return 10.0

    with Store(path) as store:
        second = run(agent, 4, store=store, on_rollout=lambda rollout: heard.append(rollout.id))
        assert sorted(again) == [1, 3]  # the one that had failed, and the one that was never run
        assert [rollout.reward for rollout in second] == [0.0, 10.0, 2.0, 10.0]
        assert second[0] == first[0] and second[0].task is not first[0].task
        assert len(heard) == 4
        assert [rollout.id for rollout in store.read("train", 0)] == [request.id for request in requests(4)]
        assert [rollout.reward for rollout in run(lambda *_: 5.0, 2, store=store, iteration=1)] == [5.0, 5.0]


@pytest.mark.parametrize("setting", ["concurrency", "time_limit_s", "max_attempts"])
def test_settings_must_be_positive(setting: str) -> None:
    with pytest.raises(ValueError, match=f"RunnerSettings.{setting} is 0: it must be positive"):
        RunnerSettings(**{setting: 0})
