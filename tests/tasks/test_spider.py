"""Spider in its official layout: what is loaded, what golds and perturbed golds score, what is said of a torn download."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightningrl.errors import UserError
from lightningrl.tasks.text_to_sql.__main__ import check
from lightningrl.tasks.text_to_sql.demonstrations import demonstrate
from lightningrl.tasks.text_to_sql.hardness import hardness
from lightningrl.tasks.text_to_sql.metric import execution_match
from lightningrl.tasks.text_to_sql.questions import Question
from lightningrl.tasks.text_to_sql.spider import accuracy_by_hardness, load_spider, with_mistakes
from tests.tasks.test_demonstrations import PROMPTS


@pytest.fixture
def tiny(tmp_path: Path, pets: Path) -> Path:
    """A data set in Spider's layout, as the official files have it: no `gold_rows`, no `hardness`."""
    (tmp_path / "database/pets").mkdir(parents=True)
    shutil.copy(pets, tmp_path / "database/pets/pets.sqlite")
    records = [
        {"db_id": "pets", "question": "Who are the dogs?", "query": "SELECT name FROM pet WHERE kind = 'dog'"},
        {"db_id": "pets", "question": "Who is very old?", "query": "SELECT name FROM pet WHERE age > 99"},
    ]
    columns = [[-1, "*"], [0, "id"], [0, "name"], [0, "kind"], [0, "age"], [1, "id"], [1, "pet_id"], [1, "year"]]
    write(tmp_path / "dev.json", records)
    write(tmp_path / "train_spider.json", records)
    write(
        tmp_path / "tables.json",
        [{"db_id": "pets", "table_names_original": ["pet", "visit"], "column_names_original": columns}],
    )
    return tmp_path


def write(path: Path, contents: Any) -> None:
    path.write_text(json.dumps(contents), encoding="utf-8")


def test_dev_is_whole_and_its_golds_score_one(spider_dir: Path) -> None:
    report = check(spider_dir, ["dev"])
    assert (report["questions"], report["databases"], report["gold_score"], report["failed"]) == (788, 14, 1.0, [])


def test_hardness_is_the_official_one_on_all_of_dev(spider_dir: Path) -> None:
    records = json.loads((spider_dir / "dev.json").read_text(encoding="utf-8"))
    assert [hardness(record["query"]) for record in records] == [record["hardness"] for record in records]


def test_empty_golds_stay_out_of_training(spider_dir: Path) -> None:
    train = load_spider(spider_dir, "train")
    assert (len(train), min(question.gold_rows for question in train)) == (6639 - 155, 1)
    assert sum(question.gold_rows == 0 for question in load_spider(spider_dir, "dev")) == 39


@pytest.mark.parametrize(
    ("gold", "perturbed", "match"),
    [
        ("SELECT name FROM singer WHERE country = 'France'", "SELECT song_name FROM singer WHERE country = 'France'", False),
        ("SELECT name FROM singer WHERE country = 'France'", "SELECT name FROM singer", False),
        (
            "SELECT name, country, age FROM singer ORDER BY age DESC",
            "SELECT name, country, age FROM singer ORDER BY age",
            False,
        ),
        (
            "SELECT name, country, age FROM singer ORDER BY age DESC",
            "SELECT age, name, country FROM singer ORDER BY age DESC",
            True,
        ),
        ("SELECT DISTINCT country FROM singer WHERE age > 20", "SELECT country FROM singer WHERE age > 20", True),
        ("SELECT count(*) FROM singer", "SELECT count(*) FROM concert", True),  # 6 and 6: one database cannot tell them apart
        ("SELECT count(*) FROM singer", "SELECT count(*) FROM stadium", False),
    ],
)
def test_perturbed_golds(spider_dir: Path, gold: str, perturbed: str, match: bool) -> None:
    assert execution_match(gold, perturbed, spider_dir / "database/concert_singer/concert_singer.sqlite") is match


def test_the_official_files_are_enough(tiny: Path) -> None:
    dev = load_spider(tiny, "dev")
    assert [(q.id, q.gold_rows, q.hardness, q.kind) for q in dev] == [
        ("dev_00000", 3, "easy", "spider"),
        ("dev_00001", 0, "easy", "spider"),
    ]
    assert dev[0].schema == "pet(id,name,kind,age) visit(id,pet_id,year)"
    assert [question.id for question in load_spider(tiny, "train")] == ["train_00000"]
    assert len(load_spider(tiny, "train", with_empty=True)) == 2


def test_a_shortened_schema_keeps_what_the_question_mentions(tiny: Path) -> None:
    record = {"db_id": "pets", "question": "What are the years of visits?", "query": "SELECT year FROM visit"}
    write(tiny / "dev.json", [record])
    assert load_spider(tiny, "dev", max_schema_chars=25)[0].schema == "visit(id,pet_id,year)"
    assert load_spider(tiny, "dev", max_schema_chars=1)[0].schema == "visit(year)"


def test_a_mistake_is_the_answer_to_another_question(tiny: Path) -> None:
    queries = [
        "SELECT name FROM pet WHERE kind = 'dog'",
        "SELECT name FROM pet WHERE kind != 'cat' AND kind = 'dog'",  # gives the same
        "SELECT count(*) FROM pet",
        "SELECT kind FROM pet",
    ]
    write(tiny / "train_spider.json", [{"db_id": "pets", "question": f"Question {i}?", "query": sql} for i, sql in enumerate(queries)])
    questions = load_spider(tiny, "train")
    made = with_mistakes(questions, 0, count=2)
    assert [dataclasses.replace(q, wrong=()) for q in made] == questions
    for question in made:
        wrong = [sql for _, sql in question.wrong]
        assert len(set(wrong)) == 2 and set(wrong) <= set(queries)
        assert not any(execution_match(question.gold, sql, question.database) for sql in wrong)
    assert made == with_mistakes(questions, 0, count=2)
    (alone,) = with_mistakes(questions[:1], 0)
    assert alone.wrong == ()
    calls = demonstrate(made[0], PROMPTS, np.random.default_rng(0))
    assert calls[0].role == "writer" and calls[0].response in (made[0].gold, *(sql for _, sql in made[0].wrong))


def test_accuracy_by_hardness() -> None:
    def question(level: str, rows: int) -> Question:
        return Question("q", "d", "?", "SELECT 1", "spider", level, "", gold_rows=rows)

    questions = [question("easy", 1), question("easy", 0), question("extra", 2), question("extra", 1)]
    assert accuracy_by_hardness(questions, [True, True, False, True]) == {
        "easy": {"count": 2, "accuracy": 1.0},
        "extra": {"count": 2, "accuracy": 0.5},
        "all": {"count": 4, "accuracy": 0.75},
        "all_with_rows": {"count": 3, "accuracy": 2 / 3},
    }
    assert accuracy_by_hardness([], []) == {}
    with pytest.raises(ValueError, match="do not belong together"):
        accuracy_by_hardness(questions, [True])


def test_what_is_missing_is_said_in_one_sentence(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def broken(message: str, split: Any = "dev", path: Path = tiny) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_spider(path, split)
        assert "\n" not in str(caught.value)

    broken("no split 'test'", split="test")
    broken("dev.json: there is no such file", path=tmp_path_factory.mktemp("none"))
    write(tiny / "dev.json", [{"db_id": "pets", "question": "?"}])
    broken("record 0 has no text field 'query'")
    write(tiny / "dev.json", [{"db_id": "cows", "question": "?", "query": "SELECT 1"}])
    broken("database cows of dev.json is not described there")
    (tiny / "dev.json").write_text("[{")
    broken("this is not JSON")
    (tiny / "database/pets/pets.sqlite").unlink()
    broken("the database of record 0 of train_spider.json is missing", split="train")
    (tiny / "tables.json").unlink()
    broken("tables.json: there is no such file", split="train")


def run_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lightningrl.tasks.text_to_sql", "--check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])


def test_the_check_command(tiny: Path) -> None:
    done = run_check(str(tiny))
    report = json.loads(done.stdout)
    assert (done.returncode, report["questions"], report["databases"], report["gold_score"]) == (0, 4, 1, 1.0)
    assert report["seconds"] >= 0
    records = json.loads((tiny / "dev.json").read_text())
    write(tiny / "dev.json", [{**records[0], "gold_rows": 7}, {**records[1], "query": "SELECT nme FROM pet", "gold_rows": 1}])
    report = json.loads(run_check(str(tiny), "--split", "dev").stdout)
    assert (report["gold_score"], report["failed"]) == (0.0, ["dev_00000", "dev_00001"])


def test_the_check_command_on_a_wrong_directory(tmp_path: Path) -> None:
    done = run_check(str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and "there is no such file" in done.stderr
