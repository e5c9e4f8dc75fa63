"""A sampler that says what it is told to, as tokens with log-probs, from a thread of its own like the real one."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from lightningrl.types import Completion, FinishReason, SamplingParams

Script = Callable[[str], str] | Sequence[str]


class ScriptedSampler:
    """`script` is the texts to say, one a call, or a function of the prompt's text.

    A text that ends in `CUT` ends by length, any other with the end-of-turn token. `gate`, if given, is waited for before a
    response is finished, so that a test decides when; tokens are streamed before that.
    """

    CUT = "\x00"

    def __init__(self, tokenizer: Any, script: Script, *, context_length: int = 4096, stream_size: int = 1) -> None:
        self.tokenizer = tokenizer
        self.context_length, self.stream_size = context_length, stream_size
        self._lock = threading.Lock()
        self.restart(script)

    def restart(self, script: Script) -> None:
        """Forgets everything and goes on with another script."""
        self.script = script
        self.submitted: list[tuple[np.ndarray, SamplingParams, tuple[int, int]]] = []
        self.futures: list[Future[Completion]] = []
        self.gates: dict[int, threading.Event] = {}  # by number of the call
        self.error: Exception | None = None
        self.spell = False  # say every word byte by byte: ids that tokenising the text again would not give
        self.busy = 0  # requests of others in the queue
        self.refuse = 0  # how many times more the queue is found full
        self._open = 0

    @property
    def queue_length(self) -> int:
        if self.refuse:
            self.refuse -= 1
            return 2**31
        return self._open + self.busy

    def hold(self, number: int) -> threading.Event:
        """The event without which call `number` is not finished."""
        return self.gates.setdefault(number, threading.Event())

    def submit(
        self,
        prompt_ids: np.ndarray,
        params: SamplingParams,
        key: tuple[int, int],
        on_tokens: Callable[[np.ndarray, np.ndarray], None] | None = None,
    ) -> Future[Completion]:
        future: Future[Completion] = Future()
        with self._lock:
            number = len(self.submitted)
            self.submitted.append((prompt_ids, params, key))
            self.futures.append(future)
            self._open += 1
        future.add_done_callback(self._closed)
        threading.Thread(target=self._work, args=(number, future, prompt_ids, params, key, on_tokens), daemon=True).start()
        return future

    def _closed(self, future: Future[Completion]) -> None:
        with self._lock:
            self._open -= 1

    def _work(
        self, number: int, future: Future[Completion], prompt_ids: np.ndarray, params: SamplingParams, key: Any, on_tokens: Any
    ) -> None:
        if self.error is not None:
            future.set_exception(self.error)
            return
        said = self.script(self.tokenizer.decode(prompt_ids)) if callable(self.script) else self.script[number]
        ids, reason, text = self._tokens(said, params)
        digest = hashlib.blake2b(repr((key, ids)).encode()).digest()
        logprobs = -np.resize(np.frombuffer(digest, np.uint8), len(ids)).astype(np.float32) / 64 - np.float32(0.01)
        array = np.asarray(ids, np.int32)
        if on_tokens is not None:
            for start in range(0, len(ids), self.stream_size):  # the real sampler streams the end-of-turn token, too
                part = slice(start, start + self.stream_size)
                on_tokens(array[part], logprobs[part])
        if number in self.gates and not self.gates[number].wait(10):
            return
        top = tuple(tuple((int((i + k) % 256 + 7), float(-k - 1)) for k in range(params.top_logprobs)) for i in ids)
        if future.set_running_or_notify_cancel():
            future.set_result(Completion(array, logprobs, reason, 7, text, top if params.top_logprobs else ()))

    def _tokens(self, said: str, params: SamplingParams) -> tuple[list[int], FinishReason, str]:
        cut = said.endswith(self.CUT)
        said = said.removesuffix(self.CUT)
        ids = self._spelled(said) if self.spell else self.tokenizer.encode(said)
        for stop in params.stop:
            for k in range(1, len(ids) + 1):
                text = self.tokenizer.decode(ids[:k])
                if stop in text:
                    return ids[:k], "stop", text[: text.find(stop)]
        if not cut:
            ids = [*ids, self.tokenizer.eos_token_id]
        if len(ids) > params.max_tokens:
            ids, cut = ids[: params.max_tokens], True
        return ids, "length" if cut else "stop", self.tokenizer.decode(ids, skip_special_tokens=True)

    def _spelled(self, said: str) -> list[int]:
        ids: list[int] = []
        for token in self.tokenizer.encode(said):
            name = self.tokenizer.convert_ids_to_tokens(token)
            added = token in self.tokenizer.added_tokens_decoder
            ids.extend([token] if added else self.tokenizer.convert_tokens_to_ids(list(name)))
        return ids
