"""Where agents run: one event loop for the whole process, and a thread for each sync call.

One loop, because clients that frameworks cache (langchain-openai keeps one per base URL) hold connections that belong to
the loop that opened them: under a new loop for every batch they would fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


class AgentExit(Exception):
    """Stands for a SystemExit or the like that an agent raised, which would take the event loop with it."""


class OutOfTime(Exception):
    """The time limit, as opposed to any TimeoutError of an agent's own."""


class Interrupt(Exception):
    """A KeyboardInterrupt on its way to the caller's thread."""


@functools.cache
def agent_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    # Frameworks hand short blocking work to the default executor, whose 6 threads on 2 cores would be few.
    loop.set_default_executor(ThreadPoolExecutor(64, thread_name_prefix="agent-worker"))
    threading.Thread(target=_run_forever, args=(loop,), name="agents", daemon=True).start()
    return loop


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    while True:
        # asyncio re-raises a task's SystemExit out of the loop after it has told whoever awaits the task. An agent's
        # framework may run its code in tasks that `contained` cannot wrap.
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()
            return


def run_on_agent_loop(work: Coroutine[Any, Any, Result]) -> Result:
    """Runs `work` on the agents' loop and waits for it; Ctrl-C in the waiting thread cancels it and leaves."""
    ended = threading.Event()

    async def work_to_its_end() -> Result:
        try:
            return await work
        finally:
            ended.set()

    future = asyncio.run_coroutine_threadsafe(work_to_its_end(), agent_loop())
    try:
        return future.result()
    except Interrupt:
        raise KeyboardInterrupt from None
    except BaseException:
        future.cancel()
        ended.wait(_GRACE_S)  # runs give back their keys, which must happen before the caller closes the gateway
        raise


async def contained(work: Coroutine[Any, Any, Result]) -> Result:
    """Awaits foreign code and turns what would stop the event loop into ordinary exceptions."""
    try:
        return await work
    except (Exception, asyncio.CancelledError):
        raise
    except KeyboardInterrupt:
        raise Interrupt from None
    except BaseException as exception:
        raise _exit(exception) from exception


async def in_thread(function: Callable[..., Result], *args: Any) -> Result:
    """Runs a sync function in a thread of its own.

    Not in a pool: a call that never ends would hold its place for good, and the interpreter waits for a pool's threads when it
    exits. A daemon thread that is abandoned costs only itself.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, exception: BaseException | None) -> None:
        if done.cancelled():
            return
        if exception is None:
            done.set_result(result)  # type: ignore[arg-type]
        else:
            done.set_exception(exception)

    def work() -> None:
        result: Result | None = None
        exception: Exception | None = None
        try:
            result = function(*args)
        except KeyboardInterrupt:
            exception = Interrupt()
        except BaseException as problem:
            exception = problem if isinstance(problem, Exception) and not isinstance(problem, StopIteration) else _exit(problem)
        with contextlib.suppress(RuntimeError):  # the loop is gone: the interpreter is exiting
            loop.call_soon_threadsafe(settle, result, exception)

    threading.Thread(target=work, name="agent", daemon=True).start()
    return await done


async def within(work: Coroutine[Any, Any, Result], seconds: float) -> Result:
    """The result of `work`; raises `OutOfTime` after `seconds`, even if `work` refuses to be cancelled."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=max(seconds, 0.0))
    finally:
        if not task.done():
            task.cancel()
            task.add_done_callback(_forget)
    if not task.done():
        await asyncio.wait({task}, timeout=_GRACE_S)
        raise OutOfTime
    if task.cancelled():
        raise AgentExit("the agent cancelled itself: asyncio.CancelledError came out of it")
    return task.result()


def _exit(exception: BaseException) -> AgentExit:
    stopped = AgentExit(f"{type(exception).__name__}({exception}) was raised, which would end the program")
    stopped.__cause__ = exception
    return stopped


_GRACE_S = 1.0  # for a cancelled agent to close its connections


def _forget(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()
