"""Failures, time limits and what must not take the run down."""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from lightningrl.runtime import LogEntry, RunnerSettings, Store
from lightningrl.types import Rollout
from tests.runtime.fake_gateway import FakeGateway
from tests.runtime.running import one, requests, run

SHORT = RunnerSettings(time_limit_s=0.2)


# Failures


def test_a_failure_is_recorded_with_its_traceback_and_not_tried_again() -> None:
    gateway = FakeGateway()

    def broken(*_: Any) -> float:
        raise ValueError("no such column")

    rollout = one(broken, gateway=gateway)
    assert (rollout.status, rollout.attempt, len(gateway.opened)) == ("failed", 0, 1)
    assert 'raise ValueError("no such column")' in rollout.error and rollout.error.endswith("ValueError: no such column\n")


def test_intermediate_rewards_that_never_end_cost_one_rollout_and_not_the_run() -> None:
    """They may score what a model has written, as long as that takes."""
    over = threading.Event()

    def endless(rollout: Rollout) -> tuple[float, ...]:
        over.wait()
        return ()

    rollout = one(lambda *_: 1.0, intermediate=(endless,), settings=SHORT)
    over.set()
    assert (rollout.status, rollout.outcome) == ("timed_out", {})
    assert rollout.error == "the intermediate rewards were still running after the time limit of 0.2 s"


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


@pytest.mark.slow
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


@pytest.mark.slow
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
