"""What the quickstart's experiment makes of its settings."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.text_to_sql import EXPERIMENT, Config, load_data, reward, task_of
from experiments.training import demonstrations_for, kept_summary, shuffled_rewards
from lightningrl.config import same_run
from lightningrl.errors import UserError
from lightningrl.tasks.text_to_sql.databases import build_databases
from lightningrl.types import Rollout, Task
from tests.tasks.conftest import data_folder

SMALL = Config(databases=2, unseen_databases=1, questions=80, heldout_questions=20, unseen_questions=6, demonstrations=90)


def test_a_run_goes_on_whenever_it_is_started_again() -> None:
    again = dataclasses.replace(SMALL, started=1.0, seconds_install=70.0, controls=True, out="moved", concurrency=8, cache="elsewhere")
    assert same_run(again) == same_run(SMALL)
    for other in ({"seed": 1}, {"questions": 81}, {"learning_rate": 1e-3}, {"database": "mine.sqlite"}):
        assert same_run(dataclasses.replace(SMALL, **other)) != same_run(SMALL)


def test_generated_questions_are_split_by_use(tmp_path: Path) -> None:
    data = load_data(SMALL, tmp_path)
    assert (len(data.heldout), len(data.unseen)) == (20, 6)
    seen = {q.database for q in (*data.train, *data.heldout)}
    assert len(seen) == 2 and not seen & {q.database for q in data.unseen}
    assert not {task_of(q).id for q in data.train} & {task_of(q).id for q in data.heldout}


def test_a_small_database_keeps_at_least_as_much_to_train_on(tmp_path: Path) -> None:
    database = str(build_databases(tmp_path, 0, 1)[0])
    data = load_data(dataclasses.replace(SMALL, database=database, questions=30), tmp_path)
    assert len(data.heldout) == 10 and len(data.train) <= 20


def test_one_source_of_questions_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--database or --data_dir, not both"):
        load_data(dataclasses.replace(SMALL, database="a.sqlite", data_dir="b"), tmp_path)


def test_spider_is_split_by_database(tmp_path: Path) -> None:
    """Held-out questions are about databases that are trained on, unseen ones about those of dev.json, from all over the file."""
    spider = str(data_folder("spider", "dev.json"))
    data = load_data(dataclasses.replace(SMALL, data_dir=spider, heldout_questions=300, unseen_questions=100), tmp_path)
    assert (len(data.heldout), len(data.unseen)) == (300, 100) and len(data.train) > 5000
    databases = [{q.database for q in questions} for questions in (data.train, data.heldout, data.unseen)]
    assert databases[1] <= databases[0] and not databases[2] & databases[0] and len(databases[2]) > 10
    assert not {(q.database, q.gold) for q in data.train} & {(q.database, q.gold) for q in data.heldout}


def test_every_question_is_demonstrated_as_often_as_any_other(tmp_path: Path) -> None:
    data = load_data(SMALL, tmp_path)
    shown = collections.Counter(demo[0].messages[1]["content"] for demo in demonstrations_for(EXPERIMENT, data.train, SMALL))
    assert sum(shown.values()) == 90 and max(shown.values()) - min(shown.values()) <= 1
    assert len(shown) == len(data.train)


def test_the_reward_is_execution_match(tmp_path: Path) -> None:
    question = load_data(SMALL, tmp_path).train[0]
    task = task_of(question)
    assert reward(dict(task.input), task.target, question.gold) == 1.0
    assert [reward(dict(task.input), task.target, answer) for answer in (question.wrong[0][1], "", None, "SELECT 1 FROM nowhere")] == [
        0.0
    ] * 4


def test_a_finished_run_keeps_what_it_took_and_its_controls(tmp_path: Path) -> None:
    assert kept_summary(tmp_path) == {}
    before = {"heldout_reward_after": 0.5, "seconds": 460.0, "seconds_install": 34.0, "controls": {"more_supervised": {"gain": 0.0}}}
    (tmp_path / "summary.json").write_text(json.dumps(before))
    assert kept_summary(tmp_path) == {name: before[name] for name in ("seconds", "seconds_install", "controls")}


def test_shuffled_rewards_are_the_same_rewards() -> None:
    rollouts = [
        Rollout(str(i), Task(str(i), {}, None), str(i // 4), i % 4, 0, (), {"reward": float(i)}, "failed" if i % 5 == 0 else "ok")
        for i in range(40)
    ]
    changed = shuffled_rewards(rollouts, 3)
    assert [r.outcome for r in changed[::5]] == [r.outcome for r in rollouts[::5]]  # failures stay failures
    ok = [r.outcome["reward"] for r in changed if r.status == "ok"]
    assert sorted(ok) == [float(i) for i in range(40) if i % 5]
    assert np.mean([a.outcome == b.outcome for a, b in zip(changed, rollouts, strict=True) if a.status == "ok"]) < 0.3
    assert changed == shuffled_rewards(rollouts, 3) != shuffled_rewards(rollouts, 4)
