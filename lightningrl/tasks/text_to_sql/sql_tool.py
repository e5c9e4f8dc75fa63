"""The SQL tool: runs one query on a database that it cannot change, for a bounded time and a bounded result.

Four fences, each enough for what it guards: the file is opened read-only, an authorizer lets only reads through, a
progress handler stops the query at its deadline, and the limits of the connection bound the length of every value.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
import sqlite3
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightningrl.errors import UserError

MAX_VALUE_BYTES = 200_000  # the longest text or blob that a query may read or make
MAX_SET = 100  # characters that `trim` may be told to take off: SQLite compares each with each, and looks at no clock meanwhile
MAX_RESULT_BYTES = 16_000_000  # of a whole result
MAX_SQL_BYTES = 20_000
MAX_EXPANSION = 20_000  # copies of common table expressions that a query may come to
_OPEN_FILES = 32  # connections that each thread keeps
MAX_COLUMNS = 250  # of a result or a table: a row of values of the longest kind is 50 MB
_PROGRESS_STEPS = 1000  # instructions of SQLite's machine between two looks at the clock

_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
# Deterministic and without side effects. `random` would make two runs with one seed differ.
_FUNCTIONS = frozenset(
    """abs avg ceil ceiling char coalesce concat count cume_dist date datetime dense_rank exp first_value floor glob
    group_concat hex ifnull iif instr julianday lag last_value lead length like likelihood likely ln log log10 log2 lower
    ltrim max min mod nth_value ntile nullif percent_rank pow power quote rank replace round row_number rtrim sign
    sqrt strftime string_agg substr substring sum time total trim trunc typeof unicode unixepoch unlikely upper
    json json_array json_array_length json_extract json_object json_type json_valid -> ->>""".split()
)
_PRAGMAS = frozenset(("table_info", "table_xinfo", "table_list", "foreign_key_list", "index_list", "index_info"))
_COMMENT = re.compile(r"--[^\n]*|/\*.*?(?:\*/|$)", re.DOTALL)
_QUOTED = re.compile(r"'(?:[^']|'')*+'|\"(?:[^\"]|\"\")*+\"|`[^`]*+`|\[[^\]]*+\]")
_TABLE_EXPRESSION = re.compile(r"\b(\w++)\s*(?:\([^()]*\)\s*)?\bas\s*(?:not\s+)?(?:materialized\s*)?\(")


@dataclasses.dataclass(frozen=True)
class QueryResult:
    """What a query gave: rows, or the one sentence that says why there are none."""

    rows: list[tuple[Any, ...]] | None  # None exactly when there is an error
    columns: tuple[str, ...] = ()
    error: str | None = None


class _Session:
    """One connection with its fences. It belongs to the thread that opened it."""

    def __init__(self, path: Path) -> None:
        self.deadline = 0.0
        self.denied = ""
        self.connection = sqlite3.connect(_uri(path), uri=True, isolation_level=None)
        self.connection.text_factory = lambda raw: raw.decode(errors="ignore")
        for limit, value in (
            (sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES),
            (sqlite3.SQLITE_LIMIT_SQL_LENGTH, MAX_SQL_BYTES),
            (sqlite3.SQLITE_LIMIT_COLUMN, MAX_COLUMNS),
            (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 200),
            (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 50),
            (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1000),
            (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
            (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
        ):
            self.connection.setlimit(limit, value)
        # SQLite's own take seconds of one instruction on long texts.
        self.connection.create_function("instr", 2, _instr, deterministic=True)
        for name, strip in (("trim", str.strip), ("ltrim", str.lstrip), ("rtrim", str.rstrip)):
            self.connection.create_function(name, 2, functools.partial(_trim, strip), deterministic=True)
        self.connection.execute("PRAGMA query_only = ON")
        self.connection.execute("PRAGMA trusted_schema = OFF")
        self.connection.set_authorizer(self._authorize)
        self.connection.set_progress_handler(self._late, _PROGRESS_STEPS)

    def _late(self) -> bool:
        return time.monotonic() > self.deadline

    def _authorize(self, action: int, first: str | None, second: str | None, schema: str | None, source: str | None) -> int:
        if action in _READS:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_FUNCTION:
            if (second or "").lower() in _FUNCTIONS:
                return sqlite3.SQLITE_OK
            self.denied = f"the function {second} is not allowed"
        elif action == sqlite3.SQLITE_PRAGMA and (first or "").lower() in _PRAGMAS:
            return sqlite3.SQLITE_OK
        else:
            self.denied = "only reading is allowed"
        return sqlite3.SQLITE_DENY

    def run(self, sql: str, time_limit_s: float, max_rows: int) -> QueryResult:
        self.denied = ""
        self.deadline = time.monotonic() + time_limit_s
        cursor = self.connection.cursor()
        try:
            cursor.execute(sql)
            if cursor.description is None:
                return QueryResult(None, error="the query has no SELECT")
            columns = tuple(column[0] for column in cursor.description)
            rows: list[tuple[Any, ...]] = []
            budget = MAX_RESULT_BYTES
            for row in cursor:
                if len(rows) == max_rows:
                    return QueryResult(None, columns, f"more than {max_rows} rows")
                budget -= sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
                if budget < 0:
                    return QueryResult(None, columns, f"the result is larger than {MAX_RESULT_BYTES} bytes")
                rows.append(row)
            if self._late():  # one long instruction may have passed the limit unseen
                return QueryResult(None, columns, f"stopped after {time_limit_s:g} s")
            return QueryResult(rows, columns)
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
            return QueryResult(None, error=self._sentence(error, time_limit_s))
        finally:
            cursor.close()

    def _sentence(self, error: Exception, time_limit_s: float) -> str:
        if self.denied:
            return self.denied
        if isinstance(error, UnicodeError):
            return "the query is not valid text"
        message = str(error)
        if message == "interrupted":
            return f"stopped after {time_limit_s:g} s"
        if "user-defined function" in message:
            return f"trim takes off one of {MAX_SET} characters at most"
        if "one statement" in message:
            return "only one statement is allowed"
        if "too big" in message or "too large" in message:
            return "a value or the query is too long"
        return message.replace("\n", " ")


def _text(x: str | bytes | int | float) -> str:
    """A value as SQLite makes a text of it, but for numbers with an exponent (1e+20 is its 1.0e+20)."""
    if isinstance(x, bytes):
        return x.decode(errors="ignore")
    if isinstance(x, float):
        text = f"{x:.15g}"
        return text if set(text) & set(".einf") else text + ".0"
    return str(x)


def _instr(x: Any, y: Any) -> int | None:
    if x is None or y is None:
        return None
    if isinstance(x, bytes) and isinstance(y, bytes):
        return x.find(y) + 1
    return _text(x).find(_text(y)) + 1


def _trim(strip: Callable[[str, str], str], x: Any, characters: Any) -> str | None:
    if x is None or characters is None:
        return None
    taken = _text(characters)
    if len(taken) > MAX_SET:
        raise ValueError("too many characters to trim")
    return strip(_text(x), taken) if taken else _text(x)


def expansion(sql: str) -> int:
    """A bound on the copies that SQLite makes of common table expressions while it prepares a query.

    Π (1 + references to the i-th of them), so 1 without any. Each reference is a copy of the whole body: twenty short
    ones take gigabytes before the first instruction runs, and until then no progress handler looks.
    """
    text = sql.lower()
    if "with" not in text:
        return 1
    # A quoted name becomes a plain one, so that `"a b"` and `[a b]` are counted as the same.
    text = _QUOTED.sub(lambda match: " " + re.sub(r"\W", "_", match[0][1:-1]) + " ", _COMMENT.sub(" ", text))
    words = collections.Counter(re.findall(r"\w+", text))
    return math.prod(words[name] for name in set(_TABLE_EXPRESSION.findall(text)))


def _uri(path: Path) -> str:
    """The file's read-only URI; a file in WAL mode with nothing in its log is opened without making one beside it."""
    uri = f"file:{urllib.parse.quote(str(path.absolute()))}?mode=ro"
    with path.open("rb") as file:
        header = file.read(20)
    log = path.with_name(path.name + "-wal")
    if header[18:20] == b"\x02\x02" and not (log.exists() and log.stat().st_size):
        uri += "&immutable=1"
    return uri


_LOCAL = threading.local()


def _session(path: str) -> _Session:
    stat = Path(path).stat()
    stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
    sessions: collections.OrderedDict[str, tuple[tuple[int, int, int], _Session]] | None
    sessions = getattr(_LOCAL, "sessions", None)
    if sessions is None:
        sessions = _LOCAL.sessions = collections.OrderedDict()
    if path in sessions:
        sessions.move_to_end(path)
        known, session = sessions[path]
        if known == stamp:
            return session
        session.connection.close()
    session = _Session(Path(path))
    sessions[path] = (stamp, session)
    if len(sessions) > _OPEN_FILES:
        sessions.popitem(last=False)[1][1].connection.close()
    return session


def check_database(database: str | Path) -> None:
    """Says in one sentence what keeps a file from being a database with something in it.

    Raises `UserError` for a file that is not there, is not an SQLite database, or has no table with rows.
    """
    path = Path(database)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give the path of an SQLite database")
    with path.open("rb") as file:
        header = file.read(16)
    if not header:
        raise UserError(f"{path}: the file is empty; give an SQLite database with at least one table that has rows")
    if header != b"SQLite format 3\0":
        raise UserError(f"{path}: this is not an SQLite database (its first 16 bytes are not SQLite's)")
    tables = run_query(path, "SELECT name FROM sqlite_master WHERE type IN ('table', 'view')", max_rows=100_000)
    if tables.rows is None:
        raise UserError(f"{path}: SQLite cannot read this file ({tables.error})")
    names = [row[0].replace('"', '""') for row in tables.rows if not row[0].startswith("sqlite_")]
    if not any(run_query(path, f'SELECT 1 FROM "{name}" LIMIT 1').rows for name in names):
        raise UserError(f"{path}: the database is empty; give one with at least one table that has rows")


def run_query(database: str | Path, sql: str, *, time_limit_s: float = 2.0, max_rows: int = 1000) -> QueryResult:
    """Runs one read-only statement and returns its rows, or an error as text; it never raises for what the query does.

    At most `time_limit_s` seconds, `max_rows` rows, `MAX_VALUE_BYTES` a value and `MAX_RESULT_BYTES` a result; past any
    of them the result is an error, never a part of the rows. Writes, ATTACH, PRAGMAs other than those that describe
    tables, extensions, several statements and functions that are not deterministic are errors too, and so is a file
    that cannot be opened. May be called from any thread; each keeps its own connections.
    """
    try:
        session = _session(str(database))
    except (sqlite3.Error, OSError) as error:
        return QueryResult(None, error=f"cannot open {database}: {error}")
    if len(sql) > MAX_SQL_BYTES:
        return QueryResult(None, error="a value or the query is too long")
    if expansion(sql) > MAX_EXPANSION:
        return QueryResult(None, error="the common table expressions are nested too deeply")
    return session.run(sql, time_limit_s, max_rows)


def as_text(result: QueryResult, max_rows: int = 5) -> str:
    """A result as an agent reads it: `Ann,31; Bob,25; ... 9 rows`, `no rows`, or `error: no such column: agee`."""
    if result.rows is None:
        return f"error: {result.error}"
    if not result.rows:
        return "no rows"
    shown = "; ".join(",".join(_value(value) for value in row) for row in result.rows[:max_rows])
    return shown if len(result.rows) <= max_rows else f"{shown}; ... {len(result.rows)} rows"


def _value(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
