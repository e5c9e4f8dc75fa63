"""Runs groups of an agent's rollouts: concurrently, each within a time limit, failures kept apart from rewards.

A rollout that fails or runs out of time is a failure of the run, never a reward of 0: it has no outcome at all.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lightningrl.runtime.event_loop import Interrupt, OutOfTime, in_thread, run_on_agent_loop, within
from lightningrl.runtime.failures import describe, is_infrastructure_failure
from lightningrl.runtime.intermediate import Intermediate, with_rewards
from lightningrl.runtime.local import Agent, CallAgent, in_this_process
from lightningrl.runtime.outcome import Reward, RewardError, as_json, outcome_of
from lightningrl.runtime.store import LogEntry, Store
from lightningrl.types import Replay, Rollout, RolloutRequest, Status, Task

if TYPE_CHECKING:
    from lightningrl.gateway import CallRecord, SamplingOverrides

OnRollout = Callable[[Rollout], None]


RETRY_PAUSE_S = 0.1  # doubled with every attempt; clients that retry by themselves have already waited


class Endpoint(Protocol):
    """What the runner needs of `lightningrl.gateway.Gateway`."""

    @property
    def base_url(self) -> str: ...

    def open(
        self,
        rollout_id: str,
        *,
        seed: int,
        train_roles: tuple[str, ...] | None = None,
        sampling: SamplingOverrides | None = None,
        replay: Replay | None = None,
    ) -> str: ...

    def close(self, api_key: str) -> CallRecord: ...


@dataclasses.dataclass(frozen=True)
class RunnerSettings:
    concurrency: int = 64  # rollouts at a time
    time_limit_s: float = 60.0  # of one attempt, its reward function included
    max_attempts: int = 3  # at a rollout whose infrastructure fails

    def __post_init__(self) -> None:
        for name in ("concurrency", "time_limit_s", "max_attempts"):
            if not getattr(self, name) > 0:
                raise ValueError(f"RunnerSettings.{name} is {getattr(self, name)}: it must be positive")


def rollout_requests(tasks: Sequence[Task], *, phase: str, iteration: int, samples: int) -> list[RolloutRequest]:
    """`samples` rollouts of every task, a task's together, with the ids and groups of `types.Rollout`."""
    groups = [(task, f"{phase}/{iteration}/{task.id}") for task in tasks]
    return [RolloutRequest(f"{group}/{k}", task, group, k) for task, group in groups for k in range(samples)]


@dataclasses.dataclass(frozen=True)
class _Batch:
    """What all rollouts of one `run` share."""

    phase: str
    iteration: int
    seed: int
    train_roles: tuple[str, ...] | None
    sampling: SamplingOverrides | None
    on_rollout: OnRollout | None


class Runner:
    """Runs an agent that knows nothing of training against the gateway.

    Agents run in this process (`local`) unless `call_agent` takes them elsewhere (`on_processes`, `on_ray`). Reward functions run
    here, in threads, so a slow one holds up nobody else.

    Args:
        gateway: hands out a key for each attempt, and its calls when the key is closed.
        agent: `(input, base_url, api_key)`; it gets a copy of the task's input, and never the target.
        reward: `(input, target, answer)` scores what the agent returned; None where the agent returns or posts its reward.
        intermediate: functions of a rollout that give one number per transition, added to the transitions' rewards.
        store: where every finished rollout is written before `run` returns it; None to keep nothing.
        call_agent: where an attempt of `agent` runs; None for here.
    """

    def __init__(
        self,
        gateway: Endpoint,
        agent: Agent,
        reward: Reward | None,
        settings: RunnerSettings = RunnerSettings(),
        intermediate: Sequence[Intermediate] = (),
        store: Store | None = None,
        call_agent: CallAgent | None = None,
    ) -> None:
        self.gateway, self.reward, self.settings = gateway, reward, settings
        self.intermediate, self.store = tuple(intermediate), store
        self.call_agent = call_agent or in_this_process(agent)

    def run(
        self,
        requests: Sequence[RolloutRequest],
        *,
        phase: str,
        iteration: int,
        seed: int,
        train_roles: tuple[str, ...] | None = None,
        sampling: SamplingOverrides | None = None,
        on_rollout: OnRollout | None = None,
    ) -> list[Rollout]:
        """Runs the requests and returns their rollouts in the order of the requests, whatever finished first.

        Those that the store holds with status `ok` for this phase and iteration are not run again. An attempt that ends in an
        infrastructure failure (see `failures`) is made again under a new key; the attempt that is given up goes to the store's
        log, and none of its calls into the rollout.

        A request with a replay repeats the first calls of its parent and samples the rest, under keys of its own id. If it can't
        repeat them, its status is `diverged`: it has no outcome, is not tried again, and its error says where it left the parent.

        Args:
            on_rollout: called with each rollout once it is stored, one at a time, in the order they finish.

        Raises:
            ValueError: two requests of one id.
            KeyboardInterrupt: at once; rollouts that were finished are in the store.
        """
        repeated = [id_ for id_, count in Counter(request.id for request in requests).items() if count > 1]
        if repeated:
            raise ValueError(f"two rollout requests have the id {repeated[0]!r}: an id names one rollout")
        batch = _Batch(phase, iteration, seed, train_roles, sampling, on_rollout)
        return run_on_agent_loop(self._run(requests, batch))

    async def _run(self, requests: Sequence[RolloutRequest], batch: _Batch) -> list[Rollout]:
        stored = set(self.store.ids(batch.phase, batch.iteration, "ok")) if self.store else set()
        rollouts: dict[str, Rollout] = {}
        waiting = iter(requests)

        async def work() -> None:
            for request in waiting:
                if self.store is not None and request.id in stored:
                    rollout = dataclasses.replace(self.store.read_rollout(request.id), task=request.task)
                else:
                    rollout, log = await self._rollout(request, batch)
                    if self.store is not None:
                        self.store.write(rollout, batch.phase, batch.iteration, log)
                rollouts[request.id] = rollout
                if batch.on_rollout is not None:
                    batch.on_rollout(rollout)

        workers = [asyncio.ensure_future(work()) for _ in range(min(self.settings.concurrency, len(requests)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
        return [rollouts[request.id] for request in requests]

    async def _rollout(self, request: RolloutRequest, batch: _Batch) -> tuple[Rollout, list[LogEntry]]:
        """Attempts until one ends by itself, by its own fault or out of time."""
        log: list[LogEntry] = []
        for attempt in range(self.settings.max_attempts):
            rollout, notes, again = await self._attempt(request, attempt, batch)
            log += [LogEntry(attempt, note) for note in notes]
            if not again or attempt + 1 == self.settings.max_attempts:
                break
            log.append(LogEntry(attempt, _given_up(rollout)))
            await asyncio.sleep(RETRY_PAUSE_S * 2**attempt)
        return rollout, log

    async def _attempt(self, request: RolloutRequest, attempt: int, batch: _Batch) -> tuple[Rollout, tuple[str, ...], bool]:
        """Returns the rollout, the gateway's notes, and whether another attempt is worth it."""
        started = time.monotonic()
        replay = {} if request.replay is None else {"replay": request.replay}
        key = self.gateway.open(request.id, seed=batch.seed, train_roles=batch.train_roles, sampling=batch.sampling, **replay)
        record: CallRecord | None = None
        answer: Any = None
        outcome: Mapping[str, float] = {}
        status: Status = "ok"
        doing, error, again = "the agent", "", False
        try:
            limit = self.settings.time_limit_s
            answer, spent = await self.call_agent(dict(request.task.input), self.gateway.base_url, key, limit)
            record = self.gateway.close(key)
            doing = "the reward function"
            scoring = in_thread(outcome_of, request.task, answer, self.reward, record.reward)
            outcome = await within(scoring, limit - spent)
        except Interrupt:
            raise
        except OutOfTime:
            status, error = "timed_out", f"{doing} was still running after the time limit of {self.settings.time_limit_s:g} s"
        except RewardError as problem:
            status, error = "failed", str(problem)
        except Exception as problem:
            status, error, again = "failed", describe(problem), is_infrastructure_failure(problem)
        finally:
            record = record or self.gateway.close(key)
        divergence = _divergence(request.replay, record, status)
        if divergence:
            status, error, outcome, again = "diverged", divergence, {}, False
        rollout = self._record(request, attempt, record, answer, outcome, status, error, time.monotonic() - started)
        if status == "ok" and self.intermediate:
            rollout = await self._with_rewards(rollout)
        return rollout, record.log, again

    def _record(
        self,
        request: RolloutRequest,
        attempt: int,
        record: CallRecord,
        answer: Any,
        outcome: Mapping[str, float],
        status: Status,
        error: str,
        seconds: float,
    ) -> Rollout:
        return Rollout(
            id=request.id,
            task=request.task,
            group=request.group,
            sample=request.sample,
            attempt=attempt,
            transitions=record.transitions,
            outcome=outcome,
            status=status,
            parent=None if request.replay is None else request.replay.parent.id,
            metrics={
                "calls": float(len(record.transitions)),
                "response_tokens": float(sum(len(transition.response_ids) for transition in record.transitions)),
                "agent_seconds": seconds,
                **({} if request.replay is None else {"replayed_calls": float(record.replayed)}),
            },
            error=error,
            answer=as_json(answer),
        )

    async def _with_rewards(self, rollout: Rollout) -> Rollout:
        """In a thread and within the time limit: a function may run what a model has written."""
        limit = self.settings.time_limit_s
        status: Status = "failed"
        try:
            return await within(in_thread(with_rewards, rollout, self.intermediate), limit)
        except Interrupt:
            raise
        except OutOfTime:
            status, error = "timed_out", f"the intermediate rewards were still running after the time limit of {limit:g} s"
        except Exception as problem:
            error = describe(problem)
        return dataclasses.replace(rollout, status=status, outcome={}, error=error)


def _divergence(replay: Replay | None, record: CallRecord, status: Status) -> str:
    """How a run failed to repeat its parent; a run that broke off by itself did not get to it."""
    if replay is not None and status == "ok" and not record.divergence and record.replayed < replay.calls:
        return f"the run ended after {record.replayed} of the {replay.calls} calls of rollout {replay.parent.id} that it was to repeat"
    return record.divergence


def _given_up(rollout: Rollout) -> str:
    """What an attempt did before its infrastructure failed."""

    def lines() -> Iterator[str]:
        yield rollout.error.rstrip("\n")
        for transition in rollout.transitions:
            yield f"call {transition.turn} ({transition.role}): {transition.text}"

    return "\n".join(lines())
