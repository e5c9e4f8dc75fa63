"""Plausible mistakes about a query, of named kinds: what a person who half understands the question would write.

Each is a function of the query and the schema, both of which can be read off a prompt, so that a mistake can be learned as
a habit. Values of the database are never confused: which value comes next in a column is in no prompt, and a policy that
imitated such mistakes would learn not to copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from lightningrl.tasks.text_to_sql.query import Query, Term
from lightningrl.tasks.text_to_sql.schema import Column, Schema, quote

_OPPOSITE = {">": "<", "<": ">", ">=": "<", "=": "!=", "!=": "=", "NOT IN": "IN"}
_AGGREGATES = {"max": "min", "min": "max", "avg": "sum", "sum": "avg", "count": "max"}


def mistakes(query: Query, schema: Schema) -> Iterator[tuple[str, str]]:
    """(kind, SQL) of the mistakes that this query leaves room for. Whether one changes the answer is for the metric to say."""
    for kind, wrong in _clause_mistakes(query):
        yield kind, wrong.render()
    for kind, wrong in _name_mistakes(query, schema):
        yield kind, wrong.render()
    yield from _misspelled(query, schema)


def _clause_mistakes(query: Query) -> Iterator[tuple[str, Query]]:
    replace = dataclasses.replace
    if query.where:
        yield "missing_where", replace(query, where=query.where[:-1])
        last = query.where[-1]
        operator = _OPPOSITE.get(last.operator)
        if operator:
            yield "wrong_comparator", replace(query, where=(*query.where[:-1], replace(last, operator=operator)))
        if len(query.where) > 1:
            yield "wrong_connective", replace(query, connective="OR" if query.connective == "AND" else "AND")
    if query.having is not None:
        yield "missing_having", replace(query, having=None)
    if query.group is not None and query.select != (Term(query.group),):
        yield "missing_group", replace(query, group=None, having=None)
    if query.order is not None:
        yield "wrong_order", replace(query, descending=not query.descending)
        if query.limit is None:
            yield "missing_order", replace(query, order=None)
    if query.limit is not None:
        yield "missing_limit", replace(query, limit=None)
    for i, term in enumerate(query.select):
        if term.aggregate:
            swapped = replace(term, aggregate=_AGGREGATES[term.aggregate], distinct=False)
            yield "wrong_aggregate", replace(query, select=(*query.select[:i], swapped, *query.select[i + 1 :]))
            if query.group is None and not query.where:
                yield "missing_aggregate", replace(query, select=(replace(term, aggregate="", distinct=False),))


def _name_mistakes(query: Query, schema: Schema) -> Iterator[tuple[str, Query]]:
    replace = dataclasses.replace
    for i, term in enumerate(query.select):
        if term.column is not None:
            other = _other_column(term.column, schema, query)
            if other is not None:
                wrong = replace(query, select=(*query.select[:i], replace(term, column=other), *query.select[i + 1 :]))
                yield "wrong_column", replace(wrong, group=other) if query.group == term.column else wrong
            break
    if query.order is not None and query.order.column is not None:
        other = _other_column(query.order.column, schema, query)
        if other is not None:
            yield "wrong_order_column", replace(query, order=replace(query.order, column=other))
    if query.join is None and not query.columns():
        others = [table.name for table in schema.tables if table.name != query.table]
        if others:
            yield "wrong_table", replace(query, table=others[0])
    if query.join is not None:
        inner = {column.table for column in query.columns()}
        if inner <= {query.table}:
            yield "missing_join", replace(query, join=None)


def _other_column(column: Column, schema: Schema, query: Query) -> Column | None:
    """The next column of the table, counted round, that the query does not use, of the same use if there is one."""
    columns = list(schema.table(column.table).columns)
    at = columns.index(column)
    others = [other for other in (*columns[at + 1 :], *columns[:at]) if other not in query.columns()]
    alike = [other for other in others if other.use == column.use] or [other for other in others if other.use != "other"]
    return alike[0] if alike else None


def _misspelled(query: Query, schema: Schema) -> Iterator[tuple[str, str]]:
    """A column, or without one the table, by a name that the database does not have: the only mistake that is an error."""
    columns = query.columns()
    if not columns:
        yield "bad_table", dataclasses.replace(query, table=query.table + "_list").render()
        return
    column = columns[0]
    taken = {other.name.lower() for table in schema.tables for other in table.columns}
    names = [f"{column.table}_{column.name}", column.name + "s", "total_" + column.name]
    # In double quotes SQLite takes an unknown name for a text, and there is no error.
    names = [name for name in names if name.lower() not in taken and quote(name) == name]
    if names:
        yield "bad_column", _renamed(query, column, names[0]).render()


def _renamed(query: Query, column: Column, name: str) -> Query:
    other = dataclasses.replace(column, name=name)

    def term(old: Term) -> Term:
        return dataclasses.replace(old, column=other) if old.column == column else old

    return dataclasses.replace(
        query,
        select=tuple(term(old) for old in query.select),
        where=tuple(dataclasses.replace(old, term=term(old.term)) for old in query.where),
        group=other if query.group == column else query.group,
        order=term(query.order) if query.order else None,
    )
