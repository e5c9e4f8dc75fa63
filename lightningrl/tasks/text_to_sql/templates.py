"""The kinds of question: each draws, from a schema, a text and the query that answers it, or nothing if it finds no room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from lightningrl.tasks.text_to_sql.query import COUNT, Condition, Query, Term
from lightningrl.tasks.text_to_sql.schema import Column, Link, Schema, Table, literal, words

Draft = tuple[str, Query]
T = TypeVar("T")

_SAID = {"max": "highest", "min": "lowest", "avg": "average", "sum": "total"}


class Draw:
    """Seeded choices from a schema. A choice among nothing ends the draft."""

    def __init__(self, schema: Schema, rng: np.random.Generator) -> None:
        self.schema = schema
        self.rng = rng

    def one(self, options: Sequence[T]) -> T:
        if not options:
            raise LookupError
        return options[int(self.rng.integers(len(options)))]

    def coin(self) -> bool:
        return bool(self.rng.integers(2))

    def table(self) -> Table:
        return self.one(self.schema.tables)

    def shown(self, table: Table, *other_than: Column) -> Column:
        """A column to show: what the rows are called, mostly."""
        labels = [column for column in table.of_use("label") if column not in other_than]
        rest = [column for column in table.of_use("category", "number", "other") if column not in other_than]
        return self.one(labels if labels and (not rest or self.rng.random() < 0.7) else rest)

    def category(self, table: Table) -> Column:
        return self.one(table.of_use("category"))

    def number(self, table: Table, *, to_add: bool = False, complete: bool = False) -> Column:
        numbers = table.of_use("number")
        return self.one([c for c in numbers if not (to_add and c.text_number) and (c.complete or not complete)])

    def equal(self, column: Column) -> tuple[str, Condition]:
        value = self.one(column.values)
        return f"{column.said} {value}", Condition(Term(column), "=", literal(value))

    def compared(self, column: Column) -> tuple[str, Condition]:
        value, above = self.one(column.values), self.coin()
        said = f"{column.said} {'above' if above else 'below'} {value}"
        return said, Condition(Term(column), ">" if above else "<", literal(value))

    def link(self) -> tuple[Link, Table, Table]:
        link = self.one(self.schema.links)
        return link, self.schema.table(link.child), self.schema.table(link.parent)


def one_of(table: Table) -> str:
    return words(table.name)


def many(table: Table) -> str:
    """The plural by the plain rule, which is what a reader of the schema expects."""
    name = words(table.name)
    if name.endswith("s"):
        return name
    return name[:-1] + "ies" if name.endswith("y") and name[-2:-1] not in tuple("aeiou") else name + "s"


def list_column(d: Draw) -> Draft:
    t = d.table()
    a = d.shown(t)
    return f"List the {a.said} of all {many(t)}", Query(t.name, (Term(a),))


def list_two(d: Draw) -> Draft:
    t = d.table()
    a = d.shown(t)
    b = d.shown(t, a)
    return f"List the {a.said} and {b.said} of all {many(t)}", Query(t.name, (Term(a), Term(b)))


def filter_category(d: Draw) -> Draft:
    t = d.table()
    said, condition = d.equal(d.category(t))
    a = d.shown(t, *_in(condition))
    return f"List the {a.said} of {many(t)} with {said}", Query(t.name, (Term(a),), where=(condition,))


def filter_number(d: Draw) -> Draft:
    t = d.table()
    said, condition = d.compared(d.number(t))
    a = d.shown(t, *_in(condition))
    return f"List the {a.said} of {many(t)} with {said}", Query(t.name, (Term(a),), where=(condition,))


def filter_not(d: Draw) -> Draft:
    t = d.table()
    c = d.category(t)
    value = d.one(c.values)
    a = d.shown(t, c)
    where = (Condition(Term(c), "!=", literal(value)),)
    return f"List the {a.said} of {many(t)} whose {c.said} is not {value}", Query(t.name, (Term(a),), where=where)


def look_up(d: Draw) -> Draft:
    t = d.table()
    label = d.one(t.of_use("label"))
    value = d.one(label.values)
    a = d.shown(t, label)
    text = f"What is the {a.said} of the {one_of(t)} with {label.said} {value}"
    return text, Query(t.name, (Term(a),), where=(Condition(Term(label), "=", literal(value)),))


def two_conditions(d: Draw) -> Draft:
    t = d.table()
    first_said, first = d.equal(d.category(t))
    second_said, second = d.compared(d.number(t))
    a = d.shown(t, *_in(first, second))
    text = f"List the {a.said} of {many(t)} with {first_said} and {second_said}"
    return text, Query(t.name, (Term(a),), where=(first, second))


def either(d: Draw) -> Draft:
    t = d.table()
    c = d.category(t)
    first = d.one(c.values)
    second = d.one([value for value in c.values if value != first])
    a = d.shown(t, c)
    where = tuple(Condition(Term(c), "=", literal(value)) for value in (first, second))
    text = f"List the {a.said} of {many(t)} with {c.said} {first} or {second}"
    return text, Query(t.name, (Term(a),), where=where, connective="OR")


def between(d: Draw) -> Draft:
    t = d.table()
    n = d.number(t)
    first = d.one(n.values)
    low, high = sorted((first, d.one([value for value in n.values if value != first])))
    a = d.shown(t, n)
    where = (Condition(Term(n), "BETWEEN", f"{literal(low)} AND {literal(high)}"),)
    return f"List the {a.said} of {many(t)} with {n.said} between {low} and {high}", Query(t.name, (Term(a),), where=where)


def count(d: Draw) -> Draft:
    t = d.table()
    return f"How many {many(t)} are there", Query(t.name, (COUNT,))


def count_category(d: Draw) -> Draft:
    t = d.table()
    said, condition = d.equal(d.category(t))
    return f"How many {many(t)} have {said}", Query(t.name, (COUNT,), where=(condition,))


def count_number(d: Draw) -> Draft:
    t = d.table()
    said, condition = d.compared(d.number(t))
    return f"How many {many(t)} have {said}", Query(t.name, (COUNT,), where=(condition,))


def count_distinct(d: Draw) -> Draft:
    t = d.table()
    c = d.category(t)
    return f"How many different {c.said} do {many(t)} have", Query(t.name, (Term(c, "count", distinct=True),))


def distinct(d: Draw) -> Draft:
    t = d.table()
    c = d.category(t)
    return f"List the different {c.said} of {many(t)}", Query(t.name, (Term(c),), distinct=True)


def aggregate(d: Draw) -> Draft:
    t = d.table()
    n = d.number(t, to_add=True)
    how = d.one(tuple(_SAID))
    return f"What is the {_SAID[how]} {n.said} of all {many(t)}", Query(t.name, (Term(n, how),))


def aggregate_category(d: Draw) -> Draft:
    t = d.table()
    n = d.number(t, to_add=True)
    said, condition = d.equal(d.category(t))
    how = d.one(tuple(_SAID))
    return f"What is the {_SAID[how]} {n.said} of {many(t)} with {said}", Query(t.name, (Term(n, how),), where=(condition,))


def order(d: Draw) -> Draft:
    t = d.table()
    by = d.one([c for c in t.of_use("number", "label") if c.complete])
    a = d.shown(t, by) if by.use == "number" else by
    down = d.coin()
    text = f"List the {a.said} of all {many(t)} by {by.said} {'descending' if down else 'ascending'}"
    return text, Query(t.name, (Term(a),), order=Term(by), descending=down)


def superlative(d: Draw) -> Draft:
    t = d.table()
    n = d.number(t, complete=True)
    a = d.shown(t, n)
    down = d.coin()
    text = f"What is the {a.said} of the {one_of(t)} with the {'highest' if down else 'lowest'} {n.said}"
    return text, Query(t.name, (Term(a),), order=Term(n), descending=down, limit=1)


def superlative_category(d: Draw) -> Draft:
    t = d.table()
    n = d.number(t, complete=True)
    said, condition = d.equal(d.category(t))
    a = d.shown(t, n, *_in(condition))
    down = d.coin()
    text = f"What is the {a.said} of the {one_of(t)} with {said} and the {'highest' if down else 'lowest'} {n.said}"
    return text, Query(t.name, (Term(a),), where=(condition,), order=Term(n), descending=down, limit=1)


def top(d: Draw) -> Draft:
    t = d.table()
    n = d.number(t, complete=True)
    a = d.shown(t, n)
    down, limit = d.coin(), int(d.rng.integers(2, 5))
    text = f"List the {a.said} of the {limit} {many(t)} with the {'highest' if down else 'lowest'} {n.said}"
    return text, Query(t.name, (Term(a),), order=Term(n), descending=down, limit=limit)


def above_average(d: Draw) -> Draft:
    t = d.table()
    n = d.number(t, to_add=True)
    a = d.shown(t, n)
    above = d.coin()
    inner = "(" + Query(t.name, (Term(n, "avg"),)).render() + ")"
    text = f"List the {a.said} of {many(t)} with {n.said} {'above' if above else 'below'} average"
    return text, Query(t.name, (Term(a),), where=(Condition(Term(n), ">" if above else "<", inner),))


def group_count(d: Draw) -> Draft:
    t = d.table()
    c = d.category(t)
    return f"How many {many(t)} are there for each {c.said}", Query(t.name, (Term(c), COUNT), group=c)


def group_aggregate(d: Draw) -> Draft:
    t = d.table()
    c, n = d.category(t), d.number(t, to_add=True)
    how = d.one(tuple(_SAID))
    text = f"What is the {_SAID[how]} {n.said} of {many(t)} for each {c.said}"
    return text, Query(t.name, (Term(c), Term(n, how)), group=c)


def most_common(d: Draw) -> Draft:
    t = d.table()
    c, down = d.category(t), d.coin()
    text = f"Which {c.said} has the {'most' if down else 'fewest'} {many(t)}"
    return text, Query(t.name, (Term(c),), group=c, order=COUNT, descending=down, limit=1)


def having(d: Draw) -> Draft:
    t = d.table()
    c, least = d.category(t), int(d.rng.integers(2, 8))
    condition = Condition(COUNT, ">=", str(least))
    return f"Which {c.said} has at least {least} {many(t)}", Query(t.name, (Term(c),), group=c, having=condition)


def join_list(d: Draw) -> Draft:
    link, child, parent = d.link()
    a, b = d.shown(child), d.shown(parent)
    text = f"List the {a.said} of each {one_of(child)} and the {b.said} of its {one_of(parent)}"
    return text, Query(child.name, (Term(a), Term(b)), join=link)


def join_category(d: Draw) -> Draft:
    link, child, parent = d.link()
    said, condition = d.equal(d.one(parent.of_use("category", "label")))
    a = d.shown(child)
    text = f"List the {a.said} of {many(child)} whose {one_of(parent)} has {said}"
    return text, Query(child.name, (Term(a),), join=link, where=(condition,))


def join_number(d: Draw) -> Draft:
    link, child, parent = d.link()
    said, condition = d.compared(d.number(parent))
    a = d.shown(child)
    text = f"List the {a.said} of {many(child)} whose {one_of(parent)} has {said}"
    return text, Query(child.name, (Term(a),), join=link, where=(condition,))


def join_count(d: Draw) -> Draft:
    link, child, parent = d.link()
    said, condition = d.equal(d.one(parent.of_use("category", "label")))
    text = f"How many {many(child)} are there whose {one_of(parent)} has {said}"
    return text, Query(child.name, (COUNT,), join=link, where=(condition,))


def join_group(d: Draw) -> Draft:
    link, child, parent = d.link()
    c = d.one(parent.of_use("category", "label"))
    text = f"How many {many(child)} are there for each {one_of(parent)} {c.said}"
    return text, Query(child.name, (Term(c), COUNT), join=link, group=c)


def join_most(d: Draw) -> Draft:
    link, child, parent = d.link()
    c, down = d.one(parent.of_use("label", "category")), d.coin()
    text = f"Which {one_of(parent)} {c.said} has the {'most' if down else 'fewest'} {many(child)}"
    return text, Query(child.name, (Term(c),), join=link, group=c, order=COUNT, descending=down, limit=1)


def without(d: Draw) -> Draft:
    link, child, parent = d.link()
    a = d.shown(parent)
    target = next(column for column in parent.columns if column.name == link.target)
    column = next(column for column in child.columns if column.name == link.column)
    inner = "(" + Query(child.name, (Term(column),)).render() + ")"
    text = f"List the {a.said} of {many(parent)} without any {one_of(child)}"
    return text, Query(parent.name, (Term(a),), where=(Condition(Term(target), "NOT IN", inner, column),))


def _in(*conditions: Condition) -> list[Column]:
    return [condition.term.column for condition in conditions if condition.term.column is not None]


KINDS: dict[str, Callable[[Draw], Draft]] = {
    kind.__name__: kind
    for kind in (
        list_column, list_two, filter_category, filter_number, filter_not, look_up, two_conditions, either, between,
        count, count_category, count_number, count_distinct, distinct, aggregate, aggregate_category,
        order, superlative, superlative_category, top, above_average, group_count, group_aggregate, most_common, having,
        join_list, join_category, join_number, join_count, join_group, join_most, without,
    )
}  # fmt: skip
