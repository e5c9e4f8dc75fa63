"""One response from its prompt to its completion, as the sampler's thread keeps it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from lightningrl.sampler.prefix_cache import Node
from lightningrl.types import Completion, FinishReason, SamplingParams

OnTokens = Callable[[np.ndarray, np.ndarray], None]
Decode = Callable[[Sequence[int]], str]


@dataclasses.dataclass(eq=False)
class Request:
    """A response that is wanted. All but the prompt's last token is read before decoding begins."""

    prompt: np.ndarray
    params: SamplingParams
    key: tuple[int, int]
    on_tokens: OnTokens | None
    future: Future[Completion] = dataclasses.field(default_factory=Future)
    arrived: float = dataclasses.field(default_factory=time.perf_counter)
    read: int = 0  # prompt tokens in the cache
    node: Node | None = None  # where the prefix cache stands after what has been read; None: it has no part in the cache (any more)
    active: bool = False  # decoding
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = dataclasses.field(default_factory=list)
    stopped_text: str | None = None  # the text before a stop string

    @property
    def to_read(self) -> int:
        return len(self.prompt) - 1

    def piece(self, chunk: int) -> np.ndarray:
        """What is to be read next: at most to the next multiple of `chunk`."""
        return self.prompt[self.read : min(self.read + chunk, self.to_read)]

    def take(self, ids: np.ndarray, logprobs: np.ndarray, top_ids: np.ndarray, top_logprobs: np.ndarray, decode: Decode) -> int:
        """New tokens, up to the one that completes a stop string; returns how many that are.

        Args:
          ids: int32 [n]; logprobs: float32 [n]; top_ids, top_logprobs: [≥ n, A], read where alternatives are wanted.
        """
        count = self._count_to_stop(ids.tolist(), decode) if self.params.stop else len(ids)
        self.tokens.extend(ids[:count].tolist())
        self.logprobs.extend(logprobs[:count].tolist())
        if n := self.params.top_logprobs:
            for likely, their in zip(top_ids[:count, :n].tolist(), top_logprobs[:count, :n].tolist(), strict=True):
                self.top.append(tuple(zip(likely, their, strict=True)))
        return count

    def _count_to_stop(self, ids: list[int], decode: Decode) -> int:
        stops = self.params.stop
        if first_stop(decode([*self.tokens, *ids]), stops) is None:
            return len(ids)
        for count in range(1, len(ids) + 1):
            text = decode([*self.tokens, *ids[:count]])
            if (found := first_stop(text, stops)) is not None:
                self.stopped_text = text[:found]
                return count
        return len(ids)

    def tell(self, count: int) -> Callable[[], None]:
        """What hands the last `count` tokens to whoever listens."""
        ids, logprobs = np.array(self.tokens[-count:], np.int32), np.array(self.logprobs[-count:], np.float32)

        def answer() -> None:
            if self.on_tokens is not None and not self.future.cancelled():
                self.on_tokens(ids, logprobs)

        return answer

    def complete(self, reason: FinishReason, policy_version: int, decode: Decode) -> Callable[[], None]:
        """What hands over the completion."""

        def answer() -> None:
            if self.future.set_running_or_notify_cancel():
                self.future.set_result(
                    Completion(
                        token_ids=np.array(self.tokens, np.int32),
                        logprobs=np.array(self.logprobs, np.float32),
                        finish_reason=reason,
                        policy_version=policy_version,
                        text=decode(self.tokens) if self.stopped_text is None else self.stopped_text,
                        top=tuple(self.top),
                    )
                )

        return answer


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
