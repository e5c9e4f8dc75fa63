"""Where an attempt at a rollout runs: here, in this process. `on_processes` and `on_ray` have other places."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any

from lightningrl.runtime.event_loop import contained, in_thread, within

# (task.input, base_url, api_key) -> a number, {"reward": …, …}, any JSON answer, or None; sync or async.
Agent = Callable[[dict[str, Any], str, str], Any]

# (input, base_url, api_key, time limit in seconds) -> what the agent returned, and the seconds that it took. Raises what the agent
# raised, or `AgentFailed` in its stead; `OutOfTime` after the limit, which starts when the agent does.
CallAgent = Callable[[dict[str, Any], str, str, float], Awaitable[tuple[Any, float]]]


def in_this_process(agent: Agent) -> CallAgent:
    """Async agents share one event loop, which they must not block; sync agents run in a thread each."""

    async def call(arguments: dict[str, Any], base_url: str, api_key: str, seconds: float) -> tuple[Any, float]:
        started = time.monotonic()
        answer = await within(contained(answer_of(agent, copy.deepcopy(arguments), base_url, api_key)), seconds)
        return answer, time.monotonic() - started

    return call


async def answer_of(agent: Agent, arguments: dict[str, Any], base_url: str, api_key: str) -> Any:
    """What an agent returns, be it sync or async."""
    is_async = inspect.iscoroutinefunction(agent) or inspect.iscoroutinefunction(getattr(agent, "__call__", None))  # noqa: B004
    answer = agent(arguments, base_url, api_key) if is_async else await in_thread(agent, arguments, base_url, api_key)
    return await answer if inspect.isawaitable(answer) else answer
