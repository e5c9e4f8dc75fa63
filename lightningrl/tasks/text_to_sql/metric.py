"""Execution match, the official metric of Spider (test-suite-sql-eval, `exec_eval.py`; arXiv 2010.02840), in the sandbox.

Two queries match if their results are equal: as many rows, as many columns, and some permutation of the columns under
which the rows are the same multiset, or the same sequence where the gold query has ORDER BY. The rule is followed to the
letter where the official code has slips: equal numbers are equal whether int or float, and ORDER BY is a clause, not a
piece of text.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightningrl.errors import UserError
from lightningrl.tasks.text_to_sql.sql_tool import run_query

GOLD_TIME_LIMIT_S = 60.0
GOLD_MAX_ROWS = 1_000_000

_TOKEN = re.compile(
    r"""(?P<quoted>'(?:[^']|'')*'? | "(?:[^"]|"")*"? | `[^`]*`? | \[[^\]]*\]? | --[^\n]* | /\*.*?(?:\*/|$))
      | (?P<distinct>\bdistinct\b(?!\s+from\b))
      | (?P<order>\border\s+by\b)
      | (?P<year>\byear\s*\(\s*curdate\s*\(\s*\)\s*\))
      | (?P<spaced>[<>!]\s=)""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)


def normalise(sql: str, *, keep_distinct: bool = False) -> str:
    """The query as it is run: without DISTINCT (unless kept), `> =` closed up, the current year 2020, as official.

    Text in quotes and comments is left alone, and so is `IS DISTINCT FROM`, which is a comparison.
    """

    def replace(match: re.Match[str]) -> str:
        if match["distinct"]:
            return match[0] if keep_distinct else ""
        if match["spaced"]:
            return match[0][0] + "="
        return "2020" if match["year"] else match[0]

    return _TOKEN.sub(replace, sql)


def has_order_by(sql: str) -> bool:
    """Whether ORDER BY stands anywhere in the query outside quotes and comments."""
    return any(match["order"] for match in _TOKEN.finditer(sql))


@dataclasses.dataclass(frozen=True)
class Denotation:
    """A gold query's result, with what every comparison needs of it."""

    rows: tuple[tuple[Any, ...], ...]
    ordered: bool
    columns: tuple[collections.Counter[Any], ...]  # the multiset of each column's values

    @classmethod
    def of(cls, rows: Sequence[tuple[Any, ...]], ordered: bool) -> Denotation:
        return cls(tuple(rows), ordered, tuple(collections.Counter(column) for column in zip(*rows, strict=True)))


def results_match(gold: Denotation, rows: Sequence[tuple[Any, ...]]) -> bool:
    """Whether some permutation of the columns makes the rows equal; two empty results always are.

    Searched column by column: a candidate must hold the same multiset of values, and the columns chosen so far must
    agree row by row, so that wrong branches end early however many columns there are.
    """
    if len(rows) != len(gold.rows):
        return False
    if not rows:
        return True
    if len(rows[0]) != len(gold.columns):
        return False
    gold_columns = list(zip(*gold.rows, strict=True))
    columns = list(zip(*rows, strict=True))
    counters = [collections.Counter(column) for column in columns]
    candidates = [[j for j, counter in enumerate(counters) if counter == wanted] for wanted in gold.columns]
    # The columns with fewest candidates first: most queries have one each, and are decided without a search.
    order = sorted(range(len(columns)), key=lambda i: len(candidates[i]))

    def agree(chosen: list[int]) -> bool:
        left = list(zip(*(gold_columns[i] for i in order[: len(chosen)]), strict=True))
        right = list(zip(*(columns[j] for j in chosen), strict=True))
        return left == right if gold.ordered else collections.Counter(left) == collections.Counter(right)

    def search(chosen: list[int]) -> bool:
        if len(chosen) == len(columns):
            return True
        tried: set[tuple[Any, ...]] = set()
        for j in candidates[order[len(chosen)]]:
            if j in chosen or columns[j] in tried:  # an equal column would fail in the same way
                continue
            tried.add(columns[j])
            if agree([*chosen, j]) and search([*chosen, j]):
                return True
        return False

    return search([])


@functools.lru_cache(maxsize=2048)
def _gold(database: str, stamp: tuple[int, int], sql: str, ordered: bool) -> Denotation:
    result = run_query(database, sql, time_limit_s=GOLD_TIME_LIMIT_S, max_rows=GOLD_MAX_ROWS)
    if result.rows is None:
        raise UserError(f"{database}: the gold query {sql!r} cannot be run ({result.error})")
    return Denotation.of(result.rows, ordered)


def gold_denotation(gold_sql: str, database: str | Path, *, keep_distinct: bool = False) -> Denotation:
    """The gold query's result, kept for as long as the file does not change.

    Raises `FileNotFoundError` if there is no such file, `UserError` if the query cannot be run.
    """
    stat = Path(database).stat()
    sql = normalise(gold_sql, keep_distinct=keep_distinct)
    return _gold(str(database), (stat.st_mtime_ns, stat.st_size), sql, has_order_by(gold_sql))


def execution_match(
    gold_sql: str, predicted_sql: str, database: str | Path, *, keep_distinct: bool = False, time_limit_s: float = 2.0
) -> bool:
    """Whether the prediction's result equals the gold's on this database (arXiv 1809.08887, 2010.02840).

    A prediction that fails, is denied by the sandbox, or takes longer than `time_limit_s` does not match. A gold
    result of no rows is matched by any empty result, which is why such questions are reported apart.
    Raises `UserError` if the gold query itself cannot be run.
    """
    gold = gold_denotation(gold_sql, database, keep_distinct=keep_distinct)
    sql = normalise(predicted_sql, keep_distinct=keep_distinct)
    result = run_query(database, sql, time_limit_s=time_limit_s, max_rows=len(gold.rows))
    return result.rows is not None and results_match(gold, result.rows)
