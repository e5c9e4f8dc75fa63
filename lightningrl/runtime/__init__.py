"""Runs agents and keeps what they did: time limits, retries, groups, a SQLite store, intermediate rewards. No JAX."""

from lightningrl.runtime.agents import load_function, load_tasks
from lightningrl.runtime.intermediate import better_draft, new_support, repeated_call, tool_error
from lightningrl.runtime.runner import RolloutRequest, Runner, RunnerSettings, rollout_requests
from lightningrl.runtime.store import LogEntry, Store

__all__ = [
    "LogEntry",
    "RolloutRequest",
    "Runner",
    "RunnerSettings",
    "Store",
    "better_draft",
    "load_function",
    "load_tasks",
    "new_support",
    "repeated_call",
    "rollout_requests",
    "tool_error",
]
