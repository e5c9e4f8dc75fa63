"""What the word-problem experiment makes of its settings."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path

import pytest

from experiments.math_tool import EXPERIMENT, Config, load_data, problem_from, reward, task_of
from experiments.training import demonstrations_for, same_data
from lightningrl.config import same_run
from lightningrl.errors import UserError

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
