"""What the word-problem experiment makes of its settings."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from experiments.math_tool import EXPERIMENT, Config, by_steps, load_data, problem_from, reward, task_of
from experiments.training import Data, demonstrations_for, same_data
from lightningrl.config import same_run
from lightningrl.errors import UserError
from lightningrl.fit import Fitted
from lightningrl.runtime.store import Store
from lightningrl.types import Rollout

SMALL = Config(questions=80, heldout_questions=20, demonstrations=90)


def test_a_run_goes_on_whenever_it_is_started_again() -> None:
    again = dataclasses.replace(SMALL, started=1.0, controls=True, out="moved", cache="elsewhere")
    assert same_run(again) == same_run(SMALL)
    for other in ({"seed": 1}, {"questions": 81}, {"data_dir": "calc"}):
        assert same_run(dataclasses.replace(SMALL, **other)) != same_run(SMALL)


def test_generated_problems_are_split(tmp_path: Path) -> None:
    data = load_data(SMALL, tmp_path)
    assert len(data.heldout) == 20 and len(data.train) <= 60 and not data.unseen
    assert not {task_of(p).input["question"] for p in data.train} & {task_of(p).input["question"] for p in data.heldout}
    assert load_data(dataclasses.replace(SMALL, seed=1), tmp_path) != data


def test_problems_pass_between_processes_unchanged(tmp_path: Path) -> None:
    data = same_data(SMALL, EXPERIMENT, tmp_path)
    assert (data.train, data.heldout) == ((loaded := load_data(SMALL, tmp_path)).train, loaded.heldout)
    assert [problem_from(json.loads(json.dumps(dataclasses.asdict(p)))) for p in data.train] == list(data.train)


def test_every_problem_is_demonstrated_as_often_as_any_other(tmp_path: Path) -> None:
    data = load_data(SMALL, tmp_path)
    shown = collections.Counter(demo[0].messages[1]["content"] for demo in demonstrations_for(EXPERIMENT, data.train, SMALL))
    assert sum(shown.values()) == 90 and max(shown.values()) - min(shown.values()) <= 1 and len(shown) == len(data.train)


def test_the_agent_does_not_see_the_answer(tmp_path: Path) -> None:
    for problem in load_data(SMALL, tmp_path).train:
        assert dict(task_of(problem).input) == {"question": problem.question}


def test_the_reward_is_numeric_exact_match(tmp_path: Path) -> None:
    task = task_of(load_data(SMALL, tmp_path).train[0])
    gold = task.target["gold"]
    assert [reward({}, task.target, answer) for answer in (gold, f"{gold}.0", f"${gold}")] == [1.0] * 3
    assert [reward({}, task.target, answer) for answer in ("", None, f"{gold}1", f"{gold}.001", f"about {gold}")] == [0.0] * 5


def test_the_tolerance_of_calc_x_is_a_setting(tmp_path: Path) -> None:
    target = {"gold": "100"}
    answers = ("100", "99", "101", "98.99", "101.01", "")
    exact, loose = (EXPERIMENT.reward(dataclasses.replace(SMALL, answer_tolerance=tolerance)) for tolerance in (None, 0.01))
    assert [exact({}, target, answer) for answer in answers] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert [loose({}, target, answer) for answer in answers] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert EXPERIMENT.reward(dataclasses.replace(SMALL, answer_tolerance=0.29))({}, target, "129") == 1.0  # the float is less than 29 / 100
    for wrong in (-0.01, math.nan, math.inf):
        with pytest.raises(UserError, match="^answer_tolerance=.* must be at least 0, and finite$"):
            dataclasses.replace(SMALL, answer_tolerance=wrong)


def test_a_run_that_failed_is_not_right(tmp_path: Path) -> None:
    problems = [dataclasses.replace(p, answer="100", chain=(("99+1", "100"),)) for p in load_data(SMALL, tmp_path).heldout[:4]]
    runs: list[dict[str, Any]] = [
        {"outcome": {"reward": 1.0}, "answer": "100"},
        {"outcome": {"reward": 0.0}, "answer": "99"},
        {"outcome": {}, "status": "timed_out", "error": "too slow"},
        {"outcome": {}, "status": "failed", "error": "the intermediate rewards", "answer": "100"},
    ]
    with Store(tmp_path / "rollouts.sqlite") as store:
        for problem, fields in zip(problems, runs, strict=True):
            id_ = f"heldout/1/{problem.id}/0"
            store.write(Rollout(id=id_, task=task_of(problem), group="g", sample=0, attempt=0, transitions=(), **fields), "heldout", 1)
    fitted = Fitted(policy=None, metrics=({"iteration": 1},), out=tmp_path, compiled=0)  # type: ignore[arg-type]  # nobody asks for it
    assert by_steps(fitted, Data([], problems)) == {
        "by_steps_after": {"1": {"count": 4, "accuracy": 0.25}},
        "heldout_within_a_hundredth_after": 0.5,
    }


def test_real_problems(tmp_path: Path) -> None:
    gold = {"id": "a", "source": "gsm8k", "question": "Two and three?", "answer": "5", "chain": [["2+3", "5"]]}
    without = gold | {"id": "b", "question": "And one?", "chain": []}
    for name, records in {"train": [gold, without], "eval_gsm8k": [gold | {"id": "c"}], "eval_svamp": [gold | {"id": "d"}] * 30}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    data = load_data(dataclasses.replace(SMALL, data_dir=str(tmp_path)), tmp_path)
    assert ([p.id for p in data.train], len(data.heldout), len(data.unseen)) == (["a", "b"], 1, 20)
    assert {demo[0].messages[1]["content"] for demo in demonstrations_for(EXPERIMENT, data.train, SMALL)} == {
        "Two and three?"
    }  # b has no gold calls
    with pytest.raises(UserError, match="there is no such file"):
        load_data(dataclasses.replace(SMALL, data_dir=str(tmp_path / "none")), tmp_path)
