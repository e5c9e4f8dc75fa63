"""The SQL tool lets reads through and nothing else, for a bounded time and a bounded result."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import sqlite3
import time
from pathlib import Path

import pytest

from lightningrl.errors import UserError
from lightningrl.tasks.text_to_sql.sql_tool import MAX_EXPANSION, QueryResult, as_text, check_database, expansion, run_query

ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "


def test_a_query_gives_its_rows_and_columns(pets: Path) -> None:
    result = run_query(pets, "SELECT name, age FROM pet WHERE kind = 'dog' ORDER BY id;")
    assert result == QueryResult([("Rex", 3), ("Bo", 9), ("Tom", 7)], ("name", "age"))


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE pet",
        "DELETE FROM pet",
        "UPDATE pet SET age = 0",
        "INSERT INTO pet (name) VALUES ('x')",
        "REPLACE INTO pet SELECT * FROM pet",
        "CREATE TABLE x (y)",
        "CREATE TEMP TABLE x (y)",
        "CREATE TRIGGER t AFTER INSERT ON pet BEGIN SELECT 1; END",
        "ALTER TABLE pet RENAME TO cat",
        "ATTACH 'other.sqlite' AS other",
        "VACUUM",
        "VACUUM INTO 'copy.sqlite'",
        "PRAGMA journal_mode = WAL",
        "PRAGMA query_only = OFF",
        "PRAGMA user_version = 3",
        "PRAGMA writable_schema = ON",
        "BEGIN",
        "SAVEPOINT s",
        "ANALYZE",
    ],
)
def test_what_is_not_a_read_is_an_error(pets: Path, sql: str) -> None:
    before = pets.read_bytes()
    beside = sorted(os.listdir(pets.parent))
    result = run_query(pets, sql)
    assert (result.rows, result.error) == (None, "only reading is allowed")
    assert pets.read_bytes() == before
    assert sorted(os.listdir(pets.parent)) == beside


@pytest.mark.parametrize(
    ("sql", "error"),
    [
        ("SELECT load_extension('x')", "the function load_extension is not allowed"),
        ("SELECT random()", "the function random is not allowed"),
        ("SELECT zeroblob(2000000000)", "the function zeroblob is not allowed"),
        ("SELECT printf('%*s', 1000000000, 'x')", "the function printf is not allowed"),
        ("SELECT 1; DROP TABLE pet", "only one statement is allowed"),
        ("", "the query has no SELECT"),
        ("-- nothing", "the query has no SELECT"),
        ("REINDEX", "the query has no SELECT"),
        ("SELECT nam FROM pet", "no such column: nam"),
        ("SELECT x FROM cow", "no such table: cow"),
        ("SELEC 1", 'near "SELEC": syntax error'),
        ("SELECT '\ud800'", "the query is not valid text"),
        ("SELECT 1" + " " * 30_000, "a value or the query is too long"),
    ],
)
def test_an_error_is_one_clear_text(pets: Path, sql: str, error: str) -> None:
    result = run_query(pets, sql)
    assert result.rows is None
    assert result.error == error


@pytest.mark.parametrize(
    "sql",
    [
        ENDLESS + "SELECT count(*) FROM c",
        ENDLESS + "SELECT x FROM c ORDER BY -x",
        "SELECT count(*) FROM " + ", ".join(f"pet AS p{i}" for i in range(12)),
        "SELECT max(p0.age + p9.age) FROM " + ", ".join(f"pet AS p{i}" for i in range(12)) + " GROUP BY p1.id",
    ],
)
def test_a_query_past_its_time_is_stopped(pets: Path, sql: str) -> None:
    before = pets.read_bytes()
    assert run_query(pets, sql, time_limit_s=0.2).error == "stopped after 0.2 s"
    assert pets.read_bytes() == before


def test_a_result_past_its_rows_is_an_error(pets: Path) -> None:
    assert run_query(pets, ENDLESS + "SELECT x FROM c").error == "more than 1000 rows"
    assert run_query(pets, "SELECT 1 FROM " + ", ".join(f"pet p{i}" for i in range(10))).error == "more than 1000 rows"
    assert run_query(pets, "SELECT id FROM pet", max_rows=8).error == "more than 8 rows"
    assert len(run_query(pets, "SELECT id FROM pet", max_rows=9).rows or []) == 9


def test_long_values_and_large_results_are_errors(pets: Path) -> None:
    doubled = "SELECT a" + "||a" * 60 + " FROM (SELECT hex(hex(hex(hex(hex(hex(name||name||name)))))) AS a FROM pet WHERE id = 7)"
    assert run_query(pets, doubled).error == "a value or the query is too long"
    many = (
        "WITH RECURSIVE w(x, n) AS (SELECT 'ab', 1 UNION ALL SELECT x || x, n + 1 FROM w WHERE n < 17),"
        " c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c) SELECT (SELECT x FROM w WHERE n = 17) || i FROM c"
    )
    assert run_query(pets, many).error == "the result is larger than 16000000 bytes"


def test_nested_table_expressions_do_not_multiply_without_end(pets: Path) -> None:
    def nested(depth: int) -> str:
        steps = [f"a{i} AS (SELECT 1 FROM a{i - 1} x, a{i - 1} y)" for i in range(1, depth + 1)]
        return "WITH a0 AS (SELECT 1), " + ", ".join(steps) + f" SELECT count(*) FROM a{depth}"

    assert run_query(pets, nested(3)).rows == [(1,)]
    assert expansion(nested(30)) > MAX_EXPANSION
    assert run_query(pets, nested(30)).error == "the common table expressions are nested too deeply"
    assert expansion('WITH "a b" (x) AS MATERIALIZED (SELECT 1) SELECT * FROM [a b], [a b] /* [a b] */') == 3
    assert expansion("SELECT name FROM pet") == 1


def test_reading_pragmas_and_ordinary_functions_work(pets: Path) -> None:
    assert run_query(pets, "PRAGMA table_info(visit)").rows == [
        (0, "id", "INTEGER", 0, None, 1),
        (1, "pet_id", "INTEGER", 0, None, 0),
        (2, "year", "INTEGER", 0, None, 0),
    ]
    assert run_query(pets, "SELECT upper(substr(name, 1, 2)), round(weight * 2) FROM pet WHERE name LIKE 'r%'").rows == [("RE", 6.0)]


def test_many_threads_read_one_file(pets: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda i: run_query(pets, f"SELECT {i}, count(*) FROM pet"), range(400)))
    assert [result.rows for result in results] == [[(i, 9)] for i in range(400)]


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    for value in ("one", "three"):
        new = tmp_path / "new"
        with contextlib.closing(sqlite3.connect(new)) as connection, connection:
            connection.execute("CREATE TABLE t (x)")
            connection.execute("INSERT INTO t VALUES (?)", (value,))
        os.replace(new, path)
        assert run_query(path, "SELECT x FROM t").rows == [(value,)]


def test_a_file_in_wal_mode_is_read_without_files_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "odd name?#%20.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (x)")
        connection.execute("INSERT INTO t VALUES (1)")
        connection.commit()
    assert run_query(path, "SELECT x FROM t").rows == [(1,)]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_missing_file_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    result = run_query(tmp_path / "none.sqlite", "SELECT 1")
    assert result.rows is None and "none.sqlite" in (result.error or "")
    assert list(tmp_path.iterdir()) == []


def test_check_database_says_what_is_wrong(tmp_path: Path, pets: Path) -> None:
    check_database(pets)
    (tmp_path / "text.sqlite").write_text("id,name\n1,Ann and more text than a header has\n")
    (tmp_path / "nothing.sqlite").touch()
    with contextlib.closing(sqlite3.connect(tmp_path / "bare.sqlite")) as connection, connection:
        connection.execute("CREATE TABLE t (x)")
    (tmp_path / "torn.sqlite").write_bytes(pets.read_bytes()[:100] + b"\xff" * 5000)
    for name, words in {
        "text.sqlite": "not an SQLite database",
        "nothing.sqlite": "the file is empty",
        "bare.sqlite": "the database is empty",
        "torn.sqlite": "cannot read this file",
        "none.sqlite": "there is no such file",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            check_database(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="there is no such file"):
        check_database(tmp_path)


def test_results_as_text() -> None:
    assert as_text(QueryResult([("Ann", 31), (None, 2.5)])) == "Ann,31; NULL,2.5"
    assert as_text(QueryResult([(1.0,), (1 / 3,)])) == "1; 0.33"
    assert as_text(QueryResult([(i,) for i in range(7)])) == "0; 1; 2; 3; 4; ... 7 rows"
    assert as_text(QueryResult([])) == "no rows"
    assert as_text(QueryResult(None, error="no such column: x")) == "error: no such column: x"
    assert as_text(QueryResult([("y" * 100,)])) == "y" * 37 + "..."


def test_the_limit_is_of_each_query_and_not_of_the_connection(pets: Path) -> None:
    assert run_query(pets, ENDLESS + "SELECT count(*) FROM c", time_limit_s=0.01).error == "stopped after 0.01 s"
    time.sleep(0.02)
    assert run_query(pets, "SELECT count(*) FROM pet").rows == [(9,)]


def test_functions_of_texts_are_sqlites_own(pets: Path) -> None:
    trimmed = "trim('xxaxx', 'x'), ltrim('xxax', 'xy'), rtrim('xxax', 'x'), trim(' a ')"
    found = "instr('abc', 'c'), instr(2.5, '.'), instr(x'0102', x'02')"
    assert run_query(pets, f"SELECT {trimmed}, {found}").rows == [("a", "ax", "xxa", "a", 3, 2, 2)]
    nothing = "trim('', 'x'), trim('a', ''), trim(NULL, 'a'), trim('a', NULL), instr('a', ''), instr(NULL, 'a'), instr(3.0, '0')"
    assert run_query(pets, f"SELECT {nothing}").rows == [("", "a", None, None, 1, None, 3)]


LONG = "WITH RECURSIVE n(i, x) AS (SELECT 0, 'x' UNION ALL SELECT i + 1, x || x FROM n WHERE i < 17) "


@pytest.mark.parametrize(
    ("sql", "error"),
    [
        (LONG + "SELECT trim(x, replace(substr(x, 1, 15000), 'x', 'y') || 'x') FROM n", "trim takes off one of 100 characters at most"),
        ("SELECT " + ", ".join(map(str, range(300))), "too many columns in result set"),
        ("WITH " + "'" * 20_001, "a value or the query is too long"),
    ],
)
def test_what_would_take_long_before_anybody_looks_is_refused(pets: Path, sql: str, error: str) -> None:
    assert run_query(pets, sql) == QueryResult(None, error=error)


def test_a_result_that_comes_too_late_is_an_error(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single instruction may take longer than the limit, and SQLite looks at no clock in it."""
    monkeypatch.setattr("lightningrl.tasks.text_to_sql.sql_tool._PROGRESS_STEPS", 10**9)
    with contextlib.closing(sqlite3.connect(pets)) as connection:  # another stamp, and so a new session
        connection.execute("CREATE TABLE late (x)")
    result = run_query(pets, ENDLESS + "SELECT max(x) FROM (SELECT x FROM c LIMIT 300000)", time_limit_s=0.01)
    assert (result.rows, result.error) == (None, "stopped after 0.01 s")
