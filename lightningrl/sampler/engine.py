"""Continuous batching: a thread that keeps the slots full.

Each turn of its loop admits waiting requests to free slots, prefills one chunk of up to `prefill_rows` prompts, and
decodes a burst when no prompt is left to read or the active slots have waited long enough. Which requests share a batch
never changes what a request gets (see `steps.py`), so arrival order is free to vary.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lightningrl.model.cache import init_cache
from lightningrl.model.config import ModelConfig
from lightningrl.model.params import Params
from lightningrl.sampler.steps import SlotState, decode, prefill
from lightningrl.sharding import cache_sharding
from lightningrl.types import Completion, FinishReason, SamplingParams

OnTokens = Callable[[np.ndarray, np.ndarray], None]


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    slots: int = 32  # conversations decoded at once
    context_length: int = 256  # prompt and response together, at most
    prefill_rows: int = 8  # prompts read at once
    chunk: int = 64  # prompt tokens read at once, per prompt
    steps: int = 4  # tokens decoded per return to the host


@dataclasses.dataclass
class _Request:
    prompt: np.ndarray
    params: SamplingParams
    key: tuple[int, int]
    on_tokens: OnTokens | None
    future: Future[Completion]
    read: int = 0  # prompt tokens in the cache
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = dataclasses.field(default_factory=list)

    @property
    def to_read(self) -> int:
        return len(self.prompt) - 1


class PolicySampler:
    """Implements `types.Sampler` over the policy's parameters. Use as a context manager, or call `start` and `stop`."""

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        tokenizer: Any,
        settings: SamplerSettings,
        policy_version: int = 0,
        mesh: Mesh | None = None,  # what the cache is split over; None: one device
    ) -> None:
        if settings.context_length % settings.chunk:
            raise ValueError(f"context_length={settings.context_length} must be a multiple of chunk={settings.chunk}")
        self.settings, self._config, self._tokenizer = settings, config, tokenizer
        self._params, self._version = params, policy_version
        dtype = params["embedding"].dtype
        cache_at = None if mesh is None else cache_sharding(config, mesh, settings.slots)
        self._cache = jax.jit(lambda: init_cache(config, settings.slots, settings.context_length, dtype), out_shardings=cache_at)()
        self._slots: list[_Request | None] = [None] * settings.slots
        self._state = _idle_state(settings.slots)  # host copy, NumPy
        self._waiting: collections.deque[_Request] = collections.deque()
        self._in_flight = 0
        self._wake = threading.Condition()
        self._running = False
        self._thread: threading.Thread | None = None
        self.busy_seconds = 0.0  # time inside compiled programs, for the time split of metrics

    # ---- called from any thread
    @property
    def context_length(self) -> int:
        return self.settings.context_length

    @property
    def queue_length(self) -> int:
        return self._in_flight

    def submit(
        self, prompt_ids: np.ndarray, params: SamplingParams, key: tuple[int, int], on_tokens: OnTokens | None = None
    ) -> Future[Completion]:
        room = self.settings.context_length - len(prompt_ids)
        if len(prompt_ids) == 0 or room < 1:
            raise ValueError(f"a prompt of {len(prompt_ids)} tokens does not fit a context of {self.settings.context_length}")
        params = dataclasses.replace(params, max_tokens=max(1, min(params.max_tokens, room)))
        request = _Request(np.asarray(prompt_ids, np.int32), params, key, on_tokens, Future())
        with self._wake:
            if not self._running:
                raise RuntimeError("the sampler is not running")
            self._waiting.append(request)
            self._in_flight += 1
            self._wake.notify()
        return request.future

    def set_params(self, params: Params, policy_version: int) -> None:
        """Takes new weights. Requests in flight keep their cache and go on under the new weights."""
        with self._wake:
            self._params, self._version = params, policy_version

    def start(self) -> PolicySampler:
        self._running = True
        self._thread = threading.Thread(target=self._loop, name="sampler", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        with self._wake:
            self._running = False
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> PolicySampler:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---- the sampler's thread
    def _loop(self) -> None:
        try:
            while self._wait_for_work():
                self._admit()
                started = time.perf_counter()
                self._prefill()
                if not any(r is not None and r.read < r.to_read for r in self._slots):
                    self._decode()
                self.busy_seconds += time.perf_counter() - started
            self._fail(RuntimeError("the sampler was stopped"))
        except Exception as error:  # a broken sampler must not leave its callers waiting
            with self._wake:
                self._running = False
            self._fail(error)

    def _wait_for_work(self) -> bool:
        with self._wake:
            while self._running and not self._waiting and all(r is None for r in self._slots):
                self._wake.wait()
            return self._running

    def _fail(self, error: Exception) -> None:
        with self._wake:
            left = [r for r in self._slots if r is not None] + list(self._waiting)
            self._waiting.clear()
        for request in left:
            if not request.future.done():
                request.future.set_exception(error)

    def _admit(self) -> None:
        for slot, request in enumerate(self._slots):
            if request is not None and request.future.cancelled():
                self._release(slot)
        free = [i for i, r in enumerate(self._slots) if r is None]
        with self._wake:
            while free and self._waiting:
                request = self._waiting.popleft()
                if request.future.cancelled():
                    self._in_flight -= 1
                    continue
                self._slots[free.pop(0)] = request

    def _prefill(self) -> None:
        s, rows = self.settings, self.settings.prefill_rows
        pending = [i for i, r in enumerate(self._slots) if r is not None and r.read < r.to_read][:rows]
        if pending:
            slots = np.full(rows, s.slots, np.int32)
            start = np.zeros(rows, np.int32)
            tokens = np.zeros((rows, s.chunk), np.int32)
            for row, slot in enumerate(pending):
                request = self._slots[slot]
                assert request is not None
                piece = request.prompt[request.read : min(request.read + s.chunk, request.to_read)]
                slots[row], start[row], tokens[row, : len(piece)] = slot, request.read, piece
                request.read += len(piece)
            self._cache = prefill(self._params, self._cache, slots, tokens, start, config=self._config)
        for slot, request in enumerate(self._slots):
            if request is not None and request.read == request.to_read and self._state.max_tokens[slot] == 0:
                self._activate(slot, request)

    def _activate(self, slot: int, request: _Request) -> None:
        st, p = self._state, request.params
        st.token[slot], st.position[slot], st.generated[slot] = request.prompt[-1], request.to_read, 0
        st.max_tokens[slot], st.active[slot], st.key[slot] = p.max_tokens, True, request.key
        st.temperature[slot], st.top_p[slot], st.top_k[slot] = p.temperature, p.top_p, p.top_k
        st.alternatives[slot] = p.top_logprobs > 0

    def _decode(self) -> None:
        if not self._state.active.any():
            return
        was_active = self._state.active.copy()
        self._cache, state, burst = decode(
            self._params,
            self._cache,
            jax.tree.map(jnp.asarray, self._state),
            config=self._config,
            steps=self.settings.steps,
            end_token=self._tokenizer.eos_token_id,
        )
        state, burst = jax.device_get((state, burst))
        self._state = jax.tree.map(np.array, state)
        for slot in np.flatnonzero(was_active).tolist():
            request = self._slots[slot]
            assert request is not None
            count = int((burst.token[:, slot] >= 0).sum())
            self._collect(slot, request, burst, count)

    def _collect(self, slot: int, request: _Request, burst: Any, count: int) -> None:
        ids, logprobs = burst.token[:count, slot], burst.logprob[:count, slot]
        reason: FinishReason | None = None
        stopped_text = None
        if request.params.stop:
            for i in range(count):
                text = self._text([*request.tokens, *ids[: i + 1].tolist()])
                found = [at for stop in request.params.stop if (at := text.find(stop)) >= 0]
                if found:
                    count, stopped_text, reason = i + 1, text[: min(found)], "stop"
                    ids, logprobs = ids[:count], logprobs[:count]
                    break
        request.tokens.extend(ids.tolist())
        request.logprobs.extend(logprobs.tolist())
        if request.params.top_logprobs:
            n = request.params.top_logprobs
            for i in range(count):
                pairs = zip(burst.top_id[i, slot, :n].tolist(), burst.top_logprob[i, slot, :n].tolist(), strict=True)
                request.top.append(tuple(pairs))
        if request.on_tokens is not None and not request.future.cancelled():
            request.on_tokens(ids, logprobs)
        if reason is None and not self._state.active[slot]:
            reason = "stop" if request.tokens[-1] == self._tokenizer.eos_token_id else "length"
        if reason is None:
            return
        completion = Completion(
            token_ids=np.array(request.tokens, np.int32),
            logprobs=np.array(request.logprobs, np.float32),
            finish_reason=reason,
            policy_version=self._version,
            text=self._text(request.tokens) if stopped_text is None else stopped_text,
            top=tuple(request.top),
        )
        self._release(slot)
        if request.future.set_running_or_notify_cancel():
            request.future.set_result(completion)

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _release(self, slot: int) -> None:
        self._slots[slot] = None
        self._state.active[slot] = False
        self._state.max_tokens[slot] = 0
        with self._wake:
            self._in_flight -= 1


def _idle_state(slots: int) -> Any:
    return SlotState(
        token=np.zeros(slots, np.int32),
        position=np.zeros(slots, np.int32),
        generated=np.zeros(slots, np.int32),
        max_tokens=np.zeros(slots, np.int32),  # 0: the slot is not decoding
        active=np.zeros(slots, bool),
        key=np.zeros((slots, 2), np.uint32),
        temperature=np.ones(slots, np.float32),
        top_p=np.ones(slots, np.float32),
        top_k=np.zeros(slots, np.int32),
        alternatives=np.zeros(slots, bool),
    )
