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
    stopped_text: str | None = None

    @property
    def to_read(self) -> int:
        return len(self.prompt) - 1

    def piece(self, chunk: int) -> np.ndarray:
        """What is to be read next: at most to the next multiple of `chunk`."""
        return self.prompt[self.read : min(self.read + chunk, self.to_read)]

    def take(self, ids: np.ndarray, logprobs: np.ndarray, top: Callable[[int], tuple[np.ndarray, np.ndarray]], decode: Decode) -> None:
        """New tokens, up to the one that completes a stop string. top: the likeliest ids and their log-probs at a step."""
        count = self._count_to_stop(ids.tolist(), decode) if self.params.stop else len(ids)
        self.tokens.extend(ids[:count].tolist())
        self.logprobs.extend(logprobs[:count].tolist())
        if n := self.params.top_logprobs:
            for i in range(count):
                likely, their = top(i)
                self.top.append(tuple(zip(likely[:n].tolist(), their[:n].tolist(), strict=True)))
        if self.on_tokens is not None and not self.future.cancelled():
            self.on_tokens(ids[:count], logprobs[:count])

    def _count_to_stop(self, ids: list[int], decode: Decode) -> int:
        if not _first_stop(decode([*self.tokens, *ids]), self.params.stop):
            return len(ids)
        for count in range(1, len(ids) + 1):
            text = decode([*self.tokens, *ids[:count]])
            if found := _first_stop(text, self.params.stop):
                self.stopped_text = text[: found[0]]
                return count
        return len(ids)

    def complete(self, reason: FinishReason, policy_version: int, decode: Decode) -> Completion:
        return Completion(
            token_ids=np.array(self.tokens, np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            finish_reason=reason,
            policy_version=policy_version,
            text=decode(self.tokens) if self.stopped_text is None else self.stopped_text,
            top=tuple(self.top),
        )


def _first_stop(text: str, stops: Sequence[str]) -> list[int]:
    return sorted(at for stop in stops if (at := text.find(stop)) >= 0)[:1]
