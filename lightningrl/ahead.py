"""Sampling beside training: jobs for the agents and their sampler, done in order, one at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class SamplingJobs:
    """Does what it is handed in that order: at once, or in a thread of its own while the caller goes on.

    Use as a context manager. A block that is left by an exception does not wait: jobs that were not begun are dropped, and the
    one that runs ends by itself, when the gateway that it needs is closed.
    """

    def __init__(self, *, beside: bool) -> None:
        self._waiting: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self.version: int | None = None  # of the weights that the sampler was last given, for the jobs to note
        self._thread = threading.Thread(target=self._work, name="sampling", daemon=True) if beside else None

    def submit(self, job: Callable[[], Result]) -> Callable[[], Result]:
        """Hands in a job. What is returned waits for its result, and raises what the job raised."""
        if self._thread is None:
            result = job()
            return lambda: result
        future: Future[Result] = Future()
        self._waiting.put((job, future))
        return future.result

    def __enter__(self) -> SamplingJobs:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is None:
            return
        if kind is not None:
            while not self._waiting.empty():
                dropped = self._waiting.get()
                if dropped is not None:
                    dropped[1].set_exception(CancelledError())
        self._waiting.put(None)
        if kind is None:
            self._thread.join()

    def _work(self) -> None:
        while (handed := self._waiting.get()) is not None:
            job, future = handed
            try:
                future.set_result(job())
            except BaseException as error:  # whoever waits for the result gets it
                future.set_exception(error)
