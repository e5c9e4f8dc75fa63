"""Host records: what an agent's run is made of. Frozen, NumPy only, no JAX.

A `Rollout` is one run of an agent on one `Task`; each of its LLM calls is a `Transition` (arXiv 2508.03680, §3.1).
Token ids are exactly what the sampler saw and produced: nothing here is ever re-tokenised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Literal, Protocol

import numpy as np

Status = Literal["ok", "failed", "timed_out", "diverged"]  # diverged: a replay that could not repeat its parent
FinishReason = Literal["stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Task:
    """One problem. The agent sees `input`; only a reward function sees `target`."""

    id: str
    input: Mapping[str, Any]
    target: Any = None


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one response is sampled. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch truncation off."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0  # alternatives reported per token; 0 for none
    role: str = ""  # who asks: where roles have policies of their own, that one's answers

    @property
    def truncated(self) -> bool:
        """Whether some tokens could not have been sampled, so that log-probs are not those of the sampling distribution."""
        return self.top_p < 1.0 or self.top_k > 0


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the sampler produced for one prompt."""

    token_ids: np.ndarray  # int32 [n], with the end-of-turn token where one was sampled
    logprobs: np.ndarray  # float32 [n], of the tempered, untruncated distribution (greedy: of temperature 1)
    finish_reason: FinishReason
    policy_version: int
    text: str  # decoded, without special tokens, cut before a stop string
    top: tuple[tuple[tuple[int, float], ...], ...] = ()  # per token: (id, log-prob) of the likeliest alternatives


class Sampler(Protocol):
    """What the gateway needs of a policy. `submit` returns at once; it may be called from any thread."""

    @property
    def context_length(self) -> int: ...  # prompt and response together

    @property
    def queue_length(self) -> int: ...  # requests accepted and not yet finished

    def submit(
        self,
        prompt_ids: np.ndarray,
        params: SamplingParams,
        key: tuple[int, int],
        on_tokens: Callable[[np.ndarray, np.ndarray], None] | None = None,
    ) -> Future[Completion]:
        """Samples one response. `key` is two uint32 words, all the randomness that the response depends on.

        `on_tokens(ids, logprobs)` is called from the sampler's thread as tokens appear. Cancelling the future frees
        the slot.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Transition:
    """One LLM call of a rollout."""

    prompt_ids: np.ndarray  # int32 [p]
    response_ids: np.ndarray  # int32 [r]
    logprobs: np.ndarray  # float32 [r], of the tempered, untruncated distribution
    temperature: float
    policy_version: int
    role: str
    turn: int  # 0, 1, 2 … within the rollout
    reward: float = 0.0  # intermediate; 0 is a reward like any other
    finish_reason: FinishReason = "stop"
    trainable: bool = True  # false: a role that is not trained, a greedy call, truncated sampling
    continues: int | None = None  # turn of the call of this rollout whose prompt + response this prompt extends
    messages: tuple[Mapping[str, Any], ...] = ()  # the request's messages, as the client sent them
    text: str = ""  # the response, decoded


@dataclasses.dataclass(frozen=True)
class DemonstratedCall:
    """One LLM call of a demonstration: what was asked, as OpenAI messages, and what was answered.

    Responses are text as the policy writes it, tool calls included (`<tool_call>{"name": …, "arguments": …}</tool_call>`), and so are
    those that later calls quote as assistant messages.
    """

    role: str
    messages: tuple[Mapping[str, Any], ...]
    response: str
    tools: tuple[Mapping[str, Any], ...] = ()  # OpenAI definitions of the tools that were offered


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One run of an agent on one task."""

    id: str  # "<phase>/<iteration>/<task id>/<sample>", unique within a run
    task: Task
    group: str  # runs of the same task in the same iteration share it
    sample: int  # index within the group
    attempt: int  # 0, 1, …: retries of infrastructure failures
    transitions: tuple[Transition, ...]
    outcome: Mapping[str, float]  # named rewards; "reward" is the one that is trained on
    status: Status = "ok"
    parent: str | None = None  # id of the rollout this one was branched from; metrics["replayed_calls"] says after how many calls
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    error: str = ""  # traceback of a failed run
    answer: Any = None  # what the agent returned, if JSON

    @property
    def reward(self) -> float:
        return self.outcome["reward"]


@dataclasses.dataclass(frozen=True)
class Replay:
    """Where a run branches off a recorded one: its first `calls` calls are to be answered as the parent's were."""

    parent: Rollout
    calls: int  # 0: none, a run of its own from the start

    def __post_init__(self) -> None:
        if not 0 <= self.calls <= len(self.parent.transitions):
            known = len(self.parent.transitions)
            raise ValueError(f"rollout {self.parent.id!r} has {known} calls: a run cannot repeat {self.calls} of them")


@dataclasses.dataclass(frozen=True)
class RolloutRequest:
    """A run that is wanted, as in `Rollout`."""

    id: str
    task: Task
    group: str
    sample: int
    replay: Replay | None = None  # branches off a recorded run
