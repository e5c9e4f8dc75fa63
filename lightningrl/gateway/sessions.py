"""What one key stands for: a rollout, its calls in order of arrival, and what is recorded of them."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lightningrl.gateway.calls import Call, Choice, sampling_key
from lightningrl.gateway.conversations import Conversations
from lightningrl.gateway.errors import ApiError
from lightningrl.gateway.protocol import Message, SamplingFields
from lightningrl.gateway.rendering import Renderer
from lightningrl.gateway.replay import Lockstep
from lightningrl.types import Replay, Sampler, SamplingParams, Transition


@dataclasses.dataclass(frozen=True)
class GatewaySettings:
    """Where the gateway listens and what it lets in. Port 0 is any free one."""

    host: str = "127.0.0.1"
    port: int = 0
    model: str = "policy"
    max_queue: int = 1024
    default_max_tokens: int = 256


@dataclasses.dataclass(frozen=True)
class SamplingOverrides:
    """Sampling settings of a training run; those that are set replace the agent's."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class CallRecord:
    """What one key's calls left behind."""

    transitions: tuple[Transition, ...]  # in order of turn, which is the order of arrival
    reward: Mapping[str, float] | None  # as posted to /v1/reward
    log: tuple[str, ...]  # notes, each once: settings that were overridden or are not applied
    replayed: int = 0  # how many of the transitions were answered from a record, the first ones
    divergence: str = ""  # where and how the run left the one it was to repeat; then it is not to be used


@dataclasses.dataclass(frozen=True)
class Incoming:
    """A request, whichever endpoint it came to."""

    fields: SamplingFields
    fingerprint: bytes  # equal for a request and its retries
    attempt: int  # 0, or a retry's number
    role: str
    messages: Sequence[Message]
    sent: tuple[Mapping[str, Any], ...]
    max_tokens: int | None
    stream: bool
    top_logprobs: int = 0
    prompt_field: str = "messages"  # where this endpoint's requests hold the prompt


class Session:
    """One rollout's calls. Everything happens on the server's event loop, but `record`, which only reads."""

    def __init__(
        self,
        rollout_id: str,
        seed: int,
        train_roles: tuple[str, ...] | None,
        overrides: SamplingOverrides,
        settings: GatewaySettings,
        replay: Replay | None = None,
    ) -> None:
        self.rollout_id, self.seed, self.train_roles, self.overrides = rollout_id, seed, train_roles, overrides
        self.settings = settings
        self.conversations = Conversations()
        self.lockstep = Lockstep(replay)
        self.reward: Mapping[str, float] | None = None
        self.closed = False
        self._calls: list[Call] = []
        self._answered_by_id: dict[str, tuple[Message, ...]] = {}
        self._log: dict[str, None] = {}
        self._occurrences: dict[bytes, set[int]] = {}
        self._turned_away: Counter[bytes] = Counter()

    # Calls

    def retried(self, request: Incoming) -> Call | None:
        """The call that a client's automatic retry repeats; None for a new request.

        An attempt that was answered with an error, or whose client hung up, left no call; its retry is a new one.
        """
        if request.attempt == 0:
            return None
        if self._turned_away[request.fingerprint] > 0:
            self._turned_away[request.fingerprint] -= 1
            return None
        alike = (call for call in self._calls if call.fingerprint == request.fingerprint)
        same = [call for call in alike if call.attempt < request.attempt and call.state != "failed"]
        if not same:
            return None
        running = [call for call in same if call.state == "running"]
        call = running[0] if running else same[-1]
        call.attempt = request.attempt
        return call

    def turned_away(self, fingerprint: bytes) -> None:
        """An attempt ended without a call that a retry could join."""
        self._turned_away[fingerprint] += 1

    def start(
        self,
        request: Incoming,
        prompt_ids: np.ndarray,
        extends: tuple[Call, int] | None,
        sampler: Sampler,
        on_done: Callable[[Call], None],
    ) -> Call:
        """Sends a new call to the sampler, but what a replay answers.

        Raises:
            ApiError: the prompt too long, the queue full, the replay diverged, the rollout over.
        """
        if self.closed:
            raise rollout_over()
        number = request.fields.n or 1
        params = self._params(request, len(prompt_ids), sampler.context_length)
        repeats = self.lockstep.recognise(request.role, prompt_ids, number, request.sent)
        if sampler.queue_length + number > self.settings.max_queue:
            raise ApiError(
                429,
                f"The queue of {self.settings.max_queue} requests is full; try again shortly.",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        occurrence = self._claim_occurrence(prompt_ids)

        def on_end(call: Call) -> None:
            if call.state == "done":
                on_done(call)
            else:  # asked once more, the same prompt samples the same response
                self._occurrences[prompt_ids.tobytes()].discard(occurrence)
                self.lockstep.give_back(keys)

        keys = [
            sampling_key(self.seed, self.lockstep.named(turn) or self.rollout_id, prompt_ids, occurrence, k, request.fields.seed)
            for k, turn in enumerate(repeats)
        ]
        self.lockstep.take(request.role, prompt_ids, keys, repeats)
        call = Call(
            arrival=len(self._calls),
            fingerprint=request.fingerprint,
            attempt=request.attempt,
            role=request.role,
            sent=request.sent,
            prompt_ids=prompt_ids,
            extends=extends,
            params=params,
            created=int(time.time()),
            choices=[Choice(key) for key in keys],
            on_end=on_end,
        )
        self._calls.append(call)
        try:
            call.submit(self.lockstep.sampler(sampler), request.stream)
        except Exception as problem:
            refusal = ApiError(500, f"The sampler refused the request: {type(problem).__name__}: {problem}")
            call.fail(refusal)
            raise refusal from problem
        return call

    def abandon(self, call: Call) -> None:
        """The last client waiting for a running call has hung up."""
        if call.state == "running":
            call.fail(ApiError(499, "The client closed the connection."))
            self.turned_away(call.fingerprint)

    def close(self) -> None:
        """Ends what is still running."""
        self.closed = True
        for call in self._calls:
            call.fail(rollout_over())

    def _claim_occurrence(self, prompt_ids: np.ndarray) -> int:
        taken = self._occurrences.setdefault(prompt_ids.tobytes(), set())
        occurrence = next(k for k in range(len(taken) + 1) if k not in taken)
        taken.add(occurrence)
        return occurrence

    # Conversations by response id (Responses API)

    def remember(self, response_id: str, messages: tuple[Message, ...]) -> None:
        self._answered_by_id[response_id] = messages

    def recall(self, response_id: str) -> tuple[Message, ...]:
        try:
            return self._answered_by_id[response_id]
        except KeyError:
            message = f"Previous response with id '{response_id}' not found in this rollout."
            raise ApiError(400, message, code="previous_response_not_found", param="previous_response_id") from None

    # Sampling settings

    def note(self, sentence: str) -> None:
        self._log.setdefault(sentence)

    def _params(self, request: Incoming, prompt_length: int, context: int) -> SamplingParams:
        fields, forced = request.fields, self.overrides
        room = context - prompt_length
        if room < 1:
            raise ApiError(
                400,
                f"This model's maximum context length is {context} tokens, but the prompt is {prompt_length} tokens long, "
                f"which leaves no room for a response; shorten '{request.prompt_field}'.",
                code="context_length_exceeded",
                param=request.prompt_field,
            )
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(fields, name):
                self.note(f"{name} is not applied: responses are sampled from the policy's own distribution")
        wanted = self._forced("max_tokens", request.max_tokens, forced.max_tokens)
        return SamplingParams(
            max_tokens=min(room, self.settings.default_max_tokens if wanted is None else wanted),
            temperature=_default(self._forced("temperature", fields.temperature, forced.temperature), 1.0),
            top_p=_default(self._forced("top_p", fields.top_p, forced.top_p), 1.0),
            top_k=max(0, _default(self._forced("top_k", fields.top_k, forced.top_k), 0)),
            stop=fields.stops,
            top_logprobs=request.top_logprobs,
            role=request.role,
        )

    def _forced(self, name: str, asked: Any, forced: Any) -> Any:
        if forced is None:
            return asked
        if asked is not None and asked != forced:
            self.note(f"{name} {asked} of the agent is overridden by {forced}")
        return forced

    # The record

    def record(self, renderer: Renderer) -> CallRecord:
        """The finished calls as transitions: one for each choice, turns in order of arrival, those of a replay as recorded."""
        done = [(call, k) for call in self._calls if call.state == "done" for k in range(len(call.choices))]
        done.sort(key=lambda choice: self._recorded_turn(*choice))
        turns = {choice: turn for turn, choice in enumerate(done)}
        transitions, replayed = [], 0
        for (call, k), turn in turns.items():
            continues = turns.get(call.extends) if call.extends else None
            recorded = self.lockstep.replayed(call.choices[k].key)
            if recorded is None:
                transitions.append(_transition(call, k, turn, continues, self.train_roles, renderer))
            else:  # its reward is worked out anew
                transitions.append(dataclasses.replace(recorded, turn=turn, continues=continues, reward=0.0))
                replayed += 1
        return CallRecord(tuple(transitions), self.reward, tuple(self._log), replayed, self.lockstep.divergence)

    def _recorded_turn(self, call: Call, k: int) -> float:
        turn = self.lockstep.turn(call.choices[k].key)
        return math.inf if turn is None else turn


def _transition(
    call: Call, k: int, turn: int, continues: int | None, train_roles: tuple[str, ...] | None, renderer: Renderer
) -> Transition:
    completion = call.choices[k].completion
    assert completion is not None
    params = call.params
    trained = train_roles is None or call.role in train_roles
    return Transition(
        prompt_ids=call.prompt_ids,
        response_ids=call.choices[k].token_ids,
        logprobs=np.asarray(completion.logprobs, dtype=np.float32),
        temperature=params.temperature,
        policy_version=completion.policy_version,
        role=call.role,
        turn=turn,
        finish_reason=completion.finish_reason,
        trainable=trained and params.temperature > 0 and not params.truncated,
        continues=continues,
        messages=call.sent,
        text=renderer.text(call.choices[k].seen),
    )


def rollout_over() -> ApiError:
    return ApiError(401, "This key's rollout is over.", code="invalid_api_key")


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value
