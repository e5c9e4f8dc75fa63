"""A process in which agents run, for `on_processes`: attempts come in over a socket, answers go out over it.

It ends when the socket is closed, so it never outlives the run that started it, however that ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from lightningrl.runtime.by_name import found
from lightningrl.runtime.event_loop import contained
from lightningrl.runtime.failures import describe, is_infrastructure_failure
from lightningrl.runtime.local import Agent, answer_of


def serve(connection: Connection) -> None:
    """Reads the agent, then attempts `(number, arguments, base_url, api_key)`; without arguments: gives that attempt up. None: the end."""
    agent: Agent = found(json.loads(connection.recv_bytes()))
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="agents").start()
    attempts: dict[int, asyncio.Task[None]] = {}
    sending = threading.Lock()

    async def attempt(number: int, arguments: dict[str, Any], base_url: str, api_key: str) -> None:
        started = time.monotonic()
        answer, error, again = None, "", False
        try:
            answer = await contained(answer_of(agent, arguments, base_url, api_key))
        except BaseException as problem:  # described here: not every exception survives being sent
            error, again = describe(problem), is_infrastructure_failure(problem)
        finally:
            attempts.pop(number, None)
        reply = number, answer, error, again, time.monotonic() - started
        try:
            data = json.dumps(reply)
        except (TypeError, ValueError) as problem:
            data = json.dumps((number, None, f"the agent's answer is not JSON: {problem}", False, 0.0))
        with sending:
            connection.send_bytes(data.encode())

    def begin(number: int, arguments: dict[str, Any] | None, base_url: str, api_key: str) -> None:
        if arguments is not None:
            attempts[number] = loop.create_task(attempt(number, arguments, base_url, api_key))
        elif number in attempts:
            attempts[number].cancel()

    while (message := json.loads(connection.recv_bytes())) is not None:
        loop.call_soon_threadsafe(begin, *message)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which then closes the socket
    try:
        serve(Connection(int(sys.argv[1])))
    except (EOFError, OSError):
        pass
    os._exit(0)  # agents that hang would hold up any other way out


if __name__ == "__main__":
    main()
