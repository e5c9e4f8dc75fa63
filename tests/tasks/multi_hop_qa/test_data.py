"""MuSiQue, 2Wiki and HotpotQA: what is loaded, what golds score, and what is said of a torn download."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightningrl.errors import UserError
from lightningrl.tasks.multi_hop_qa.__main__ import check
from lightningrl.tasks.multi_hop_qa.data import data_sets, load_questions

CORPUS = [
    {"pid": "a", "title": "Mill", "text": "The mill belongs to Ann."},
    {"pid": "b", "title": "Ann", "text": "Ann was born in Rome."},
    {"pid": "c", "title": "Sea", "text": "Salty."},
]
RECORD = {
    "id": "q0",
    "question": "Where was the owner of the mill born?",
    "answer": "Rome",
    "aliases": ["Roma"],
    "type": "2hop",
    "hops": 2,
    "support": ["a", "b"],
}


def write(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / "musique"
    folder.mkdir()
    write(folder / "corpus.jsonl", CORPUS)
    write(folder / "train.jsonl", [RECORD, RECORD | {"id": "q1", "answer": "The", "aliases": []}])
    write(folder / "eval.jsonl", [RECORD])
    return folder


def test_a_question_is_loaded(tiny: Path) -> None:
    (question,) = load_questions(tiny, "eval")
    assert (question.id, question.corpus, question.kind, question.hops) == ("musique-q0", str(tiny / "corpus.jsonl"), "2hop", 2)
    assert (question.answers, question.support, question.passages) == (("Rome", "Roma"), ("Mill", "Ann"), ("a", "b"))
    assert question.gold is None and question.wrong == ()


def test_one_data_set_or_a_folder_of_several(tiny: Path) -> None:
    assert data_sets(tiny) == data_sets(tiny.parent) == [tiny]
    with pytest.raises(UserError, match="no corpus.jsonl here"):
        data_sets(tiny / "none")


def test_a_broken_line_is_named_by_its_number(tiny: Path) -> None:
    def broken(message: str, *records: Any) -> None:
        write(tiny / "eval.jsonl", [RECORD, *records])
        with pytest.raises(UserError, match=message) as caught:
            load_questions(tiny, "eval")
        assert "\n" not in str(caught.value)

    broken("eval.jsonl, line 2: there is no text field 'answer'", {k: v for k, v in RECORD.items() if k != "answer"})
    broken("line 2: there is no list of texts 'support'", RECORD | {"support": "a"})
    broken("line 3: the supporting passage z is not in corpus.jsonl", RECORD, RECORD | {"support": ["z"]})
    broken("line 2: there is no number 'hops'", RECORD | {"hops": None})
    (tiny / "eval.jsonl").write_text(json.dumps(RECORD) + '\n{"id": "q')
    with pytest.raises(UserError, match="eval.jsonl, line 2: not valid JSON"):
        load_questions(tiny, "eval")
    (tiny / "eval.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no questions"):
        load_questions(tiny, "eval")
    (tiny / "eval.jsonl").unlink()
    with pytest.raises(UserError, match="cannot read .*eval.jsonl"):
        load_questions(tiny, "eval")
    with pytest.raises(UserError, match="no split 'dev'"):
        load_questions(tiny, "dev")


def test_check_runs_gold_answers(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = check(tiny)
    assert (report["questions"], report["gold_score"], report["failed"]) == (3, 1.0, [])
    assert report["all_support_in_top_20"] == {"musique": {"train": 1.0, "eval": 1.0}}
    monkeypatch.setattr("lightningrl.tasks.multi_hop_qa.__main__.TOP", 1)
    assert check(tiny, ["eval"])["all_support_in_top_20"] == {"musique": {"eval": 0.0}}  # two passages are not in the first one


def test_check_names_what_fails(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightningrl.tasks.multi_hop_qa.__main__.TOP", 1)
    twins = [{"pid": "d", "title": "Mill", "text": "The mill belongs to Ann."}]
    write(tiny / "corpus.jsonl", [*CORPUS, *twins])
    write(tiny / "train.jsonl", [RECORD | {"support": ["d"]}])  # the earlier twin is found instead
    report = check(tiny)
    assert report["failed"] == ["musique-q0"] and report["gold_score"] == 0.5
    write(tiny / "train.jsonl", [RECORD | {"answer": " ", "aliases": []}])
    assert check(tiny, ["train"])["gold_score"] == 0.0  # nothing can be answered


def test_the_check_command(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightningrl.tasks.multi_hop_qa", "--cache", str(tmp_path / "cache"), "--check"]
    done, torn = (
        subprocess.run([*command, str(path)], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
        for path in (tiny, tiny / "none")
    )
    report = json.loads(done.stdout)
    assert (done.returncode, report["questions"], report["gold_score"]) == (0, 3, 1.0) and report["seconds"] >= 0
    assert torn.returncode == 1 and "no corpus.jsonl here" in torn.stderr and "Traceback" not in torn.stderr


@pytest.mark.slow
def test_gold_answers_of_the_real_data_score_one(multihop_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """And a search for the raw question leaves as much to a second search as was published with the data."""
    report = check(multihop_dir, ["eval"], cache=tmp_path_factory.mktemp("indexes"))
    assert (report["questions"], report["gold_score"], report["failed"]) == (97 + 89 + 91, 1.0, [])
    for name, share in (("musique", 0.412), ("2wiki", 0.539), ("hotpotqa", 0.879)):
        assert abs(report["all_support_in_top_20"][name]["eval"] - share) <= 0.02


@pytest.mark.slow
def test_gold_answers_to_train_on_score_one_too(multihop_dir: Path) -> None:
    report = check(multihop_dir, ["train"])
    assert (report["questions"], report["gold_score"], report["failed"]) == (1189 + 867 + 479, 1.0, [])
