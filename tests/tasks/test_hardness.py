"""Spider's rule for how hard a query is, on queries counted by hand."""

from __future__ import annotations

import pytest

from lightningrl.tasks.text_to_sql.hardness import hardness


@pytest.mark.parametrize(
    ("sql", "level"),
    [
        ("SELECT count(*) FROM t", "easy"),
        ("SELECT a FROM t WHERE b = 'x or union y'", "easy"),
        ("SELECT a FROM t WHERE b BETWEEN 1 AND 2", "easy"),
        ("SELECT a, b FROM t", "medium"),
        ("SELECT a FROM t WHERE b = 1 AND c = 2", "medium"),
        ("SELECT a FROM t ORDER BY b LIMIT 1", "medium"),
        ("SELECT t.a FROM t JOIN u ON t.id = u.id WHERE u.b = 1", "medium"),
        ("SELECT a FROM t WHERE b > (SELECT avg(b) FROM t)", "hard"),
        ("SELECT a FROM t UNION SELECT a FROM u", "hard"),
        ("SELECT t.a FROM t JOIN u ON t.id = u.id GROUP BY t.a ORDER BY t.a", "hard"),
        ("SELECT t.a FROM t JOIN u ON t.id = u.id GROUP BY t.a ORDER BY count(*) DESC LIMIT 1", "extra"),
        ("SELECT a FROM t WHERE b = 1 AND c NOT IN (SELECT c FROM u)", "extra"),
    ],
)
def test_components_are_counted(sql: str, level: str) -> None:
    assert hardness(sql) == level
