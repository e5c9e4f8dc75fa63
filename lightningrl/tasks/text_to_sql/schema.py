"""What is in a database, found by looking: tables, what each column is good for, and which column points at which."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightningrl.tasks.text_to_sql.sql_tool import check_database, run_query

Use = Literal["key", "label", "category", "number", "other"]

_SEEN_ROWS = 2000  # rows of a table that are looked at
_LONGEST = 24  # characters of a value that a question may quote
_KEYWORDS = frozenset(
    """abort action add after all alter always analyze and as asc attach autoincrement before begin between by cascade case
    cast check collate column commit conflict constraint create cross current default deferrable deferred delete desc detach
    distinct do drop each else end escape except exclude exclusive exists explain fail filter first following for foreign
    from full generated glob group groups having if ignore immediate in index indexed initially inner insert instead
    intersect into is isnull join key last left like limit match materialized natural no not nothing notnull null nulls of
    offset on or order others outer over partition plan pragma preceding primary query raise range recursive references
    regexp reindex release rename replace restrict returning right rollback row rows savepoint select set table temp
    temporary then ties to transaction trigger unbounded union unique update using vacuum values view virtual when where
    window with without""".split()
)


def quote(name: str) -> str:
    """A name as SQL writes it: bare where that is allowed, in double quotes otherwise."""
    if re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) and name.lower() not in _KEYWORDS:
        return name
    return '"' + name.replace('"', '""') + '"'


def literal(value: Any) -> str:
    """A stored value as SQL writes it."""
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)


def words(name: str) -> str:
    """A name as a question says it: `Song_release_year` and `songReleaseYear` are `song release year`."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return " ".join(re.findall(r"[^\W_]+", spaced)).lower() or name


@dataclasses.dataclass(frozen=True)
class Column:
    """A column and what its contents make it good for."""

    table: str
    name: str
    use: Use
    values: tuple[Any, ...]  # distinct values fit for a question, in order
    complete: bool  # no NULL among the rows seen
    text_number: bool = False  # numbers of equal length kept as text: they compare, but are not added up

    @property
    def sql(self) -> str:
        return quote(self.name)

    @property
    def said(self) -> str:
        return words(self.name)


@dataclasses.dataclass(frozen=True)
class Table:
    name: str
    columns: tuple[Column, ...]
    rows: int  # at most `_SEEN_ROWS`

    @property
    def sql(self) -> str:
        return quote(self.name)

    def of_use(self, *uses: Use) -> list[Column]:
        return [column for column in self.columns if column.use in uses]


@dataclasses.dataclass(frozen=True)
class Link:
    """`child.column` points at `parent.target`."""

    child: str
    column: str
    parent: str
    target: str


@dataclasses.dataclass(frozen=True)
class Schema:
    tables: tuple[Table, ...]
    links: tuple[Link, ...]

    def table(self, name: str) -> Table:
        return next(table for table in self.tables if table.name == name)


def read_schema(database: str | Path) -> Schema:
    """Looks into a database: its tables and views that have rows, and its foreign keys.

    Where no foreign key is declared, a column called like another table's key is taken for one. Raises `UserError` as
    `check_database` does, also where no column can be read.
    """
    check_database(database)
    listed = run_query(database, "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') ORDER BY rowid", max_rows=100_000)
    names = [row[0] for row in listed.rows or [] if not row[0].startswith("sqlite_")]
    declared = [link for name in names for link in _declared_links(database, name)]
    keys = {(link.child.lower(), link.column.lower()) for link in declared}
    keys |= {(link.parent.lower(), link.target.lower()) for link in declared}
    tables = tuple(table for name in names if (table := _read_table(database, name, keys)) is not None)
    return Schema(tables, _resolve(declared or _guessed_links(tables), tables))


def _read_table(database: str | Path, name: str, keys: Collection[tuple[str, str]]) -> Table | None:
    info = run_query(database, f"PRAGMA table_info({quote(name)})")
    seen = run_query(database, f"SELECT * FROM {quote(name)} LIMIT {_SEEN_ROWS}", max_rows=_SEEN_ROWS)
    if not seen.rows or not info.rows:
        return None
    sole_key = [row[1] for row in info.rows if row[5]]
    columns = []
    for i, column in enumerate(seen.columns):
        is_key = (
            (name.lower(), column.lower()) in keys
            or sole_key == [column]
            or bool(re.search(r"(^id$|_id$|[a-z]I[dD]$|^uid$)", column) or re.search(r"(^| |_)id$", column.lower()))
        )
        columns.append(_column(name, column, [row[i] for row in seen.rows], is_key))
    return Table(name, tuple(columns), len(seen.rows))


def _column(table: str, name: str, stored: list[Any], is_key: bool) -> Column:
    values = [value for value in stored if value is not None and value != ""]
    complete = len(values) == len(stored)
    distinct = list(dict.fromkeys(values))
    if is_key or not values:
        texts = all(isinstance(value, str) for value in values)
        # A key that people read, such as a country's code or a person's name, can still be asked for.
        readable = bool(values) and texts and not any(value.isdigit() for value in values)
        return Column(table, name, "label" if readable else "key", _quotable(distinct) if readable else (), complete)
    if all(isinstance(value, int | float) for value in values):
        use: Use = "number" if len(distinct) > 2 else "category"
        return Column(table, name, use, tuple(sorted(distinct)), complete)
    if not all(isinstance(value, str) for value in values):
        return Column(table, name, "other", (), complete)
    if all(value.isdigit() for value in values) and len({len(value) for value in values}) == 1 and len(distinct) > 2:
        return Column(table, name, "number", tuple(sorted(distinct)), complete, text_number=True)
    quotable = _quotable(distinct)
    if not quotable:
        return Column(table, name, "other", (), complete)
    repeats = len(distinct) <= 0.7 * len(values) and len(distinct) > 1
    return Column(table, name, "category" if repeats else "label", quotable, complete)


def _quotable(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(value for value in values if len(value) <= _LONGEST and value.isprintable() and value.strip() == value))


def _declared_links(database: str | Path, table: str) -> list[Link]:
    rows = run_query(database, f"PRAGMA foreign_key_list({quote(table)})").rows or []
    composite = {row[0] for row in rows if row[1] > 0}
    links = []
    for number, _, parent, column, target, *_ in rows:
        if number in composite:
            continue
        if target is None:
            info = run_query(database, f"PRAGMA table_info({quote(parent)})").rows or []
            target = next((row[1] for row in info if row[5]), None)
        if target is not None:
            links.append(Link(table, column, parent, target))
    return links[::-1]


def _guessed_links(tables: Sequence[Table]) -> list[Link]:
    links = []
    for parent in tables:
        target = parent.columns[0]
        if target.use != "key":
            continue
        name = target.name if target.name.lower() != "id" else f"{parent.name}_id"
        links += [
            Link(child.name, column.name, parent.name, target.name)
            for child in tables
            for column in child.columns
            if child is not parent and column.name.lower() in {name.lower(), name.lower().replace("_", "")}
        ]
    return links


def _resolve(links: Sequence[Link], tables: Sequence[Table]) -> tuple[Link, ...]:
    """The links between tables that have rows, in the spelling of their definitions; SQLite's names have no case."""
    by_name = {table.name.lower(): table for table in tables}
    resolved = []
    for link in links:
        child, parent = by_name.get(link.child.lower()), by_name.get(link.parent.lower())
        if child is None or parent is None or child is parent:
            continue
        column = next((c.name for c in child.columns if c.name.lower() == link.column.lower()), None)
        target = next((c.name for c in parent.columns if c.name.lower() == link.target.lower()), None)
        if column and target:
            resolved.append(Link(child.name, column, parent.name, target))
    return tuple(dict.fromkeys(resolved))


def describe(tables: Sequence[tuple[str, Sequence[str]]]) -> str:
    """The schema as a prompt shows it: `singer(id,name,age) concert(id,singer_id,year)`."""
    return " ".join(f"{quote(table)}({','.join(quote(column) for column in columns)})" for table, columns in tables)


def describe_for(schema: Schema, needed: Sequence[tuple[str, str]], max_chars: int, rng: np.random.Generator) -> str:
    """The schema, or of a large one the needed (table, column) pairs with as many distractors as `max_chars` has room for.

    Tables and columns stand in the order of the database whatever was needed. The needed ones are always there.
    """
    everything = [(table.name, column.name) for table in schema.tables for column in table.columns]
    kept = set(everything)
    if len(_shown(everything, kept)) > max_chars:
        kept = set(needed)
        tables = {table for table, _ in needed}
        near = [pair for pair in everything if pair[0] in tables and pair not in kept]
        far = [pair for pair in everything if pair[0] not in tables]
        for pair in [near[i] for i in rng.permutation(len(near))] + [far[i] for i in rng.permutation(len(far))][:6]:
            if len(_shown(everything, kept | {pair})) <= max_chars:
                kept.add(pair)
    return _shown(everything, kept)


def _shown(everything: Sequence[tuple[str, str]], kept: Collection[tuple[str, str]]) -> str:
    tables: dict[str, list[str]] = {}
    for table, column in everything:
        if (table, column) in kept:
            tables.setdefault(table, []).append(column)
    return describe(list(tables.items()))
