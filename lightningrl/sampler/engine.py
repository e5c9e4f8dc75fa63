"""Continuous batching: a thread that keeps the slots full.

Each turn of its loop admits waiting requests to free slots, the lowest first, so that as few groups as possible run; then every
group either reads prompts or decodes a burst. A group reads while a prompt is left to be read. Which requests share a group never
changes what a request gets (see `steps.py`), so arrival order is free to vary.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from lightningrl.model.cache import cache_bytes, init_cache
from lightningrl.model.config import ModelConfig
from lightningrl.model.params import Params
from lightningrl.sampler.metrics import SamplerCounts, exposition
from lightningrl.sampler.prefix_cache import PrefixCache
from lightningrl.sampler.request import OnTokens, Request
from lightningrl.sampler.steps import FLOATS, INTEGERS, Burst, SlotState, decode, load, prefill
from lightningrl.types import Completion, FinishReason, SamplingParams

LOADS = 64  # blocks taken from the pool by one run of `load`, at most


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    slots: int = 32  # conversations decoded at once
    context_length: int = 256  # prompt and response together, at most
    group: int = 8  # slots that a compiled program works on; on a GPU, as many as there are slots
    prefill_rows: int = 8  # pieces of prompts read at once
    chunk: int = 16  # tokens of a piece, and of a block of the prefix cache
    steps: int = 4  # tokens decoded per return to the host
    prefix_cache_mb: int = 64  # 0: every prompt is read anew
    deterministic: bool = True  # a request gets the same bits whatever else is running; if not, shapes follow the load


class Group:
    """The slots that one run of a program works on."""

    def __init__(self, config: ModelConfig, slots: int, usable: int, length: int) -> None:
        self.cache = init_cache(config, slots, length)
        self.integers, self.floats = np.zeros((INTEGERS, slots), np.int32), np.ones((FLOATS, slots), np.float32)
        self.state = SlotState.of(self.integers, self.floats)  # views
        self.requests: list[Request | None] = [None] * usable

    def unread(self) -> list[tuple[int, Request]]:
        return [(slot, r) for slot, r in enumerate(self.requests) if r is not None and r.read < r.to_read]

    def active(self) -> list[tuple[int, Request]]:
        return [(slot, r) for slot, r in enumerate(self.requests) if r is not None and r.active]

    def activate(self) -> None:
        """Lets the slots decode whose prompts have been read."""
        st = self.state
        for slot, request in enumerate(self.requests):
            if request is None or request.active or request.read < request.to_read:
                continue
            p, request.active = request.params, True
            st.token[slot], st.position[slot], st.generated[slot] = request.prompt[-1], request.to_read, 0
            st.max_tokens[slot], st.top_k[slot], st.alternatives[slot] = p.max_tokens, p.top_k, p.top_logprobs > 0
            st.key[:, slot] = np.array(request.key, np.uint32).view(np.int32)
            st.temperature[slot], st.top_p[slot] = p.temperature, p.top_p

    def release(self, slot: int) -> None:
        self.requests[slot] = None
        self.state.max_tokens[slot] = self.state.generated[slot] = 0
        self.state.alternatives[slot], self.state.top_p[slot], self.state.top_k[slot] = 0, 1.0, 0


class PolicySampler:
    """Implements `types.Sampler` over the policy's parameters. Use as a context manager, or call `start` and `stop`."""

    def __init__(self, params: Params, config: ModelConfig, tokenizer: Any, settings: SamplerSettings, policy_version: int = 0) -> None:
        s = settings
        if s.context_length % s.chunk:
            raise ValueError(f"context_length={s.context_length} must be a multiple of chunk={s.chunk}")
        self.settings, self._config, self._tokenizer = settings, config, tokenizer
        self._params, self._version = params, policy_version
        self._new_params: tuple[Params, int] | None = None
        group = min(s.group, s.slots)
        self._groups = [Group(config, group, min(group, s.slots - at), s.context_length) for at in range(0, s.slots, group)]
        blocks = s.prefix_cache_mb * 2**20 // cache_bytes(config, s.chunk)
        self._prefixes = PrefixCache(blocks, s.chunk)
        self._pool = init_cache(config, max(blocks, 1), s.chunk)
        self._waiting: collections.deque[Request] = collections.deque()
        self._in_flight = 0
        self._wake = threading.Condition()
        self._running = False
        self._thread: threading.Thread | None = None
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

    @property
    def slots_in_use(self) -> int:
        return sum(r is not None for group in self._groups for r in group.requests)

    def metrics_text(self) -> str:
        """For `/metrics`."""
        return exposition(
            self.counts,
            {
                "slots": ("Slots there are.", self.settings.slots),
                "slots_in_use": ("Slots that read or decode.", self.slots_in_use),
                "in_flight": ("Requests accepted and not yet finished.", self._in_flight),
                "waiting": ("Requests that wait for a slot.", len(self._waiting)),
                "cache_blocks": ("Blocks of the prefix cache.", self._prefixes.blocks),
                "cache_blocks_in_use": ("Blocks that hold a prefix.", len(self._prefixes)),
                "policy_version": ("Version of the weights.", self._version),
            },
        )

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
            while self._running and not self._waiting and not self.slots_in_use:
                self._wake.wait()
            return self._running

    def _fail(self, error: Exception) -> None:
        with self._wake:
            left = [r for group in self._groups for r in group.requests if r is not None] + list(self._waiting)
            self._waiting.clear()
        for request in left:
            if not request.future.done():
                request.future.set_exception(error)

    def _turn(self) -> None:
        self._take_weights()
        self._admit()
        self._prefixes.next_turn()
        bursts = []
        for group in self._groups:
            if unread := group.unread():
                self._take_known(group, unread)
                self._read(group, unread)
            if not group.unread():
                group.activate()
                if group.active():
                    bursts.append((group, self._decode(group)))
        for group, burst in bursts:  # all are under way before the first is waited for
            self._collect(group, burst)

    def _take_weights(self) -> None:
        with self._wake:
            if self._new_params is None:
                return
            (self._params, self._version), self._new_params = self._new_params, None
        self._prefixes.clear()
        for group in self._groups:
            for request in group.requests:
                if request is not None:
                    request.node = None  # what it goes on to read is of mixed weights

    def _admit(self) -> None:
        for group in self._groups:
            for slot, request in enumerate(group.requests):
                if request is not None and request.future.cancelled():
                    self._release(group, slot)
        free = [(group, slot) for group in self._groups for slot, r in enumerate(group.requests) if r is None]
        with self._wake:
            while self._waiting and (free or self._waiting[0].future.cancelled()):
                request = self._waiting.popleft()
                if request.future.cancelled():
                    self._in_flight -= 1
                    self.counts.cancelled += 1
                    continue
                group, slot = free.pop(0)
                group.requests[slot] = request
                request.node = self._prefixes.root if self._prefixes.blocks else None
                self.counts.requests += 1
                self.counts.prompt_tokens += request.to_read
                self.counts.queue_seconds += time.perf_counter() - request.arrived

    def _take_known(self, group: Group, unread: Sequence[tuple[int, Request]]) -> None:
        """Copies what the prefix cache knows of these prompts into their slots."""
        copies = []
        for slot, request in unread:
            while request.node is not None and request.read < request.to_read:
                piece = request.piece(self.settings.chunk)
                found = self._prefixes.find(request.node, piece)
                if found is None:
                    break
                copies.append((found.block, 0, slot, request.read))
                request.node = found
                request.read += len(piece)
                self.counts.cached_tokens += len(piece)
            if request.node is not None:
                self._prefixes.touch(request.node)
        for at in range(0, len(copies), LOADS):
            some = np.array(copies[at : at + LOADS], np.int32)
            padded = np.pad(some, ((0, LOADS - len(some)), (0, 0)))
            group.cache = load(group.cache, self._pool, padded, np.int32(len(some)), width=self.settings.chunk)

    def _read(self, group: Group, unread: Sequence[tuple[int, Request]]) -> None:
        """Reads up to `prefill_rows` pieces, several of one prompt where there is room. What another prompt reads in the same run
        is waited for: it will be known in the next turn."""
        s, no_block = self.settings, max(self._prefixes.blocks, 1)
        kept: list[list[int]] = []
        others: list[list[int]] = []
        for slot, request in unread:
            while request.read < request.to_read and len(kept) + len(others) < s.prefill_rows:
                piece, block = request.piece(s.chunk), no_block
                if request.node is not None:
                    if self._prefixes.find(request.node, piece) is not None:
                        break
                    request.node = self._prefixes.insert(request.node, piece)
                    block = no_block if request.node is None else request.node.block
                row = [slot, request.read, block, *piece.tolist(), *[0] * (s.chunk - len(piece))]
                (others if block == no_block else kept).append(row)
                request.read += len(piece)
            if request.node is not None:
                self._prefixes.touch(request.node)
        if kept or others:
            empty = [len(group.requests) + s.group, 0, no_block, *[0] * s.chunk]
            rows = kept + others + [empty] * (s.prefill_rows - len(kept) - len(others))
            group.cache, self._pool = prefill(self._params, group.cache, self._pool, np.array(rows, np.int32), config=self._config)

    def _decode(self, group: Group) -> Burst:
        s = self.settings
        group.cache, burst = decode(
            self._params,
            group.cache,
            group.integers.copy(),
            group.floats.copy(),
            config=self._config,
            steps=s.steps,
            end_token=self._tokenizer.eos_token_id,
        )
        return burst

    def _collect(self, group: Group, burst: Burst) -> None:
        token, logprob = np.asarray(burst.token), np.asarray(burst.logprob)
        active, st = group.active(), group.state
        wanted = any(request.params.top_logprobs for _, request in active)
        top_id, top_logprob = (np.asarray(burst.top_id), np.asarray(burst.top_logprob)) if wanted else (token, logprob)
        counts = (token >= 0).sum(axis=0).tolist()
        for slot, request in active:
            count = counts[slot]
            before = len(request.tokens)
            request.take(
                token[:count, slot], logprob[:count, slot], lambda i, slot=slot: (top_id[i, slot], top_logprob[i, slot]), self._text
            )
            self.counts.sampled_tokens += len(request.tokens) - before
            last = int(token[count - 1, slot])
            st.token[slot] = last
            st.position[slot] += count
            st.generated[slot] += count
            reason: FinishReason | None = None
            if request.stopped_text is not None or last == self._tokenizer.eos_token_id:
                reason = "stop"
            elif len(request.tokens) >= request.params.max_tokens:
                reason = "length"
            if reason is not None:
                self._release(group, slot)
                if request.future.set_running_or_notify_cancel():
                    request.future.set_result(request.complete(reason, self._version, self._text))

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _release(self, group: Group, slot: int) -> None:
        request = group.requests[slot]
        assert request is not None
        group.release(slot)
        if request.future.cancelled():
            self.counts.cancelled += 1
        else:
            self.counts.completed += 1
        with self._wake:
            self._in_flight -= 1
