"""Runs an agent on numbered tasks against a gateway without a model."""

from __future__ import annotations

import os
import time
from typing import Any

from lightningrl.runtime import RolloutRequest, Runner, rollout_requests
from lightningrl.types import Rollout, Task
from tests.runtime.fake_gateway import FakeGateway


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


def until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
