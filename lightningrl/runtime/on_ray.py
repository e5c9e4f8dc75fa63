"""Runs attempts at rollouts on the hosts of a Ray cluster: an agent is an HTTP client, so it runs anywhere.

Only the agent goes there. Keys, calls, rewards, retries and the store stay with the runner, which sees a dead host as what it is: an
infrastructure failure of the attempts that ran on it, made again under new keys. What a host that was taken for dead still sends
comes under a key that is closed, and is refused.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import os
import socket
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any, Self

from lightningrl.errors import UserError
from lightningrl.runtime.event_loop import contained, run_on_agent_loop, within
from lightningrl.runtime.failures import AgentFailed, describe, is_infrastructure_failure
from lightningrl.runtime.local import Agent, answer_of

STARTED = "started"


class OnRay:
    """A `CallAgent` on a Ray cluster. Use as a context manager, which joins the cluster and leaves it.

    The agent is sent once: by import path where it is a function of a module, which every host then needs, else by value. Every
    attempt is a task of its own that Ray does not repeat; one that is over its time, or given up by Ctrl-C, is killed with its process.

    Args:
        address: of a running cluster; None for the one in RAY_ADDRESS, and if there is none, a new one on this machine.
        cpus: what an attempt reserves of its host; how many run at once is what the cluster has for them.
        gateway_host: where the gateway listens; agents on other hosts need one that they can reach.
    """

    def __init__(self, agent: Agent, *, address: str | None = None, cpus: float = 1.0, gateway_host: str = "127.0.0.1") -> None:
        self._agent, self._address, self._cpus, self._gateway_host = agent, address, cpus, gateway_host
        self._ray = import_ray()
        self._owns = False

    def __enter__(self) -> Self:
        self._owns = not self._ray.is_initialized()
        if self._owns:
            self._join()
        try:
            self._check_hosts()
            self._sent = self._send()
        except BaseException:
            self.__exit__()
            raise
        self._attempt = self._ray.remote(num_cpus=self._cpus, max_retries=0)(attempt)
        return self

    def __exit__(self, *_: object) -> None:
        if self._owns:
            self._ray.shutdown()

    async def __call__(self, arguments: dict[str, Any], base_url: str, api_key: str, seconds: float) -> tuple[Any, float]:
        replies = self._attempt.remote(self._sent, arguments, self._reachable(base_url), api_key)
        over = False
        try:
            await self._next(replies)  # until a host has room; the agent's time starts then
            started = time.monotonic()
            answer, error, again = await within(self._next(replies), seconds)
            over = True
        finally:
            if not over:
                self._ray.cancel(replies, force=True)
        if error:
            raise AgentFailed(error, infrastructure=again)
        return answer, time.monotonic() - started

    async def _next(self, replies: Any) -> Any:
        try:
            return await (await anext(replies))
        except StopAsyncIteration:
            raise AgentFailed("the task ended without an answer", infrastructure=True) from None
        except self._ray.exceptions.RayTaskError as error:  # of `attempt` itself: the agent or its answer cannot be sent
            raise AgentFailed(f"an attempt on Ray failed: {error}", infrastructure=False) from error
        except self._ray.exceptions.RayError as error:
            raise AgentFailed(f"Ray lost the attempt: {type(error).__name__}: {error}", infrastructure=True) from error

    def _join(self) -> None:
        address = self._address or os.environ.get("RAY_ADDRESS")
        where: dict[str, Any] = {"address": address} if address else {"address": "local", "include_dashboard": False}
        try:
            _knock(address)
            self._ray.init(**where, logging_level=logging.WARNING)
        except (OSError, ValueError, RuntimeError, self._ray.exceptions.RayError) as error:
            reason = str(error).strip().splitlines()[0]
            wanted = "give the --ray_address of one, or none for a new one"
            raise UserError(f"there is no Ray cluster at {address} ({reason}): {wanted}") from error

    def _check_hosts(self) -> None:
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        most = max((node["Resources"].get("CPU", 0.0) for node in alive), default=0.0)
        if most < self._cpus:
            raise UserError(f"no host of the Ray cluster has the ray_cpus={self._cpus:g} CPUs that an agent asks for: the most is {most:g}")
        hosts = {node["NodeManagerAddress"] for node in alive}
        if len(hosts) > 1 and _is_loopback(self._gateway_host):
            raise UserError(
                f"the gateway listens on {self._gateway_host}, which the {len(hosts)} hosts of the Ray cluster cannot all reach: "
                f"give --host={self._ray.util.get_node_ip_address()} or another address of this machine"
            )

    def _send(self) -> Any:
        try:
            return self._ray.put(self._agent)
        except Exception as error:
            raise UserError(f"the agent cannot be sent to other processes ({error}): make it a function of a module") from error

    def _reachable(self, base_url: str) -> str:
        """The gateway's URL for other hosts: of one that listens everywhere, that of this host."""
        parts = urllib.parse.urlsplit(base_url)
        if parts.hostname not in ("0.0.0.0", "::"):
            return base_url
        host = self._ray.util.get_node_ip_address()
        return parts._replace(netloc=f"{f'[{host}]' if ':' in host else host}:{parts.port}").geturl()


def attempt(agent: Agent, arguments: dict[str, Any], base_url: str, api_key: str) -> Iterator[Any]:
    """Runs in a process of the cluster. Says that it has started, then (answer, traceback or "", whether the infrastructure failed)."""
    yield STARTED
    try:
        answer = run_on_agent_loop(contained(answer_of(agent, arguments, base_url, api_key)))
    except BaseException as error:  # described here: not every exception survives being sent
        yield None, describe(error), is_infrastructure_failure(error)
    else:
        yield answer, "", False


@functools.cache
def import_ray() -> Any:
    """The module; raises UserError where it is not installed. Its usage statistics are off."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # hosts' GPUs stay as they are for agents that reserve none
    try:
        import ray
    except ImportError as error:
        raise UserError("--runner=ray needs Ray, which is not installed: pip install 'lightningrl[ray]'") from error
    return ray


def _knock(address: str | None) -> None:
    """Raises OSError where nobody listens at host:port; Ray itself would go on trying for minutes."""
    parts = urllib.parse.urlsplit(address if address and "//" in address else f"//{address or ''}")
    if parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), timeout=10).close()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
