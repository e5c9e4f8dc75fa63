"""Execution match on cases labelled by hand after the official rule, and against the rule written out plainly."""

from __future__ import annotations

import collections
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightningrl.errors import UserError
from lightningrl.tasks.text_to_sql.metric import Denotation, execution_match, has_order_by, normalise, results_match

CASES = [
    # gold, prediction, match
    ("SELECT name FROM pet WHERE kind = 'dog'", "SELECT name FROM pet WHERE kind = 'dog'", True),
    ("SELECT name FROM pet WHERE kind = 'dog'", "SELECT T1.name FROM pet AS T1 WHERE kind LIKE 'DOG';", True),
    # wrong column, missing WHERE, wrong comparator, a failing query, no query, another statement
    ("SELECT name FROM pet WHERE kind = 'dog'", "SELECT age FROM pet WHERE kind = 'dog'", False),
    ("SELECT name FROM pet WHERE kind = 'dog'", "SELECT name FROM pet", False),
    ("SELECT name FROM pet WHERE age > 3", "SELECT name FROM pet WHERE age >= 3", False),
    ("SELECT name FROM pet WHERE age > 3", "SELECT naem FROM pet WHERE age > 3", False),
    ("SELECT name FROM pet WHERE age > 3", "", False),
    ("SELECT name FROM pet WHERE age > 3", "DROP TABLE pet", False),
    ("SELECT count(*) FROM pet", "SELECT count(*) FROM pet; SELECT 1", False),
    # the order of rows counts only where the gold orders
    ("SELECT name FROM pet ORDER BY age, id", "SELECT name FROM pet ORDER BY age DESC, id", False),
    ("SELECT name FROM pet ORDER BY age, id", "SELECT name FROM pet ORDER BY id", False),
    ("SELECT name FROM pet", "SELECT name FROM pet ORDER BY age DESC", True),
    ("SELECT name FROM pet WHERE name != 'order by'", "SELECT name FROM pet ORDER BY age DESC", True),
    ("SELECT age FROM pet WHERE id IN (1, 2, 3) ORDER BY age", "SELECT age FROM pet WHERE id IN (1, 2, 3) ORDER BY chip", True),
    # columns in any order, but all of them and no more
    ("SELECT name, age FROM pet", "SELECT age, name FROM pet", True),
    ("SELECT name, age FROM pet ORDER BY id", "SELECT age, name FROM pet ORDER BY id", True),
    ("SELECT name, age FROM pet", "SELECT name FROM pet", False),
    ("SELECT name FROM pet", "SELECT name, age FROM pet", False),
    ("SELECT id, age, weight, kind, name FROM pet", "SELECT name, weight, kind, id, age FROM pet", True),
    ("SELECT id, age, weight, kind, name FROM pet", "SELECT name, weight, kind, id, id FROM pet", False),
    # rows are a multiset
    ("SELECT kind FROM pet WHERE kind = 'dog'", "SELECT kind FROM pet WHERE id = 1", False),
    ("SELECT age FROM pet WHERE age = 1", "SELECT 1 UNION ALL SELECT 1", True),
    ("SELECT kind FROM pet WHERE id < 4", "SELECT 'dog' UNION ALL SELECT 'dog' UNION ALL SELECT 'cat'", False),
    # DISTINCT is stripped from both sides, also within count
    ("SELECT DISTINCT kind FROM pet", "SELECT kind FROM pet", True),
    ("SELECT kind FROM pet", "select distinct(kind) from pet", True),
    ("SELECT DISTINCT kind FROM pet", "SELECT kind FROM pet GROUP BY kind", False),
    ("SELECT count(DISTINCT kind) FROM pet", "SELECT count(kind) FROM pet", True),
    ("SELECT count(*) FROM pet WHERE name = 'a distinct  order by one'", "SELECT 1", True),
    ("SELECT count(*) FROM pet WHERE name = 'a distinct  order by one'", "SELECT 0", False),
    # NULL equals NULL and nothing else
    ("SELECT chip FROM pet WHERE id = 5", "SELECT NULL", True),
    ("SELECT chip FROM pet WHERE id = 5", "SELECT ''", False),
    ("SELECT chip FROM pet WHERE id = 5", "SELECT 0", False),
    ("SELECT kind, age FROM pet WHERE id > 7", "SELECT age, kind FROM pet WHERE id > 7", True),
    # numbers are equal by value, texts are not numbers
    ("SELECT age FROM pet WHERE id = 1", "SELECT weight FROM pet WHERE id = 1", True),
    ("SELECT age, 30 FROM pet WHERE id = 1", "SELECT 30.0, weight FROM pet WHERE id = 1", True),
    ("SELECT age FROM pet WHERE id = 1", "SELECT chip FROM pet WHERE id = 1", False),
    ("SELECT age FROM pet WHERE id = 2", "SELECT weight FROM pet WHERE id = 2", False),
    ("SELECT avg(age) FROM pet WHERE id < 3", "SELECT 4", True),
    # no rows match no rows, whatever the columns
    ("SELECT name FROM pet WHERE age > 99", "SELECT id, age FROM pet WHERE age > 77", True),
    ("SELECT name FROM pet WHERE age > 99", "SELECT name FROM pet", False),
    ("SELECT name FROM pet", "SELECT name FROM pet WHERE age > 99", False),
    # the official clean-up
    ("SELECT name FROM pet WHERE age > = 6", "SELECT name FROM pet WHERE age >= 6", True),
    ("SELECT YEAR(CURDATE()) FROM pet WHERE id = 1", "SELECT 2020", True),
    # the join that multiplies rows is not the set of rows
    ("SELECT pet.name FROM pet JOIN visit ON pet.id = visit.pet_id", "SELECT name FROM pet WHERE id IN (1, 2, 4)", False),
    ('SELECT count(*) FROM pet WHERE kind = "dog"', "SELECT 3", True),
]


@pytest.mark.parametrize(("gold", "prediction", "match"), CASES)
def test_hand_labelled_cases(pets: Path, gold: str, prediction: str, match: bool) -> None:
    assert execution_match(gold, prediction, pets) is match


def test_distinct_counts_where_it_is_kept(pets: Path) -> None:
    assert not execution_match("SELECT DISTINCT kind FROM pet", "SELECT kind FROM pet", pets, keep_distinct=True)
    assert execution_match("SELECT DISTINCT kind FROM pet", "SELECT kind FROM pet GROUP BY kind", pets, keep_distinct=True)


@pytest.mark.parametrize(
    ("sql", "run"),
    [
        ("SELECT DISTINCT a FROM t", "SELECT  a FROM t"),
        ("select count(distinct a) from t", "select count( a) from t"),
        ("SELECT a FROM t WHERE b = 'distinct ''distinct'' > ='", "SELECT a FROM t WHERE b = 'distinct ''distinct'' > ='"),
        ('SELECT "distinct", [distinct], `distinct` FROM t', 'SELECT "distinct", [distinct], `distinct` FROM t'),
        ("SELECT a FROM t WHERE a IS NOT DISTINCT FROM b", "SELECT a FROM t WHERE a IS NOT DISTINCT FROM b"),
        ("SELECT distinctive FROM t WHERE a ! = 1 AND b < = 2", "SELECT distinctive FROM t WHERE a != 1 AND b <= 2"),
        ("SELECT a -- DISTINCT\nFROM t /* DISTINCT */", "SELECT a -- DISTINCT\nFROM t /* DISTINCT */"),
        ("SELECT 'open", "SELECT 'open"),
    ],
)
def test_normalise_leaves_quotes_and_comments_alone(sql: str, run: str) -> None:
    assert normalise(sql) == run


def test_order_by_is_a_clause() -> None:
    assert has_order_by("SELECT a FROM t ORDER\n BY a") and has_order_by("SELECT a FROM (SELECT a FROM t order by a)")
    assert not has_order_by("SELECT 'order by' FROM t -- order by") and not has_order_by("SELECT border FROM by_order")


def test_a_gold_query_that_fails_is_a_fault_of_the_data(pets: Path) -> None:
    with pytest.raises(UserError, match="the gold query .* cannot be run .no such column: nme."):
        execution_match("SELECT nme FROM pet", "SELECT 1", pets)


def plain_rule(gold: list[tuple[Any, ...]], rows: list[tuple[Any, ...]], ordered: bool) -> bool:
    if not gold and not rows:
        return True
    if len(gold) != len(rows) or len(gold[0]) != len(rows[0]):
        return False
    for order in itertools.permutations(range(len(rows[0]))):
        permuted = [tuple(row[i] for i in order) for row in rows]
        if permuted == gold if ordered else collections.Counter(permuted) == collections.Counter(gold):
            return True
    return False


VALUES = st.sampled_from([None, 0, 1, 1.0, "1", "a", 2])


def tables(columns: int) -> st.SearchStrategy[list[tuple[Any, ...]]]:
    return st.lists(st.tuples(*[VALUES] * columns), max_size=4)


@given(st.data(), st.booleans(), st.integers(1, 4))
def test_the_search_decides_as_the_plain_rule(data: st.DataObject, ordered: bool, columns: int) -> None:
    gold = data.draw(tables(columns))
    if data.draw(st.booleans()):
        order = data.draw(st.permutations(range(columns)))
        rows = [tuple(row[i] for i in order) for row in data.draw(st.permutations(gold))]
    else:
        rows = data.draw(tables(data.draw(st.integers(1, 4))))
    assert results_match(Denotation.of(gold, ordered), rows) is plain_rule(gold, rows, ordered)


def test_thirty_alike_columns_are_decided_at_once() -> None:
    gold = [tuple((i + j) % 2 for j in range(30)) for i in range(40)]
    assert results_match(Denotation.of(gold, False), [row[::-1] for row in gold])
    assert not results_match(Denotation.of(gold, False), [(1 - row[0], *row[1:]) for row in gold])
