"""Runs attempts at rollouts in processes beside this one, so that agents' Python and the gateway's don't wait for each other.

Only the agent runs there. Keys, calls, rewards, retries and the store stay with the runner, which sees a process that died as what it
is: an infrastructure failure of the attempts that ran in it, made again under new keys, in a new process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any, Self

from lightningrl.errors import UserError
from lightningrl.runtime.by_name import named
from lightningrl.runtime.event_loop import within
from lightningrl.runtime.failures import AgentFailed
from lightningrl.runtime.local import Agent

GOODBYE_S = 2.0  # for a process to end by itself


class OnProcesses:
    """A `CallAgent` on processes of this machine. Use as a context manager, which starts and ends them.

    The agent is sent by name: see `by_name.named`; what it answers must be JSON. Async agents of a process share its event loop, sync
    agents run in a thread each.

    Raises:
        UserError: on entry, for an agent that cannot be sent.
    """

    def __init__(self, agent: Agent, count: int = 1) -> None:
        self._agent, self._count = agent, count
        self._processes: list[_Process] = []

    def __enter__(self) -> Self:
        self._sent = as_sent(self._agent)
        self._processes = [_Process(self._sent) for _ in range(self._count)]
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.close()

    async def __call__(self, arguments: dict[str, Any], base_url: str, api_key: str, seconds: float) -> tuple[Any, float]:
        least = min(range(self._count), key=lambda i: self._processes[i].busy)
        if self._processes[least].over:
            self._processes[least].close()
            self._processes[least] = _Process(self._sent)
        return await self._processes[least].call(arguments, base_url, api_key, seconds)


def as_sent(agent: Agent) -> bytes:
    """What another process finds the agent by. Raises UserError for one that it could not find."""
    try:
        return json.dumps(named(agent)).encode()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the agent cannot be sent to other processes ({error}): make it a function of a module, or give --runner=local"
        ) from error


class _Process:
    def __init__(self, agent: bytes) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "lightningrl.runtime.agent_process", str(theirs.fileno())]
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=os.environ | {"PYTHONPATH": path}, stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._sending, self._numbers = threading.Lock(), itertools.count()
        self._waiting: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Future[Any]]] = {}
        self.over = False
        threading.Thread(target=self._read, name="agent process", daemon=True).start()
        with contextlib.suppress(OSError):  # it died at once: the first call says so
            self._connection.send_bytes(agent)

    @property
    def busy(self) -> int:
        return len(self._waiting)

    async def call(self, arguments: dict[str, Any], base_url: str, api_key: str, seconds: float) -> tuple[Any, float]:
        number, loop = next(self._numbers), asyncio.get_running_loop()
        reply: asyncio.Future[Any] = loop.create_future()
        self._waiting[number] = loop, reply
        try:
            self._send((number, arguments, base_url, api_key))
            answer, error, again, spent = await within(_of(reply), seconds)
        except BaseException:
            with contextlib.suppress(AgentFailed):
                self._send((number, None, "", ""))  # whatever it is doing, nobody waits for it any more
            raise
        finally:
            self._waiting.pop(number, None)
        if error:
            raise AgentFailed(error, infrastructure=again)
        return answer, spent

    def close(self) -> None:
        with contextlib.suppress(AgentFailed):
            self._send(None)
        try:
            self._process.wait(GOODBYE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._connection.close()

    def _send(self, message: Any) -> None:
        try:
            data = json.dumps(message).encode()
        except (TypeError, ValueError) as error:
            raise AgentFailed(f"the task cannot be sent to another process: {error}", infrastructure=False) from error
        try:
            with self._sending:
                self._connection.send_bytes(data)
        except OSError as error:
            raise AgentFailed(f"the agents' process is gone: {error}", infrastructure=True) from error

    def _read(self) -> None:
        """Hands out replies; in a thread, since one connection serves every event loop that the runner has."""
        try:
            while True:
                number, *reply = json.loads(self._connection.recv_bytes())
                self._settle(number, tuple(reply))
        except (EOFError, OSError):
            self.over = True
            code = self._process.wait()
            for number in list(self._waiting):
                self._settle(number, (None, f"the agents' process ended with status {code}", True, 0.0))

    def _settle(self, number: int, reply: tuple[Any, ...]) -> None:
        loop, future = self._waiting.get(number, (None, None))
        if loop is not None and future is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(lambda: None if future.done() else future.set_result(reply))


async def _of(future: asyncio.Future[Any]) -> Any:
    """As a coroutine: a bare future is cancelled at once, which `within` would take for the agent's doing."""
    return await future
