"""A run that is killed at any moment and started again ends with the same numbers as one that never was."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
import sqlite3
import time
from typing import Any

import pytest

from lightningrl.metrics import without_timings
from lightningrl.policy import save_policy
from tests.forked import Forked
from tests.tiny import tiny_policy

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parent.parent
ITERATIONS, ROLLOUTS = 4, 12  # per iteration
KILLS = 20
CHECKPOINT_KILLS = 6  # of those, as soon as a checkpoint is being written; the others at seeded moments


@dataclasses.dataclass(frozen=True)
class Command:
    """`python -m lightningrl.fit` on a tiny policy; every run shares the compiled programs of one cache."""

    folder: pathlib.Path

    def start(self, out: str, *more: str) -> Forked:
        settings = {
            "agent": "tests.dense_agent:answer",
            "tasks": self.folder / "tasks.jsonl",
            "heldout": self.folder / "heldout.jsonl",
            "policy": self.folder / "policy",
            "cache": self.folder / "cache",
            "out": self.folder / out,
            "iterations": ITERATIONS,
            "learning_rate": 0.001,
            "tasks_per_iteration": 3,
            "rollouts_per_task": ROLLOUTS // 3,
            "eval_every": 2,
            "context_length": 128,
            "max_tokens": 6,
            "slots": 8,
            "concurrency": 8,
        }
        return Forked("lightningrl.fit", [*(f"--{name}={value}" for name, value in settings.items()), *more], cwd=ROOT)

    def run(self, out: str, *more: str) -> tuple[int, str]:
        process = self.start(out, *more)
        errors = process.wait(timeout=300)
        assert process.returncode is not None
        return process.returncode, errors

    def metrics(self, out: str) -> list[dict[str, Any]]:
        lines = (self.folder / out / "metrics.jsonl").read_text().splitlines()
        return [without_timings(json.loads(line)) for line in lines]

    def stored(self, out: str) -> dict[str, str]:
        """Of each rollout in the store, what was measured while it ran: a second run of it would have taken another time."""
        path = self.folder / out / "rollouts.sqlite"
        if not path.exists():
            return {}
        db = sqlite3.connect(path)
        try:
            tables = db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'rollouts'").fetchone()[0]
            return dict(db.execute("SELECT id, metrics FROM rollouts").fetchall()) if tables else {}
        finally:
            db.close()


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    folder = tmp_path_factory.mktemp("fit")
    save_policy(folder / "policy", tiny_policy())
    for name, count in (("tasks", 6), ("heldout", 3)):
        lines = [json.dumps({"id": f"{name}{i}", "question": f"How many {name} {i}?"}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return Command(folder)


@pytest.fixture(scope="module")
def whole(command: Command) -> list[dict[str, Any]]:
    """The metrics of a run that was left alone."""
    code, errors = command.run("whole")
    assert code == 0, errors
    return command.metrics("whole")


def test_a_run_reports_every_iteration(whole: list[dict[str, Any]]) -> None:
    assert [row["iteration"] for row in whole] == list(range(ITERATIONS + 1))
    assert ["heldout_reward" in row for row in whole] == [True, False, True, False, True]
    for row in whole[1:]:
        assert (row["rollouts"], row["failed"], row["timed_out"]) == (ROLLOUTS, 0, 0)
        assert row["continuing_calls"] == row["continuing_calls_exact"] == ROLLOUTS
        assert row["logprob_gap_max"] <= 1e-4  # what is promised of float32, and on average a tenth of it
        assert row["logprob_gap_mean"] <= 1e-5
        assert row["grad_norm"] > 0


def test_two_runs_of_one_seed_give_the_same_metrics(command: Command, whole: list[dict[str, Any]]) -> None:
    code, errors = command.run("again", "--concurrency=3")  # who runs beside whom is no part of the result
    assert code == 0, errors
    assert command.metrics("again") == whole


def test_a_finished_run_run_again_changes_nothing(command: Command, whole: list[dict[str, Any]]) -> None:
    before, stored = (command.folder / "whole" / "metrics.jsonl").read_bytes(), command.stored("whole")
    policy = (command.folder / "whole" / "policy" / "model.safetensors").read_bytes()
    code, errors = command.run("whole")
    assert code == 0, errors
    assert (command.folder / "whole" / "metrics.jsonl").read_bytes() == before
    assert (command.folder / "whole" / "policy" / "model.safetensors").read_bytes() == policy
    assert command.stored("whole") == stored


def test_a_run_of_another_config_is_refused_in_one_sentence(command: Command, whole: list[dict[str, Any]]) -> None:
    code, errors = command.run("whole", "--learning_rate=0.5")
    assert code == 1
    (line,) = errors.strip().splitlines()
    assert line.startswith("error: ") and "another config (learning_rate=0.001, now 0.5)" in line
    assert command.metrics("whole") == whole


def test_a_killed_run_ends_as_one_that_was_left_alone(command: Command, whole: list[dict[str, Any]]) -> None:
    """A run that ends before all kills are spent is checked, and another one is begun."""
    rng = random.Random(0)
    seconds = sum(row[name] for row in timings(command, "whole") for name in row)
    kinds = ["checkpoint"] * CHECKPOINT_KILLS + ["moment"] * (KILLS - CHECKPOINT_KILLS)
    rng.shuffle(kinds)
    killed, runs, reused = 0, 0, 0
    while killed < KILLS:
        out, known = f"killed{runs}", dict[str, str]()
        while killed < KILLS:
            process = command.start(out)
            until(process, command.folder / out, kinds[killed], rng.uniform(0, seconds / 2))
            process.kill()
            errors = process.wait()
            assert process.returncode in (0, -9), errors
            now = command.stored(out)
            assert now | known == now, "a rollout that was stored was lost, or was run again"
            if process.returncode == 0:
                break
            killed += 1
            reused += len(now) > len(known)
            known = now
        code, errors = command.run(out)
        assert code == 0, errors
        assert command.metrics(out) == whole
        now = command.stored(out)
        assert now | known == now, "a rollout that was stored was lost, or was run again"
        assert now.keys() == command.stored("whole").keys()
        runs += 1
    assert reused > 0  # some were killed in the middle of collecting


def timings(command: Command, out: str) -> list[dict[str, float]]:
    lines = (command.folder / out / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name.endswith("_seconds")} for line in lines]


def until(process: Forked, out: pathlib.Path, kind: str, delay: float) -> None:
    """Waits for the moment to kill: a checkpoint half written, or some time after the run has opened its store."""
    opened = None
    while process.poll() is None:
        if kind == "checkpoint" and any(out.glob("checkpoints/*tmp*")):
            return
        if opened is None and (out / "rollouts.sqlite-wal").exists():
            opened = time.monotonic()
        if kind == "moment" and opened is not None and time.monotonic() - opened > delay:
            return
        time.sleep(0.002)
