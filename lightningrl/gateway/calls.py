"""One LLM call: from its arrival to its tokens, with everybody who waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Literal

import numpy as np

from lightningrl.gateway.errors import ApiError
from lightningrl.types import Completion, Sampler, SamplingParams

State = Literal["running", "done", "failed"]


def sampling_key(
    seed: int, rollout_id: str, prompt_ids: np.ndarray, occurrence: int, choice: int, client_seed: int | None
) -> tuple[int, int]:
    """Two uint32 words, all the randomness of one response: the first eight bytes of BLAKE2b (RFC 7693) over the arguments.

    `occurrence` counts earlier calls of the rollout with the same prompt; calls with different prompts may arrive in any order.
    """
    header = repr((seed, rollout_id, occurrence, choice, client_seed)).encode()
    digest = hashlib.blake2b(len(header).to_bytes(4, "little") + header + prompt_ids.tobytes()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


@dataclasses.dataclass
class Choice:
    """One response of a call; `seen` is its tokens so far."""

    key: tuple[int, int]
    future: Future[Completion] | None = None
    seen: list[int] = dataclasses.field(default_factory=list)
    completion: Completion | None = None

    @property
    def token_ids(self) -> np.ndarray:
        assert self.completion is not None
        return np.asarray(self.completion.token_ids, dtype=np.int32)


@dataclasses.dataclass(eq=False)
class Call:
    """A request that the sampler works on or has answered. Used on the server's event loop only.

    `on_end` is called once, when the call is done or has failed, before anybody who waits hears of it.
    """

    arrival: int
    fingerprint: bytes
    attempt: int
    role: str
    sent: tuple[Mapping[str, Any], ...]
    prompt_ids: np.ndarray
    extends: tuple[Call, int] | None
    params: SamplingParams
    created: int
    choices: list[Choice]
    on_end: Callable[[Call], None] | None  # until it has been called: a rollout's calls are kept, and with them all that they hold
    state: State = "running"
    error: ApiError | None = None
    waiters: int = 0
    changed: asyncio.Event | None = None  # while somebody waits for it

    @property
    def id(self) -> str:
        return "".join(f"{word:08x}" for word in self.choices[0].key)

    def submit(self, sampler: Sampler, stream: bool) -> None:
        """Hands every choice to the sampler; the answers come back to this event loop."""
        loop = asyncio.get_running_loop()

        def later(function: Callable[..., None], *arguments: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the server has stopped: nobody waits any more
                loop.call_soon_threadsafe(function, *arguments)

        for choice in self.choices:
            on_tokens = None
            if stream:

                def on_tokens(ids: np.ndarray, logprobs: np.ndarray, choice: Choice = choice) -> None:
                    later(self._push, choice, np.asarray(ids).tolist())

            choice.future = sampler.submit(self.prompt_ids, self.params, choice.key, on_tokens)
        for choice in self.choices:
            assert choice.future is not None
            choice.future.add_done_callback(functools.partial(later, self._finish, choice))

    def fail(self, error: ApiError) -> None:
        """Ends a running call: its slots are freed, nothing is recorded, whoever waits gets `error`."""
        if self.state != "running":
            return
        self.error = error
        for choice in self.choices:
            if choice.future is not None:
                choice.future.cancel()
        self._end("failed")

    async def wait(self) -> None:
        """Until something new has happened; raises the call's error."""
        if self.state == "running":
            self.changed = self.changed or asyncio.Event()
            await self.changed.wait()
        if self.error is not None:
            raise self.error

    async def finished(self) -> None:
        while self.state == "running":
            await self.wait()
        if self.error is not None:
            raise self.error

    def _push(self, choice: Choice, ids: list[int]) -> None:
        if self.state == "running" and choice.completion is None:
            choice.seen.extend(ids)
            self.announce()

    def _finish(self, choice: Choice, future: Future[Completion]) -> None:
        if self.state != "running":
            return
        if future.cancelled():
            return self.fail(ApiError(503, "The sampler dropped this request."))
        problem = future.exception()
        if problem is not None:
            return self.fail(ApiError(500, f"The sampler failed: {type(problem).__name__}: {problem}"))
        completion = future.result()
        if completion.finish_reason == "cancelled":
            return self.fail(ApiError(503, "The sampler dropped this request."))
        choice.completion, choice.future = completion, None
        choice.seen = np.asarray(completion.token_ids).tolist()
        if all(other.completion is not None for other in self.choices):
            self._end("done")

    def _end(self, state: State) -> None:
        self.state = state
        on_end, self.on_end = self.on_end, None
        assert on_end is not None
        try:
            on_end(self)
        except Exception as problem:  # whoever waits must hear of it
            self.state, self.error = "failed", ApiError(500, f"The gateway failed: {type(problem).__name__}: {problem}")
            logging.getLogger(__name__).exception("a finished call could not be recorded")
        self.announce()

    def announce(self) -> None:
        """Wakes everybody who waits."""
        if self.changed is not None:
            self.changed.set()
            self.changed = None
