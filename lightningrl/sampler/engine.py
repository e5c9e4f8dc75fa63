"""Continuous batching: a thread that keeps the slots full.

Each turn of its loop admits waiting requests to free slots, the lowest first, so that as few groups as possible are decoded; one run
of the compiled program then reads prompts and decodes a burst, while the answers of the turn before are handed out. Which requests
share a turn never changes what a request gets (see `steps.py`), so arrival order is free to vary.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lightningrl.model.cache import KVCache, cache_bytes, init_cache
from lightningrl.model.config import ModelConfig
from lightningrl.model.params import Params
from lightningrl.sampler.metrics import Gauges, SamplerCounts, exposition
from lightningrl.sampler.prefix_cache import PrefixCache
from lightningrl.sampler.request import OnTokens, Request
from lightningrl.sampler.slots import Slots, plan_reading
from lightningrl.sampler.steps import Plan, TurnShape, turn
from lightningrl.sharding import cache_sharding
from lightningrl.types import Completion, FinishReason, SamplingParams

SHORTEST = 256  # cache positions that decoding looks at, at least, where their number follows the load


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    slots: int = 32  # conversations decoded at once
    context_length: int = 256  # prompt and response together, at most
    group: int = 0  # slots decoded together; 0: 4 on a CPU, where a few are done soonest, elsewhere all
    chunk: int = 16  # tokens of a piece of a prompt, and of a block of the prefix cache
    prefill_rows: int = 4  # pieces read together
    prefill_runs: int = 8  # times that in a turn, at most: who decodes waits no longer for who reads
    steps: int = 8  # tokens decoded in a turn
    prefix_cache_mb: float = 64  # 0: every prompt is read anew
    deterministic: bool = True  # a request gets the same bits whatever else is running; if not, shapes follow the load

    def __post_init__(self) -> None:
        if self.context_length % self.chunk or self.context_length < 1:
            raise ValueError(f"context_length={self.context_length} must be a multiple of {self.chunk}, the tokens of a piece of a prompt")


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
        end_ids: Sequence[int] = (),  # tokens that end a response besides the tokenizer's eos
    ) -> None:
        s = settings
        self.settings, self._config, self._tokenizer = settings, config, tokenizer
        self._params, self._version = params, policy_version
        self._ends = (int(tokenizer.eos_token_id), *end_ids)
        self._new_params: tuple[Params, int] | None = None
        group = min(s.group or (4 if jax.default_backend() == "cpu" else s.slots), s.slots)
        self._shape = TurnShape(
            slots=-(-s.slots // group) * group,
            group=group,
            steps=min(s.steps, s.context_length),
            chunk=s.chunk,
            rows=s.prefill_rows,
            pieces=s.prefill_rows * s.prefill_runs,
            loads=4 * s.context_length // s.chunk,
            length=s.context_length,
        )
        self._slots = Slots(self._shape.slots, s.slots)
        dtype = params["embedding"].dtype
        self._prefixes = PrefixCache(int(s.prefix_cache_mb * 2**20 / cache_bytes(config, s.chunk, dtype.itemsize)), s.chunk)

        def zeros(slots: int, length: int) -> KVCache:
            at = None if mesh is None else cache_sharding(config, mesh, slots)
            return jax.jit(lambda: init_cache(config, slots, length, dtype), out_shardings=at)()

        self._cache = zeros(self._shape.slots, s.context_length)
        self._pool = zeros(self._prefixes.blocks + 1, s.chunk)  # the last is written where nothing is to be kept
        self._waiting: collections.deque[Request] = collections.deque()
        self._in_flight = 0
        self._wake = threading.Condition()
        self._running = False
        self._thread: threading.Thread | None = None
        self._answers: list[Callable[[], None]] = []  # what is to be told to callers, while the next turn runs
        self.counts = SamplerCounts()

    # ---- called from any thread
    @property
    def context_length(self) -> int:
        return self.settings.context_length

    @property
    def queue_length(self) -> int:
        return self._in_flight

    @property
    def busy_seconds(self) -> float:
        """Time that was not spent in waiting for work, for the time split of metrics."""
        return self.counts.busy_seconds

    def measured(self) -> tuple[SamplerCounts, Gauges]:
        """What it has counted, and how things stand."""
        return (
            self.counts,
            {
                "slots": ("Slots there are.", self.settings.slots),
                "slots_in_use": ("Slots that read or decode.", self._slots.in_use()),
                "in_flight": ("Requests accepted and not yet finished.", self._in_flight),
                "waiting": ("Requests that wait for a slot.", len(self._waiting)),
                "cache_blocks": ("Blocks of the prefix cache.", self._prefixes.blocks),
                "cache_blocks_in_use": ("Blocks that hold a prefix.", len(self._prefixes)),
                "policy_version": ("Version of the weights.", self._version),
            },
        )

    def metrics_text(self) -> str:
        """For `/metrics`."""
        return exposition({"": self.measured()})

    def submit(
        self, prompt_ids: np.ndarray, params: SamplingParams, key: tuple[int, int], on_tokens: OnTokens | None = None
    ) -> Future[Completion]:
        room = self.settings.context_length - len(prompt_ids)
        if len(prompt_ids) == 0 or room < 1:
            raise ValueError(f"a prompt of {len(prompt_ids)} tokens does not fit a context of {self.settings.context_length}")
        params = dataclasses.replace(params, max_tokens=max(1, min(params.max_tokens, room)))
        request = Request(np.asarray(prompt_ids, np.int32), params, key, on_tokens)
        with self._wake:
            if not self._running:
                raise RuntimeError("the sampler is not running")
            self._waiting.append(request)
            self._in_flight += 1
            self._wake.notify()
        return request.future

    def set_params(self, params: Params, policy_version: int) -> None:
        """Takes new weights. Requests in flight keep their cache and go on under the new weights; no prefix outlives the old ones."""
        with self._wake:
            self._new_params = params, policy_version

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
                started = time.perf_counter()
                self._turn()
                self.counts.busy_seconds += time.perf_counter() - started
            self._fail(RuntimeError("the sampler was stopped"))
        except Exception as error:  # a broken sampler must not leave its callers waiting
            with self._wake:
                self._running = False
            self._fail(error)

    def _wait_for_work(self) -> bool:
        with self._wake:
            while self._running and not self._waiting and not self._slots.in_use():
                self._wake.wait()
            return self._running

    def _fail(self, error: Exception) -> None:
        self._answer()
        with self._wake:
            left = [r for _, r in self._slots.taken()] + list(self._waiting)
            self._waiting.clear()
            self._in_flight = 0
        for request in left:
            with contextlib.suppress(InvalidStateError):  # answered, or its caller went away
                request.future.set_exception(error)

    def _turn(self) -> None:
        self._take_weights()
        self._admit()
        if not self._slots.in_use():
            return self._answer()
        reading = Plan.empty(self._shape)
        self.counts.cached_tokens += plan_reading(self._slots, self._prefixes, self._shape, reading, self._prefixes.blocks)
        active = self._slots.activate()
        shape = self._shape if self.settings.deterministic else shape_for(self._shape, active)
        groups = np.array(sorted({slot // shape.group for slot, _ in active}), np.int32)
        reading.counts[3] = len(groups)
        plan = dataclasses.replace(
            reading,
            groups=np.pad(groups, (0, shape.slots // shape.group - len(groups))),
            integers=self._slots.integers,
            floats=self._slots.floats.view(np.int32),
        )
        self._cache, self._pool, burst, top = turn(
            self._params,
            self._cache,
            self._pool,
            plan.flat(),
            config=self._config,
            shape=shape,
            end_tokens=self._ends,
        )
        self._answer()
        tokens, logprobs = np.asarray(burst)  # waits for the program
        self._collect(active, tokens, logprobs.view(np.float32), top)
        if not self._slots.in_use():
            self._answer()

    def _take_weights(self) -> None:
        with self._wake:
            if self._new_params is None:
                return
            (self._params, self._version), self._new_params = self._new_params, None
        self._prefixes.clear()
        for _, request in self._slots.taken():
            request.node = None  # what it goes on to read is of mixed weights

    def _admit(self) -> None:
        for slot, request in list(self._slots.taken()):
            if request.future.cancelled():
                self._release(slot)
        free = self._slots.free()
        with self._wake:
            wanted = collections.deque(r for r in self._waiting if not r.future.cancelled())
            gone = len(self._waiting) - len(wanted)
            self._in_flight -= gone
            self.counts.cancelled += gone
            admitted = [wanted.popleft() for _ in range(min(len(free), len(wanted)))]
            self._waiting = wanted
        for slot, request in zip(free, admitted, strict=False):
            self._slots.requests[slot] = request
            request.node = self._prefixes.root if self._prefixes.blocks else None
            self.counts.requests += 1
            self.counts.prompt_tokens += request.to_read
            self.counts.queue_seconds += time.perf_counter() - request.arrived

    def _collect(
        self, active: Sequence[tuple[int, Request]], tokens: np.ndarray, logprobs: np.ndarray, top: tuple[jax.Array, jax.Array]
    ) -> None:
        wanted = any(request.params.top_logprobs for _, request in active)
        top_ids, top_logprobs = map(np.asarray, top) if wanted else (tokens, tokens)
        counts = (tokens >= 0).sum(axis=1).tolist()
        for slot, request in active:
            count = counts[slot]
            new = request.take(tokens[slot, :count], logprobs[slot, :count], top_ids[slot], top_logprobs[slot], self._text)
            self.counts.sampled_tokens += new
            if request.on_tokens is not None:
                self._answers.append(request.tell(new))
            self._slots.advance(slot, tokens[slot, :count])
            reason: FinishReason | None = None
            if request.stopped_text is not None or request.tokens[-1] in self._ends:
                reason = "stop"
            elif len(request.tokens) >= request.params.max_tokens:
                reason = "length"
            if reason is not None:
                self._release(slot)
                self._answers.append(request.complete(reason, self._version, self._text))

    def _answer(self) -> None:
        answers, self._answers = self._answers, []
        for answer in answers:
            answer()

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _release(self, slot: int) -> None:
        request = self._slots.requests[slot]
        assert request is not None
        self._slots.release(slot)
        if request.future.cancelled():
            self.counts.cancelled += 1
        else:
            self.counts.completed += 1
        with self._wake:
            self._in_flight -= 1


def shape_for(shape: TurnShape, active: Sequence[tuple[int, Request]]) -> TurnShape:
    """A turn's shape that follows the load: one slot alone is decoded alone, and no more of the cache is looked at than is filled,
    rounded up to a power of two. A request's last bits then depend on what else is running.
    """
    needed = max((len(r.prompt) + len(r.tokens) for _, r in active), default=0) + shape.steps
    length = SHORTEST
    while length < min(needed, shape.length):
        length *= 2
    return dataclasses.replace(shape, group=1 if len(active) == 1 else shape.group, length=min(length, shape.length))
