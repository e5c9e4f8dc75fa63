"""A query as its clauses, so that a question's gold answer and the mistakes about it are made from the same parts."""

from __future__ import annotations

import dataclasses

from lightningrl.tasks.text_to_sql.schema import Column, Link, quote


@dataclasses.dataclass(frozen=True)
class Term:
    """`age`, `avg(age)`, `count(DISTINCT city)`; without a column it is `count(*)`."""

    column: Column | None
    aggregate: str = ""
    distinct: bool = False

    def render(self, qualified: bool) -> str:
        if self.column is None:
            return "count(*)"
        name = f"{quote(self.column.table)}.{self.column.sql}" if qualified else self.column.sql
        if not self.aggregate:
            return name
        return f"{self.aggregate}({'DISTINCT ' if self.distinct else ''}{name})"


COUNT = Term(None)


@dataclasses.dataclass(frozen=True)
class Condition:
    """`term operator value`; the value is SQL already."""

    term: Term
    operator: str
    value: str
    inner: Column | None = None  # the column that a subquery in `value` selects

    def render(self, qualified: bool) -> str:
        return f"{self.term.render(qualified)} {self.operator} {self.value}"


@dataclasses.dataclass(frozen=True)
class Query:
    table: str
    select: tuple[Term, ...]
    distinct: bool = False
    join: Link | None = None  # the other table of the link is joined to `table`
    where: tuple[Condition, ...] = ()
    connective: str = "AND"
    group: Column | None = None
    having: Condition | None = None
    order: Term | None = None
    descending: bool = False
    limit: int | None = None

    def render(self) -> str:
        qualified = self.join is not None
        parts = ["SELECT " + ("DISTINCT " if self.distinct else "") + ", ".join(t.render(qualified) for t in self.select)]
        parts.append(f"FROM {quote(self.table)}")
        if self.join is not None:
            link = self.join
            other = link.parent if self.table == link.child else link.child
            parts.append(f"JOIN {quote(other)} ON {quote(link.child)}.{quote(link.column)} = {quote(link.parent)}.{quote(link.target)}")
        if self.where:
            parts.append("WHERE " + f" {self.connective} ".join(condition.render(qualified) for condition in self.where))
        if self.group is not None:
            parts.append("GROUP BY " + Term(self.group).render(qualified))
        if self.having is not None:
            parts.append("HAVING " + self.having.render(qualified))
        if self.order is not None:
            parts.append(f"ORDER BY {self.order.render(qualified)}" + (" DESC" if self.descending else ""))
        if self.limit is not None:
            parts.append(f"LIMIT {self.limit}")
        return " ".join(parts)

    def columns(self) -> list[Column]:
        """Every column that the query names, those of its join left out."""
        terms = [*self.select, *(c.term for c in self.where), *((self.having.term,) if self.having else ())]
        terms += [self.order] if self.order else []
        return [term.column for term in terms if term.column is not None] + ([self.group] if self.group else [])
