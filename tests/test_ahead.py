"""Sampling jobs are done in order, beside the caller where they are to be, and their errors reach whoever waits."""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import Any

import pytest

from lightningrl.ahead import SamplingJobs
from lightningrl.errors import UserError
from lightningrl.fit import CommandConfig, fit
from lightningrl.metrics import without_timings
from lightningrl.runtime.store import Store
from lightningrl.types import Rollout
from tests.test_evidence_in_the_loop import TASKS, TINY, agent

BOTH = pytest.mark.parametrize("beside", [False, True])


@BOTH
def test_jobs_are_done_in_order_one_at_a_time(beside: bool) -> None:
    running, seen = threading.Lock(), []

    def job(i: int) -> int:
        assert running.acquire(blocking=False)
        seen.append(i)
        running.release()
        return i * i

    with SamplingJobs(beside=beside) as jobs:
        results = [jobs.submit(lambda i=i: job(i)) for i in range(20)]
        assert [wait() for wait in reversed(results)] == [i * i for i in reversed(range(20))]
    assert seen == list(range(20))


def test_the_caller_goes_on_while_a_job_runs() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def job() -> str:
        begun.set()
        assert go_on.wait(10)
        return threading.current_thread().name

    with SamplingJobs(beside=True) as jobs:
        wait = jobs.submit(job)
        assert begun.wait(10)
        go_on.set()
        assert wait() == "sampling"


def test_without_a_thread_a_job_is_done_where_it_is_handed_in() -> None:
    with SamplingJobs(beside=False) as jobs:
        assert jobs.submit(threading.current_thread)() is threading.current_thread()


@BOTH
def test_what_a_job_raises_reaches_who_waits(beside: bool) -> None:
    def fail() -> None:
        raise KeyError("what")

    with SamplingJobs(beside=beside) as jobs, pytest.raises(KeyError, match="what"):
        jobs.submit(fail)()


def test_a_block_that_is_left_by_an_exception_drops_what_was_not_begun() -> None:
    begun, release, done = threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        assert release.wait(10)
        done.append("first")

    with pytest.raises(KeyboardInterrupt), SamplingJobs(beside=True) as jobs:
        wait = jobs.submit(first)
        never = jobs.submit(lambda: done.append("second"))
        assert begun.wait(10)
        raise KeyboardInterrupt
    with pytest.raises(CancelledError):
        never()
    release.set()
    wait()
    assert done == ["first"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("versions", "end"), [(1, {"iterations": 4}), (2, {"iterations": 4}), (1, {"iterations": 9, "rollout_budget": 13})]
)  # four rollouts in each iteration
def test_a_run_that_samples_ahead_is_repeatable_and_goes_on_where_it_was_stopped(
    tmp_path: pathlib.Path, versions: int, end: dict[str, int]
) -> None:
    settings: dict[str, Any] = TINY | {"cache": str(tmp_path / "cache"), "rollouts_per_task": 2, "max_staleness": versions} | end

    def run(out: str, **changes: Any) -> list[dict[str, Any]]:
        metrics = fit(agent, TASKS[:2], None, CommandConfig(out=str(tmp_path / out), **settings), **changes).metrics
        return [without_timings(row) for row in metrics]

    def stop(rollouts: Sequence[Rollout], iteration: int) -> Sequence[Rollout]:
        if iteration == 3:
            raise KeyboardInterrupt
        return rollouts

    with pytest.raises(KeyboardInterrupt):
        run("stopped", alter=stop)
    metrics = run("stopped")
    assert metrics == run("whole")
    with Store(tmp_path / "whole" / "rollouts.sqlite") as store:
        assert len(store.read("train", 4)) == 4 and not store.read("train", 5)  # nothing is begun that will not be learned from
    # The first iterations are all sampled from the start.
    assert [row["staleness_max"] for row in metrics[1:]] == [min(i, versions) for i in range(4)]
    assert all(row["staleness_mean"] == row["staleness_max"] for row in metrics[1:])


@pytest.mark.parametrize("recipe", ["vineppo", "remax"])
def test_a_recipe_that_runs_agents_while_it_learns_cannot_sample_ahead(tmp_path: pathlib.Path, recipe: str) -> None:
    config = CommandConfig(out=str(tmp_path / "out"), cache=str(tmp_path / "cache"), recipe=recipe, max_staleness=1, **TINY)
    with pytest.raises(UserError, match=f"recipe {recipe} runs agents while it learns"):
        fit(agent, TASKS, None, config)
    assert not (tmp_path / "out").exists()
