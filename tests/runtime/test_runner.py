from __future__ import annotations

import asyncio
import functools
import itertools
import math
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightningrl.runtime import LogEntry, RolloutRequest, Runner, RunnerSettings, Store, rollout_requests
from lightningrl.types import Rollout, Task
from tests.runtime.fake_gateway import FakeGateway

SHORT = RunnerSettings(time_limit_s=0.2)


def requests(count: int, samples: int = 1) -> list[RolloutRequest]:
    tasks = [Task(f"t{i}", {"i": i}, target={"answer": i}) for i in range(count)]
    return rollout_requests(tasks, phase="train", iteration=0, samples=samples)


def run(agent: Any, count: int = 1, reward: Any = None, gateway: FakeGateway | None = None, **settings: Any) -> list[Rollout]:
    known = {name: settings.pop(name) for name in ("store", "intermediate", "settings") if name in settings}
    runner = Runner(gateway or FakeGateway(), agent, reward, **known)
    return runner.run(requests(count), **{"phase": "train", "iteration": 0, "seed": 0, **settings})


def one(agent: Any, reward: Any = None, **settings: Any) -> Rollout:
    (rollout,) = run(agent, 1, reward, **settings)
    return rollout


def fail(*_: Any) -> Any:
    raise AssertionError("must not be called")


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


# Failures


def test_a_failure_is_recorded_with_its_traceback_and_not_tried_again() -> None:
    gateway = FakeGateway()

    def broken(*_: Any) -> float:
        raise ValueError("no such column")

    rollout = one(broken, gateway=gateway)
    assert (rollout.status, rollout.attempt, len(gateway.opened)) == ("failed", 0, 1)
    assert 'raise ValueError("no such column")' in rollout.error and rollout.error.endswith("ValueError: no such column\n")


def test_agent_lightning_failed_and_timed_out_runs_trained_with_reward_0() -> None:
    async def agent(task: dict, base_url: str, api_key: str) -> float:
        if task["i"] == 1:
            raise ValueError
        if task["i"] == 2:
            await asyncio.sleep(60)
        return 0.0

    honest, failed, late = run(agent, 3, settings=RunnerSettings(time_limit_s=1.0))
    assert (honest.status, honest.outcome) == ("ok", {"reward": 0.0})
    assert (failed.status, failed.outcome) == ("failed", {})
    assert (late.status, late.outcome) == ("timed_out", {})
    for rollout in (failed, late):
        with pytest.raises(KeyError):
            _ = rollout.reward


def test_agent_lightning_requeue_crash_33_of_32_completed(tmp_path: Path) -> None:
    """Retries, failures and timeouts give one rollout per request, in the result and in the store."""
    attempts = itertools.count()

    def agent(task: dict, base_url: str, api_key: str) -> float:
        next(attempts)
        match task["i"] % 4:
            case 1:
                raise ConnectionResetError
            case 2:
                raise ValueError
            case 3:
                threading.Event().wait(60)
        return 1.0

    with Store(tmp_path / "rollouts.sqlite") as store:
        rollouts = run(agent, 32, store=store, settings=RunnerSettings(time_limit_s=2.0, max_attempts=2))
        assert [rollout.id for rollout in rollouts] == [request.id for request in requests(32)]
        assert [rollout.status for rollout in rollouts] == ["ok", "failed", "failed", "timed_out"] * 8
        assert next(attempts) == 32 + 8
        assert sorted(store.ids("train", 0)) == sorted(request.id for request in requests(32))


def test_agent_lightning_lost_rollouts(tmp_path: Path) -> None:
    """Every rollout is in the store before anybody hears of it, and so survives a crash of whoever trains on it."""
    with Store(tmp_path / "rollouts.sqlite") as store:
        heard = []

        def on_rollout(rollout: Rollout) -> None:
            assert store.read_rollout(rollout.id).outcome == rollout.outcome
            heard.append(rollout.id)

        rollouts = run(lambda task, *_: task["i"], 8, store=store, on_rollout=on_rollout)
        assert sorted(heard) == sorted(rollout.id for rollout in rollouts) and len(heard) == 8
        assert {rollout.id: rollout for rollout in store.read("train", 0)} == {rollout.id: rollout for rollout in rollouts}


def test_an_infrastructure_failure_is_tried_again_under_a_new_key_and_its_calls_do_not_count(tmp_path: Path) -> None:
    gateway = FakeGateway()

    def flaky(task: dict, base_url: str, api_key: str) -> float:
        gateway.call(api_key, [{"role": "user", "content": "hi"}], f"said under {api_key}")
        if api_key != "key-2":
            raise ConnectionResetError("the server went away")
        return 1.0

    with Store(tmp_path / "rollouts.sqlite") as store:
        rollout = one(flaky, gateway=gateway, store=store)
        assert (rollout.status, rollout.attempt, rollout.reward) == ("ok", 2, 1.0)
        assert [transition.text for transition in rollout.transitions] == ["said under key-2"]
        assert gateway.opened == [(f"key-{k}", "train/0/t0/0") for k in range(3)] and not gateway.open_sessions
        log = store.log(rollout.id)
        assert [entry.attempt for entry in log] == [0, 1]
        for entry in log:
            assert "ConnectionResetError: the server went away" in entry.text
            assert f"call 0 (policy): said under key-{entry.attempt}" in entry.text


def test_an_infrastructure_that_stays_down_fails_the_rollout() -> None:
    gateway = FakeGateway()

    def down(*_: Any) -> float:
        raise ConnectionRefusedError

    rollout = one(down, gateway=gateway, settings=RunnerSettings(max_attempts=2))
    assert (rollout.status, rollout.attempt, rollout.outcome, len(gateway.opened)) == ("failed", 1, {}, 2)
    assert "ConnectionRefusedError" in rollout.error


def test_what_the_gateway_notes_is_in_the_log(tmp_path: Path) -> None:
    gateway = FakeGateway()
    gateway.log = ("temperature 0.2 of the agent is overridden by 1.0",)
    with Store(tmp_path / "rollouts.sqlite") as store:
        rollout = one(lambda *_: 1, gateway=gateway, store=store)
        assert store.log(rollout.id) == (LogEntry(0, gateway.log[0]),)


# Time limits


async def sleeps(*_: Any) -> float:
    await asyncio.sleep(60)
    return 1.0


async def refuses_to_be_cancelled(*_: Any) -> float:
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass


def hangs(*_: Any) -> float:
    threading.Event().wait(60)
    return 1.0


@pytest.mark.parametrize("agent", [sleeps, refuses_to_be_cancelled, hangs])
def test_an_agent_that_takes_too_long_is_timed_out_and_its_key_closed(agent: Any) -> None:
    gateway = FakeGateway()
    rollout = one(agent, gateway=gateway, settings=SHORT)
    assert (rollout.status, rollout.outcome, rollout.attempt) == ("timed_out", {}, 0)
    assert rollout.error == "the agent was still running after the time limit of 0.2 s"
    assert not gateway.open_sessions


def test_agents_that_hang_take_no_place_from_the_others() -> None:
    two_at_a_time = RunnerSettings(concurrency=2, time_limit_s=1.0)
    rollouts = run(lambda task, *_: hangs() if task["i"] < 4 else 1.0, 8, settings=two_at_a_time)
    assert [rollout.status for rollout in rollouts] == ["timed_out"] * 4 + ["ok"] * 4


def test_a_reward_function_that_takes_too_long_is_timed_out_and_keeps_the_answer() -> None:
    rollout = one(lambda *_: "answer", hangs, settings=RunnerSettings(time_limit_s=1.0))
    assert (rollout.status, rollout.outcome, rollout.answer) == ("timed_out", {}, "answer")
    assert rollout.error == "the reward function was still running after the time limit of 1 s"


def test_an_agents_own_timeout_is_not_the_runners() -> None:
    async def impatient(*_: Any) -> float:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(60)
        return 1.0

    rollout = one(impatient, settings=RunnerSettings(max_attempts=1))
    assert rollout.status == "failed" and "TimeoutError" in rollout.error


# What must not take the run down


async def exits_in_a_task(*_: Any) -> float:
    async def exits() -> None:
        sys.exit(3)

    await asyncio.create_task(exits())
    return 1.0


async def exits_at_once(*_: Any) -> float:
    sys.exit(3)


async def cancels_itself(*_: Any) -> float:
    raise asyncio.CancelledError


def stops_iterating(*_: Any) -> float:
    return next(iter(()))


@pytest.mark.parametrize(
    ("agent", "named"),
    [
        (lambda *_: sys.exit(3), "SystemExit"),
        (exits_at_once, "SystemExit"),
        (exits_in_a_task, "SystemExit"),
        (cancels_itself, "CancelledError"),
        (stops_iterating, "StopIteration"),
    ],
    ids=["sync exit", "async exit", "exit in a task", "cancels itself", "StopIteration"],
)
def test_an_agent_that_would_stop_the_program_fails_alone(agent: Any, named: str) -> None:
    def some(task: dict, base_url: str, api_key: str) -> Any:
        return agent() if task["i"] == 1 else 1.0

    rollouts = run(some, 4)
    assert [rollout.status for rollout in rollouts] == ["ok", "failed", "ok", "ok"]
    assert named in rollouts[1].error


def test_a_reward_function_that_exits_fails_alone() -> None:
    rollouts = run(lambda task, *_: task["i"], 2, lambda given, target, answer: sys.exit() if answer else 1.0)
    assert [rollout.status for rollout in rollouts] == ["ok", "failed"]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_keyboard_interrupt_in_an_agent_stops_the_run(kind: str) -> None:
    def interrupted(*_: Any) -> float:
        raise KeyboardInterrupt

    async def interrupted_async(*_: Any) -> float:
        raise KeyboardInterrupt

    gateway = FakeGateway()
    with pytest.raises(KeyboardInterrupt):
        run(interrupted if kind == "sync" else interrupted_async, 4, gateway=gateway, settings=RunnerSettings(concurrency=1))
    assert len(gateway.opened) == 1
    assert run(lambda *_: 1.0, 2)[1].status == "ok"


def test_a_callback_that_raises_ends_the_run_with_its_exception() -> None:
    def on_rollout(rollout: Rollout) -> None:
        raise RuntimeError("the progress bar broke")

    with pytest.raises(RuntimeError, match="the progress bar broke"):
        run(lambda *_: 1.0, 3, on_rollout=on_rollout)


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
