"""The project's own databases: the same bytes for the same seed, and domains that training never sees."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightningrl.errors import UserError
from lightningrl.tasks.text_to_sql.databases import build_databases
from lightningrl.tasks.text_to_sql.domains import TRAINING, UNSEEN, Names, Number, Reference
from lightningrl.tasks.text_to_sql.schema import Link, read_schema
from lightningrl.tasks.text_to_sql.sql_tool import run_query


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    first, again = (build_databases(tmp_path / name, seed=3, count=11) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert [path.name for path in first] == [path.name for path in again]
    other = build_databases(tmp_path / "c", seed=4, count=11)
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(first, other, strict=True))


def test_a_domain_that_comes_again_has_other_contents(tmp_path: Path) -> None:
    paths = build_databases(tmp_path, seed=0, count=len(TRAINING) + 1)
    assert (paths[0].name, paths[-1].name) == ("music.sqlite", "music2.sqlite")
    assert paths[0].read_bytes() != paths[-1].read_bytes()


def test_building_again_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "music.sqlite.part").write_text("left by a run that was killed")
    build_databases(tmp_path, seed=0, count=1)
    build_databases(tmp_path, seed=0, count=1)
    assert [path.name for path in tmp_path.iterdir()] == ["music.sqlite"]


def test_unseen_domains_share_no_table_with_training() -> None:
    assert len(TRAINING) >= 10 and len(UNSEEN) >= 3
    trained = {table.name for domain in TRAINING for table in domain.tables}
    unseen = {table.name for domain in UNSEEN for table in domain.tables}
    assert not trained & unseen
    assert len({domain.name for domain in TRAINING + UNSEEN}) == len(TRAINING) + len(UNSEEN)


@pytest.mark.parametrize("domain", TRAINING + UNSEEN, ids=lambda domain: domain.name)
def test_every_plan_can_be_filled(domain) -> None:
    known: set[str] = set()
    assert 2 <= len(domain.tables) <= 3
    for table in domain.tables:
        assert 15 <= table.rows[0] <= table.rows[1] <= 40
        for values in table.columns.values():
            if isinstance(values, Names):
                assert len(set(values.pool)) == len(values.pool) >= table.rows[1]
            if isinstance(values, Reference):
                assert values.table in known
            if isinstance(values, Number) and values.different:
                assert (values.high - values.low) // values.step + 1 >= table.rows[1]
        known.add(table.name)


def test_contents_are_as_planned(own_databases: list[Path]) -> None:
    schema = read_schema(own_databases[0])
    assert schema.links == (Link("concert", "singer_id", "singer", "id"),)
    assert [(c.name, c.use) for c in schema.table("singer").columns] == [
        ("id", "key"),
        ("name", "label"),
        ("country", "category"),
        ("age", "number"),
        ("genre", "category"),
    ]
    orphans = "SELECT count(*) FROM concert WHERE singer_id NOT IN (SELECT id FROM singer)"
    assert run_query(own_databases[0], orphans).rows == [(0,)]


def test_no_database_is_not_a_request(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ask for at least 1"):
        build_databases(tmp_path, seed=0, count=0)
