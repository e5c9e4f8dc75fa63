"""Agents that other processes can import."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Any

import httpx


def say(base_url: str, api_key: str, text: str) -> str:
    body = {"model": "policy", "messages": [{"role": "user", "content": text}]}
    headers = {"Authorization": f"Bearer {api_key}"}
    reply = httpx.post(f"{base_url}/chat/completions", json=body, headers=headers, timeout=30).raise_for_status()
    return reply.json()["choices"][0]["message"]["content"]


async def of_kind(task: dict[str, Any], base_url: str, api_key: str) -> dict[str, Any]:
    """Does what `task["kind"]` says."""
    match task["kind"]:
        case "error":
            raise KeyError("of the agent")
        case "server error":
            await asyncio.to_thread(say, base_url, api_key, "fail")
        case "exit":
            raise SystemExit(3)
        case "unsendable":
            return {"reward": threading.Lock()}
        case "slow":
            await asyncio.sleep(60)
    await asyncio.to_thread(say, base_url, api_key, task["kind"])
    return {"reward": 1.0, "process": float(os.getpid())}


def sync(task: dict[str, Any], base_url: str, api_key: str) -> dict[str, float]:
    say(base_url, api_key, task["kind"])
    return {"reward": 1.0, "process": float(os.getpid())}


def crash_once(task: dict[str, Any], base_url: str, api_key: str) -> float:
    """Ends its process with all that run in it, the first time."""
    say(base_url, api_key, "hello")
    first = Path(task["first"])
    if task["crash"] and not first.exists():
        first.touch()
        os._exit(7)
    time.sleep(0.3)
    return 1.0


def hang(task: dict[str, Any], base_url: str, api_key: str) -> float:
    Path(task["pid_file"]).write_text(str(os.getpid()))
    time.sleep(600)
    return 1.0
