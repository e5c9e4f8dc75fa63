"""Branching by replay: a run's first calls are answered as those of a recorded run were, the rest is sampled.

A call is recognised by its role and its exact prompt ids; of recorded calls that are alike, the earliest that was not asked yet is
meant. So an agent may issue calls side by side in any order, and what a tool of it made different shows in the next prompt.

A call that the recorded run never made, while calls of the replay are still to come, is a divergence: the run has left the way to
the state that it was to branch from. That call and all later ones are refused, with one error that no client retries. To sample
on would cost as much as a run that is used, and refusing loses nothing: the divergence says what was asked instead, the calls
that were answered stay recorded, and a run from the start can be had without a replay. The call after the replay is sampled
whatever it asks: a tool that answers otherwise there is chance that belongs to the recorded call. Whoever wants the value of one
exact state compares prompts (`evidence.branches`).
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import numpy as np

from lightningrl.gateway.errors import ApiError
from lightningrl.types import Completion, Replay, Sampler, SamplingParams, Transition

Key = tuple[int, int]  # of a choice, see `calls.sampling_key`
SHOWN = 60  # characters of a prompt that are shown around the point where it parts from the recorded one


class Lockstep:
    """How far a session has come along the recorded run that it repeats; without one, every call is new.

    After the replay it keeps recognising calls until the first new one, so that calls that arrive in another order than they
    were recorded in are still numbered as recorded.
    """

    def __init__(self, replay: Replay | None = None) -> None:
        self.parent = "" if replay is None else replay.parent.id
        self.calls = 0 if replay is None else replay.calls
        self.divergence = ""  # one sentence once it has happened
        recorded = [] if replay is None else sorted(replay.parent.transitions, key=lambda t: t.turn)
        self._waiting: dict[tuple[str, bytes], deque[tuple[int, Transition]]] = {}
        for turn, transition in enumerate(recorded):
            self._waiting.setdefault(_identity(transition.role, transition.prompt_ids), deque()).append((turn, transition))
        self._open = dict(enumerate(recorded[: self.calls]))  # of the replay, not asked yet
        self._in_step = bool(recorded)
        self._asked: dict[Key, tuple[int, Transition]] = {}

    def recognise(self, role: str, prompt_ids: np.ndarray, number: int, sent: Sequence[Mapping[str, object]]) -> list[int | None]:
        """The recorded turns that the choices of a call repeat, None for those that are new. Nothing is taken yet.

        Raises:
            ApiError: the call, or an earlier one, is none of the recorded run's though its replay has not ended.
        """
        if not self.divergence and (self._in_step or self._open):
            turns = [turn for turn, _ in self._waiting.get(_identity(role, prompt_ids), ())][:number]
            if len(turns) < number and self._open.keys() - turns:
                self.divergence = self._describe(role, sent)
            else:
                return [*turns, *[None] * (number - len(turns))]
        if self.divergence:
            raise ApiError(403, f"This run is over: {self.divergence}.", code="replay_diverged")
        return [None] * number

    def take(self, role: str, prompt_ids: np.ndarray, keys: Sequence[Key], turns: Sequence[int | None]) -> None:
        """Marks what `recognise` found as asked, under the keys of the choices."""
        if not (self._in_step or self._open):
            return
        waiting = self._waiting.get(_identity(role, prompt_ids), deque())
        for key, turn in zip(keys, turns, strict=True):
            if turn is None:
                self._in_step = False
                continue
            self._asked[key] = waiting.popleft()
            self._open.pop(turn, None)

    def give_back(self, keys: Sequence[Key]) -> None:
        """Undoes `take` for a call that failed: its client may ask again."""
        for key in reversed(keys):
            if key not in self._asked:
                continue
            turn, transition = self._asked.pop(key)
            self._waiting[_identity(transition.role, transition.prompt_ids)].appendleft((turn, transition))
            if turn < self.calls:
                self._open[turn] = transition

    def sampler(self, sampler: Sampler) -> Sampler:
        """Answers the choices of the replay, and hands those that are to be sampled to `sampler`."""
        return _Replayer(self.replayed, sampler) if self._asked else sampler

    def replayed(self, key: Key) -> Transition | None:
        """The recorded call that a choice of the replay is; None for one that was sampled."""
        turn, transition = self._asked.get(key, (self.calls, None))
        return transition if turn < self.calls else None

    def named(self, turn: int | None) -> str | None:
        """The rollout under whose name an answer of the replay was sampled: clients see ids that are made of it."""
        return self.parent if turn is not None and turn < self.calls else None

    def turn(self, key: Key) -> int | None:
        """The turn under which the call was recorded; None for a new one."""
        return self._asked[key][0] if key in self._asked else None

    def _describe(self, role: str, sent: Sequence[Mapping[str, object]]) -> str:
        turn = min(self._open)
        expected = self._open[turn]
        done = self.calls - len(self._open)
        was, now = _parting(_shown(expected.messages), _shown(sent))
        if role != expected.role:
            was, now = f"{expected.role}: {was}", f"{role}: {now}"
        return (
            f"the replay of rollout {self.parent} diverged after {done} of {self.calls} calls, since its call {turn} was asked "
            f"{was!r} and now comes {now!r}"
        )


class _Replayer:
    """A sampler that has some answers already."""

    def __init__(self, replayed: Callable[[Key], Transition | None], sampler: Sampler) -> None:
        self._replayed, self._sampler = replayed, sampler

    @property
    def context_length(self) -> int:
        return self._sampler.context_length

    @property
    def queue_length(self) -> int:
        return self._sampler.queue_length

    def submit(
        self,
        prompt_ids: np.ndarray,
        params: SamplingParams,
        key: Key,
        on_tokens: Callable[[np.ndarray, np.ndarray], None] | None = None,
    ) -> Future[Completion]:
        recorded = self._replayed(key)
        if recorded is None:
            return self._sampler.submit(prompt_ids, params, key, on_tokens)
        if on_tokens is not None:
            on_tokens(recorded.response_ids, recorded.logprobs)
        future: Future[Completion] = Future()
        future.set_result(
            Completion(recorded.response_ids, recorded.logprobs, recorded.finish_reason, recorded.policy_version, recorded.text)
        )
        return future


def _identity(role: str, prompt_ids: np.ndarray) -> tuple[str, bytes]:
    return role, np.asarray(prompt_ids, np.int32).tobytes()


def _shown(messages: Sequence[Mapping[str, object]]) -> str:
    said = [[message[part] for part in ("role", "content", "tool_calls") if message.get(part)] for message in messages]
    return json.dumps(said, ensure_ascii=False, default=str)


def _parting(was: str, now: str) -> tuple[str, str]:
    """Both texts around the point where they part."""
    at = next((k for k, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now)))
    start = max(0, at - SHOWN // 3)
    return was[start : start + SHOWN], now[start : start + SHOWN]
