"""What the question-answering experiment makes of its settings."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from experiments.multi_hop_qa import EXPERIMENT, Config, accuracy, load_data, question_from, report, reward, task_of
from experiments.training import Data, demonstrations_for
from lightningrl.errors import UserError
from lightningrl.fit import Fitted
from lightningrl.runtime.store import Store
from lightningrl.tasks.multi_hop_qa.questions import Question
from lightningrl.types import Rollout

SMALL = Config(worlds=4, questions=80, heldout_questions=20, demonstrations=90)


def test_held_out_questions_are_about_other_worlds(tmp_path: Path) -> None:
    data = load_data(SMALL, tmp_path)
    assert len(data.heldout) == 20 and 50 <= len(data.train) <= 60
    corpora = [{q.corpus for q in questions} for questions in (data.train, data.heldout)]
    assert len(corpora[0]) == 4 and not corpora[0] & corpora[1]
    assert not {q.question for q in data.train} & {q.question for q in data.heldout}
    assert len({task_of(q).id for q in (*data.train, *data.heldout)}) == len(data.train) + len(data.heldout)
    assert len({Path(corpus).read_text() for corpus in (*corpora[0], *corpora[1])}) == len(corpora[0]) + len(corpora[1])


def test_the_same_settings_give_the_same_data(tmp_path: Path) -> None:
    data = load_data(SMALL, tmp_path)
    assert load_data(SMALL, tmp_path) == data
    assert [q.question for q in load_data(dataclasses.replace(SMALL, seed=1), tmp_path / "1").heldout] != [q.question for q in data.heldout]


def test_a_question_survives_the_way_between_processes(tmp_path: Path) -> None:
    data = load_data(SMALL, tmp_path)
    for question in (*data.train, *data.heldout):
        assert question_from(json.loads(json.dumps(dataclasses.asdict(question)))) == question


def test_every_question_is_demonstrated_as_often_as_any_other(tmp_path: Path) -> None:
    data = load_data(SMALL, tmp_path)
    shown = collections.Counter(demo[0].messages[1]["content"] for demo in demonstrations_for(EXPERIMENT, data.train, SMALL))
    assert sum(shown.values()) == 90 and max(shown.values()) - min(shown.values()) <= 1 and len(shown) == len(data.train)
    assert not set(shown) & {question.question for question in data.heldout}


def test_the_reward_is_f1_and_form(tmp_path: Path) -> None:
    task = task_of(load_data(SMALL, tmp_path).train[0])
    seen, gold = dict(task.input), task.target["gold"]
    assert set(seen) == {"question", "corpus", "results"}  # nothing of the answer
    assert reward(seen, task.target, f"<answer> {gold} </answer>") == 1.0
    assert [reward(seen, task.target, said) for said in (gold, "", None, 7)] == [0.0] * 4
    assert reward(seen, task.target, "<answer> nobody </answer>") == 0.1
    assert reward(seen, task.target | {"aliases": ["nobody"]}, "<answer> nobody </answer>") == 1.0


def test_accuracy_is_squads_without_the_form(tmp_path: Path) -> None:
    question = dataclasses.replace(load_data(SMALL, tmp_path).heldout[0], answer="Port Ann", aliases=("Annport",))

    def run(said: str | None) -> tuple[Question, Rollout]:
        return question, Rollout("r", task_of(question), "g", 0, 0, (), {"reward": 1.0}, answer=said)

    runs = [run("<answer> the Annport </answer>"), run("<answer> Ann </answer>"), run("Port Ann"), run(None)]
    assert accuracy(runs) == {"exact_match": 0.25, "f1": pytest.approx((1 + 2 / 3) / 4)}
    assert accuracy([]) == {"exact_match": 0.0, "f1": 0.0}


def test_a_run_that_failed_counts_as_0(tmp_path: Path) -> None:
    """As it does in the held-out reward: one that ran out of time, and one that had an answer when its intermediate rewards failed."""
    questions = [dataclasses.replace(q, answer="Rome", aliases=(), hops=2) for q in load_data(SMALL, tmp_path).heldout[:4]]
    right = "<answer> Rome </answer>"
    runs: list[dict[str, Any]] = [
        {"outcome": {"reward": 1.0}, "answer": right},
        {"outcome": {"reward": 0.1}, "answer": "<answer> Oslo </answer>"},
        {"outcome": {}, "status": "timed_out", "error": "too slow"},
        {"outcome": {}, "status": "failed", "error": "the intermediate rewards", "answer": right},
    ]
    with Store(tmp_path / "rollouts.sqlite") as store:
        for iteration in (0, 1):
            for question, fields in zip(questions, runs, strict=True):
                id_ = f"heldout/{iteration}/{question.id}/0"
                rollout = Rollout(id=id_, task=task_of(question), group="g", sample=0, attempt=0, transitions=(), **fields)
                store.write(rollout, "heldout", iteration)
    fitted = Fitted(policy=None, metrics=({"iteration": 0}, {"iteration": 1}), out=tmp_path, compiled=0)  # type: ignore[arg-type]  # nobody asks for it
    said = report(fitted, Data([], questions))
    assert [said[f"{name}_{when}"] for name in ("exact_match", "f1") for when in ("before", "after")] == [0.25] * 4
    assert said["by_hops_after"] == {2: {"count": 4, "reward": pytest.approx(1.1 / 4)}}


def test_real_data_is_taken_from_a_folder(tmp_path: Path) -> None:
    def write(path: Path, *records: dict[str, object]) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))

    for name in ("musique", "hotpotqa"):
        record = {"id": "q", "question": "?", "answer": "Rome", "aliases": ["Roma"], "type": "2hop", "hops": 2, "support": ["a"]}
        write(tmp_path / name / "corpus.jsonl", {"pid": "a", "title": "Mill", "text": "old"})
        write(tmp_path / name / "train.jsonl", record, record | {"id": "r"})
        write(tmp_path / name / "eval.jsonl", record | {"id": "e", "question": "Held out?"})
    both = load_data(dataclasses.replace(SMALL, data_dir=str(tmp_path)), tmp_path / "out")
    assert (len(both.train), len(both.heldout)) == (4, 2) and len({q.id for q in both.train}) == 4
    one = load_data(dataclasses.replace(SMALL, data_dir=str(tmp_path / "musique"), heldout_questions=1), tmp_path / "out")
    assert (len(one.train), len(one.heldout)) == (2, 1)
    target = task_of(one.train[0]).target
    assert (target["gold"], target["aliases"], target["support"]) == ("Rome", ["Roma"], ["Mill"])
    assert task_of(one.train[0]).input["results"] == 3 and demonstrations_for(EXPERIMENT, one.train, SMALL) == []
    with pytest.raises(UserError, match="no corpus.jsonl"):
        load_data(dataclasses.replace(SMALL, data_dir=str(tmp_path / "none")), tmp_path / "out")
    with pytest.raises(UserError, match="there is no such folder; give a local encoder checkpoint"):
        load_data(dataclasses.replace(SMALL, data_dir=str(tmp_path), encoder=str(tmp_path / "none")), tmp_path / "out")
    with pytest.raises(UserError, match="--encoder is for the passages of --data_dir"):
        load_data(dataclasses.replace(SMALL, encoder=str(tmp_path)), tmp_path / "out")
