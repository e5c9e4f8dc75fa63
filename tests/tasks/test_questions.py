"""Generated questions: gold answers that hold, mistakes that do not, and a split that lets nothing through."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import sqlite3
from pathlib import Path

import pytest

from lightningrl.errors import UserError
from lightningrl.tasks.text_to_sql.metric import execution_match
from lightningrl.tasks.text_to_sql.questions import MAX_GOLD_CHARS, Question, generate_questions, split_questions
from lightningrl.tasks.text_to_sql.schema import read_schema
from lightningrl.tasks.text_to_sql.sql_tool import run_query
from lightningrl.tasks.text_to_sql.templates import KINDS

# Names that need quotes, a keyword, texts with quotes, years kept as text, blobs, an empty table, and views of both fates.
ODD = (
    'CREATE TABLE "Order Items" ("Item No" INTEGER PRIMARY KEY, "group" TEXT, "Unit ""Price""" REAL, [When] TEXT, Raw BLOB);'
    "INSERT INTO 'Order Items' VALUES (1, 'a''b', 1.5, '2001', x'00'), (2, 'a''b', 2.5, '2003', x'01');"
    "INSERT INTO 'Order Items' VALUES (3, 'c', 9, '2002', NULL);"
    "INSERT INTO 'Order Items' VALUES (4, 'c', 3.5, '2004', x'02'), (5, 'd', 4.5, '2005', NULL), (6, 'd', 7, '2009', NULL);"
    "CREATE TABLE empty (id INTEGER, name TEXT);"
    'CREATE VIEW cheap AS SELECT "group" AS kind, "Unit ""Price""" AS price FROM "Order Items" WHERE "Item No" < 5;'
    "CREATE VIEW broken AS SELECT a FROM nowhere;"
    "CREATE TABLE numbers (n TEXT, m);"
    "INSERT INTO numbers VALUES ('9', 1), ('10', 2.5), ('11', NULL), ('7', 'x');"
)


@pytest.fixture(scope="module")
def questions(own_databases: list[Path]) -> list[Question]:
    return [question for database in own_databases[:3] for question in generate_questions(database, seed=0, count=200)]


def check(question: Question) -> None:
    result = run_query(question.database, question.gold)
    assert result.rows and len(result.rows) == question.gold_rows
    assert any(value is not None for row in result.rows for value in row)
    assert execution_match(question.gold, question.gold, question.database)
    assert len(question.wrong) >= 2 and len(dict(question.wrong)) == len(question.wrong)
    for mistake, sql in question.wrong:
        assert not execution_match(question.gold, sql, question.database), (mistake, sql)
        if mistake.startswith("bad_"):
            assert "no such" in (run_query(question.database, sql).error or "")
    assert question.kind in KINDS and question.hardness in ("easy", "medium", "hard", "extra")
    assert len(question.gold) <= MAX_GOLD_CHARS


@pytest.mark.slow
def test_gold_answers_hold_and_mistakes_do_not(questions: list[Question]) -> None:
    for question in questions:
        check(question)


def test_texts_golds_and_ids_are_unique_on_a_database(questions: list[Question]) -> None:
    assert len(questions) == 600
    assert len({question.id for question in questions}) == 600
    assert len({(question.database, question.question.lower()) for question in questions}) == 600
    assert len({(question.database, question.gold) for question in questions}) == 600


def test_every_kind_of_question_and_of_mistake_occurs(questions: list[Question]) -> None:
    assert {question.kind for question in questions} == set(KINDS)
    assert len(KINDS) >= 15
    mistakes = collections.Counter(mistake for question in questions for mistake, _ in question.wrong)
    for mistake in (
        "wrong_column",
        "missing_where",
        "wrong_comparator",
        "wrong_aggregate",
        "wrong_order",
        "wrong_table",
        "bad_column",
        "missing_limit",
        "missing_group",
    ):
        assert mistakes[mistake] > 0, mistake
    assert {question.hardness for question in questions} >= {"easy", "medium", "hard"}


def test_the_prompt_is_short_and_names_what_the_gold_needs(questions: list[Question]) -> None:
    for question in questions:
        assert len(question.schema) <= 160 and len(question.question) <= 120
    assert questions[0].schema == "singer(id,name,country,age,genre) concert(id,title,singer_id,city,year,price)"


def test_the_same_seed_gives_the_same_questions_wherever_the_file_is(own_databases: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / own_databases[4].name
    copy.write_bytes(own_databases[4].read_bytes())
    first = generate_questions(own_databases[4], seed=5, count=60)
    again = generate_questions(copy, seed=5, count=60)
    assert [dataclasses.replace(question, database="") for question in first] == [
        dataclasses.replace(question, database="") for question in again
    ]
    other = generate_questions(copy, seed=6, count=60)
    assert {question.question for question in other} != {question.question for question in first}


def test_the_split_trains_on_nothing_held_out(questions: list[Question]) -> None:
    train, heldout = split_questions(questions, 200, seed=0)
    assert len(heldout) == 200
    assert not {q.question.lower() for q in train} & {q.question.lower() for q in heldout}
    assert not {(q.database, q.gold) for q in train} & {(q.database, q.gold) for q in heldout}
    shares = collections.Counter(question.kind for question in heldout)
    have = collections.Counter(question.kind for question in questions)
    # 200 of 600: a third of every kind, to one question; every kind is trained on, the rarest too.
    assert all(abs(shares[kind] - have[kind] / 3) <= 1 for kind in KINDS)
    assert {question.kind for question in train} == {question.kind for question in heldout} == set(KINDS)
    assert split_questions(questions, 200, seed=0) == (train, heldout)
    assert split_questions(questions, 200, seed=1)[1] != heldout


def test_the_split_keeps_shared_texts_and_golds_out_of_training() -> None:
    def question(id: str, database: str, text: str, gold: str) -> Question:
        return Question(id, database, text, gold, "count", "easy", "")

    twins = [
        question("1", "a", "How many dogs", "SELECT 1"),
        question("2", "b", "how many dogs", "SELECT 2"),
        question("3", "a", "Number of dogs", "SELECT 1"),
        question("4", "a", "How many cats", "SELECT 3"),
    ]
    for seed in range(20):
        train, heldout = split_questions(twins, 1, seed)
        assert {q.id for q in train} <= {"1": {"4"}, "2": {"3", "4"}, "3": {"2", "4"}, "4": {"1", "2", "3"}}[heldout[0].id]


def test_too_few_questions_to_split_is_said(questions: list[Question]) -> None:
    with pytest.raises(UserError, match="too few to hold out 10"):
        split_questions(questions[:10], 10, seed=0)


@pytest.mark.slow
def test_a_small_database_of_ones_own_has_room(spider_dir: Path) -> None:
    database = spider_dir / "database/concert_singer/concert_singer.sqlite"
    train, heldout = split_questions(generate_questions(database, seed=0, count=400), 120, seed=0)
    assert len(heldout) == 120 and len(train) >= 250
    for question in [*train, *heldout]:
        check(question)
        assert len(question.schema) + len(question.question) <= 280


def test_odd_databases(tmp_path: Path) -> None:
    path = tmp_path / "odd.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(ODD)
    schema = read_schema(path)
    assert [table.name for table in schema.tables] == ["Order Items", "cheap", "numbers"]
    found = generate_questions(path, seed=0, count=150)
    assert len(found) >= 80 and any('"Order Items"' in question.gold for question in found)
    assert any("''" in question.gold for question in found) and any("FROM cheap" in question.gold for question in found)
    for question in found:
        check(question)


def test_tables_without_declared_keys_are_linked_by_name(tmp_path: Path) -> None:
    path = tmp_path / "plain.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE town (id INTEGER, name TEXT)")
        connection.execute("CREATE TABLE house (id INTEGER, town_id INTEGER, price INTEGER)")
        connection.executemany("INSERT INTO town VALUES (?, ?)", [(1, "Ulm"), (2, "Bonn"), (3, "Kiel")])
        connection.executemany("INSERT INTO house VALUES (?, ?, ?)", [(i, 1 + i % 2, 10 * i) for i in range(1, 9)])
    assert [(link.child, link.column) for link in read_schema(path).links] == [("house", "town_id")]
    assert any(question.kind.startswith("join") for question in generate_questions(path, seed=0, count=60))


def test_ties_are_not_asked_about(tmp_path: Path) -> None:
    path = tmp_path / "ties.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE cup (name TEXT, size INTEGER)")
        connection.executemany("INSERT INTO cup VALUES (?, ?)", [("a", 1), ("b", 3), ("c", 3), ("d", 2)])
    golds = [question.gold for question in generate_questions(path, seed=0, count=80)]
    assert "SELECT name FROM cup ORDER BY size LIMIT 1" in golds
    assert "SELECT name FROM cup ORDER BY size DESC LIMIT 1" not in golds


def test_a_file_without_questions_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.sqlite").write_text("no database at all")
    with pytest.raises(UserError, match="not an SQLite database"):
        generate_questions(tmp_path / "a.sqlite", 0, 5)
    with contextlib.closing(sqlite3.connect(tmp_path / "b.sqlite")) as connection, connection:
        connection.execute("CREATE TABLE t (x BLOB)")
        connection.execute("INSERT INTO t VALUES (x'00')")
    with pytest.raises(UserError, match="no question can be made"):
        generate_questions(tmp_path / "b.sqlite", 0, 5)
