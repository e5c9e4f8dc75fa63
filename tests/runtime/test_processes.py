"""Agents in processes beside this one."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lightningrl.errors import UserError
from lightningrl.runtime import Runner, RunnerSettings, Store, rollout_requests
from lightningrl.runtime.by_name import found, named
from lightningrl.runtime.on_processes import OnProcesses
from lightningrl.types import Rollout, Task
from tests.runtime import sendable_agents
from tests.runtime.fake_gateway import FakeGateway
from tests.runtime.running import is_running, until


def run(agent: Any, tasks: list[Task], gateway: FakeGateway, count: int = 1, store: Store | None = None, **settings: Any) -> list[Rollout]:
    with OnProcesses(agent, count) as call_agent:
        runner = Runner(gateway, agent, None, RunnerSettings(**settings), call_agent=call_agent, store=store)
        return runner.run(rollout_requests(tasks, phase="train", iteration=0, samples=1), phase="train", iteration=0, seed=0)


@pytest.mark.slow
def test_agents_of_every_kind_answer_from_another_process() -> None:
    kinds = ["fine", "error", "server error", "exit", "unsendable", "slow"]
    with FakeGateway(lambda body: 500 if body["messages"][0]["content"] == "fail" else "said") as gateway:
        tasks = [Task(kind, {"kind": kind}) for kind in kinds]
        rollouts = run(sendable_agents.of_kind, tasks, gateway, time_limit_s=5.0, max_attempts=2)
        assert not gateway.open_sessions
    fine, error, server, exited, unsendable, slow = rollouts
    assert fine.reward == 1.0 and fine.outcome["process"] != os.getpid() and [t.text for t in fine.transitions] == ["said"]
    assert [r.status for r in rollouts[1:]] == ["failed"] * 4 + ["timed_out"]
    assert [r.attempt for r in rollouts] == [0, 0, 1, 0, 0, 0]  # only what the infrastructure did is tried again
    assert "KeyError: 'of the agent'" in error.error and "sendable_agents.py" in error.error
    assert "500 Internal Server Error" in server.error
    assert "SystemExit(3) was raised" in exited.error
    assert "lock" in unsendable.error
    assert slow.error == "the agent was still running after the time limit of 5 s"


@pytest.mark.slow
def test_several_processes_share_the_work() -> None:
    with FakeGateway(lambda body: time.sleep(0.05) or "said") as gateway:
        rollouts = run(sendable_agents.sync, [Task(f"t{i}", {"kind": "fine"}) for i in range(12)], gateway, count=2)
    assert len({r.outcome["process"] for r in rollouts}) == 2 and all(r.reward == 1.0 for r in rollouts)


@pytest.mark.slow
def test_a_process_that_dies_loses_no_rollout_and_none_counts_twice(tmp_path: Path) -> None:
    tasks = [Task(f"t{i}", {"crash": i == 2, "first": str(tmp_path / "first")}) for i in range(6)]
    with FakeGateway() as gateway, Store(tmp_path / "rollouts.sqlite") as store:
        rollouts = run(sendable_agents.crash_once, tasks, gateway, store=store)
        assert not gateway.open_sessions
        assert [(r.status, r.reward, len(r.transitions)) for r in rollouts] == [("ok", 1.0, 1)] * 6
        assert rollouts[2].attempt == 1
        keys = Counter(id_ for _, id_ in gateway.opened)
        assert {r.id: keys[r.id] for r in rollouts} == {r.id: r.attempt + 1 for r in rollouts}
        (entry,) = store.log(rollouts[2].id)
        assert "the agents' process ended with status 7" in entry.text


def test_ctrl_c_ends_the_processes(tmp_path: Path) -> None:
    pid_file, gateway = tmp_path / "pid", FakeGateway()

    def ctrl_c() -> None:
        until(lambda: pid_file.exists() and pid_file.read_text())
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    timer = threading.Thread(target=ctrl_c)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run(sendable_agents.hang, [Task("t", {"pid_file": str(pid_file)})], gateway)
    timer.join()
    assert not gateway.open_sessions
    assert not is_running(int(pid_file.read_text()))


@pytest.mark.slow
def test_they_do_not_outlive_a_run_that_is_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    program = f"""
from lightningrl.runtime import Runner, rollout_requests
from lightningrl.runtime.by_name import found, named
from lightningrl.runtime.on_processes import OnProcesses
from lightningrl.types import Task
from tests.runtime.fake_gateway import FakeGateway
from tests.runtime.running import is_running, until
from tests.runtime.sendable_agents import hang

with OnProcesses(hang) as call_agent:
    tasks = [Task("t", {{"pid_file": {str(pid_file)!r}}})]
    runner = Runner(FakeGateway(), hang, None, call_agent=call_agent)
    runner.run(rollout_requests(tasks, phase="train", iteration=0, samples=1), phase="train", iteration=0, seed=0)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    until(lambda: pid_file.exists() and pid_file.read_text())
    parent.kill()
    parent.wait()
    until(lambda: not is_running(int(pid_file.read_text())))


class Kept:
    def agent(self, task: Any, base_url: str, api_key: str) -> float:
        return 1.0


@pytest.mark.parametrize("agent", [lambda task, base_url, api_key: 1.0, Kept().agent, functools.partial(sendable_agents.sync, object())])
def test_an_agent_that_cannot_be_sent_is_refused(agent: Any) -> None:
    with pytest.raises(UserError, match="make it a function of a module"), OnProcesses(agent):
        pass


def test_a_function_is_found_again_by_its_name() -> None:
    for agent in (
        sendable_agents.sync,
        functools.partial(functools.partial(sendable_agents.hang, {"a": [1]}), api_key=sendable_agents.say),
    ):
        again = found(json.loads(json.dumps(named(agent))))
        assert again is agent or (again.func, again.args, again.keywords) == (agent.func, agent.args, agent.keywords)
