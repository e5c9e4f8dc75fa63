"""The project's own databases: seeded contents for hand-written domains, so that training needs no download."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np

from lightningrl.errors import UserError
from lightningrl.tasks.text_to_sql.domains import TRAINING, UNSEEN, Choice, Domain, Names, Number, Reference, Values
from lightningrl.tasks.text_to_sql.schema import quote

_UNSEEN_STREAM = 1 << 16  # their random stream is another one


def build_databases(out_dir: str | Path, seed: int, count: int, *, unseen: bool = False) -> list[Path]:
    """Writes `count` SQLite files into `out_dir` and returns their paths.

    The i-th is about the i-th domain, counted round; one that comes again has other contents and a number in its name.
    `unseen` takes the domains that are kept out of training. The same arguments write the same bytes (with one version
    of SQLite); a file of the same name is replaced in one step. Raises `UserError` for a count below 1.
    """
    if count < 1:
        raise UserError(f"{count} databases cannot be built: ask for at least 1")
    directory = Path(out_dir)
    directory.mkdir(parents=True, exist_ok=True)
    domains = UNSEEN if unseen else TRAINING
    paths = []
    for i in range(count):
        domain, again = domains[i % len(domains)], i // len(domains)
        path = directory / f"{domain.name}{again + 1 if again else ''}.sqlite"
        unfinished = path.with_name(path.name + ".part")
        unfinished.unlink(missing_ok=True)
        _write(unfinished, domain, np.random.default_rng([seed, i + _UNSEEN_STREAM * unseen]))
        os.replace(unfinished, path)
        paths.append(path)
    return paths


def _write(path: Path, domain: Domain, rng: np.random.Generator) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        sizes: dict[str, int] = {}
        for table in domain.tables:
            rows = sizes[table.name] = int(rng.integers(table.rows[0], table.rows[1] + 1))
            columns = ["id INTEGER PRIMARY KEY", *(_definition(name, values) for name, values in table.columns.items())]
            connection.execute(f"CREATE TABLE {quote(table.name)} ({', '.join(columns)})")
            contents = [_contents(values, rows, sizes, rng) for values in table.columns.values()]
            marks = ", ".join("?" * (len(columns)))
            connection.executemany(f"INSERT INTO {quote(table.name)} VALUES ({marks})", zip(range(1, rows + 1), *contents, strict=True))


def _definition(name: str, values: Values) -> str:
    if isinstance(values, Reference):
        return f"{quote(name)} INTEGER REFERENCES {quote(values.table)}(id)"
    return f"{quote(name)} {'INTEGER' if isinstance(values, Number) else 'TEXT'}"


def _contents(values: Values, rows: int, sizes: dict[str, int], rng: np.random.Generator) -> list[Any]:
    if isinstance(values, Names):
        return [values.pool[i] for i in rng.permutation(len(values.pool))[:rows]]
    if isinstance(values, Choice):
        pool = [values.pool[i] for i in rng.permutation(len(values.pool))[: values.kinds]]
        return [pool[i] for i in rng.integers(len(pool), size=rows)]
    if isinstance(values, Reference):
        # Some rows are pointed at often and some never, so that "the most" and "without any" have answers.
        weight = rng.exponential(size=sizes[values.table])
        return [int(i) + 1 for i in rng.choice(len(weight), size=rows, p=weight / weight.sum())]
    pool_size = (values.high - values.low) // values.step + 1
    picked = rng.permutation(pool_size)[:rows] if values.different and pool_size >= rows else rng.integers(pool_size, size=rows)
    return [values.low + values.step * int(i) for i in picked]
