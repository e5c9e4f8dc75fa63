"""Spider (arXiv 1809.08887) in its official layout, and accuracy by hardness as its evaluation reports it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightningrl.errors import UserError
from lightningrl.tasks.text_to_sql.hardness import hardness
from lightningrl.tasks.text_to_sql.metric import execution_match, gold_denotation
from lightningrl.tasks.text_to_sql.questions import Question
from lightningrl.tasks.text_to_sql.schema import describe, words

FILES = {"train": "train_spider.json", "dev": "dev.json"}
LEVELS = ("easy", "medium", "hard", "extra")

_Tables = list[tuple[str, list[str]]]


def load_spider(
    data_dir: str | Path,
    split: Literal["train", "dev"],
    *,
    max_schema_chars: int | None = None,
    with_empty: bool | None = None,
) -> list[Question]:
    """The questions of a split, in the order of its file.

    A gold answer of no rows is matched by any empty result, so that such questions would reward nothing: unless
    `with_empty` says otherwise they are left out of train and kept in dev. Where the file does not record `gold_rows`
    (the official one does not), the gold query is run; where it does not record `hardness`, the official rule gives it.
    With `max_schema_chars`, the schema text of a large database keeps the tables and columns whose names the question
    mentions first, whatever the gold query uses.

    Raises `UserError` for an unknown split, and for a file or a field that is missing or is not what it should be.
    """
    if split not in FILES:
        raise UserError(f"Spider has no split {split!r} here: use one of {', '.join(FILES)}")
    directory = Path(data_dir)
    path = directory / FILES[split]
    records = _read(path)
    described = directory / "tables.json"
    schemas = {_field(entry, "db_id", described, i): _tables(entry, described) for i, entry in enumerate(_read(described))}
    with_empty = split == "dev" if with_empty is None else with_empty
    questions = []
    for i, record in enumerate(records):
        db_id, text, gold = (_field(record, name, path, i) for name in ("db_id", "question", "query"))
        database = directory / "database" / db_id / f"{db_id}.sqlite"
        if db_id not in schemas:
            raise UserError(f"{described}: database {db_id} of {path.name} is not described there")
        if not database.is_file():
            raise UserError(f"{database}: the database of record {i} of {path.name} is missing; is the download whole?")
        rows = record["gold_rows"] if "gold_rows" in record else len(gold_denotation(gold, database, keep_distinct=True).rows)
        if rows == 0 and not with_empty:
            continue
        questions.append(
            Question(
                id=str(record.get("id", f"{split}_{i:05d}")),
                database=str(database),
                question=text,
                gold=gold,
                kind="spider",
                hardness=record.get("hardness") or hardness(gold),
                schema=describe(_shortened(schemas[db_id], text, max_schema_chars)),
                gold_rows=rows,
            )
        )
    return questions


def with_mistakes(questions: Sequence[Question], seed: int, count: int = 3) -> list[Question]:
    """The questions with what someone hasty would write, of which Spider has nothing: gold queries of others about the same database.

    Up to `count` of each, drawn from `seed`, none that gives what the question's own query gives; a question may be left without one.
    """
    about: dict[str, list[str]] = {}
    for question in questions:
        golds = about.setdefault(question.database, [])
        golds += [] if question.gold in golds else [question.gold]
    made = []
    for i, question in enumerate(questions):
        golds = about[question.database]
        drawn = (golds[j] for j in np.random.default_rng([seed, i]).permutation(len(golds)))
        wrong = (sql for sql in drawn if sql != question.gold and not execution_match(question.gold, sql, question.database))
        mistakes = tuple((f"another question's, {j}", sql) for j, sql in enumerate(itertools.islice(wrong, count)))
        made.append(dataclasses.replace(question, wrong=mistakes))
    return made


def accuracy_by_hardness(questions: Sequence[Question], correct: Sequence[bool]) -> dict[str, dict[str, float]]:
    """{level: {count, accuracy}} for the four levels that occur, `all`, and `all_with_rows`.

    `all_with_rows` leaves out the questions whose gold answer has no rows. A group of none is not listed.
    """
    if len(questions) != len(correct):
        raise ValueError(f"{len(questions)} questions and {len(correct)} verdicts do not belong together")
    pairs = list(zip(questions, correct, strict=True))
    groups = {level: [right for question, right in pairs if question.hardness == level] for level in LEVELS}
    groups["all"] = [right for _, right in pairs]
    groups["all_with_rows"] = [right for question, right in pairs if question.gold_rows > 0]
    return {name: {"count": len(group), "accuracy": sum(map(bool, group)) / len(group)} for name, group in groups.items() if group}


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; Spider's directory has dev.json, train_spider.json, tables.json and database/")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: this is not JSON ({error})") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records) or not records:
        raise UserError(f"{path}: this should be a list of records, one for each question or database")
    return records


def _field(record: dict[str, Any], name: str, path: Path, index: int) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise UserError(f"{path}: record {index} has no text field {name!r}")
    return value


def _tables(entry: dict[str, Any], path: Path) -> _Tables:
    try:
        tables: _Tables = [(name, []) for name in entry["table_names_original"]]
        for table, column in entry["column_names_original"]:
            if table >= 0:
                tables[table][1].append(column)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path}: database {entry['db_id']} has no table_names_original and column_names_original") from error
    return tables


def _shortened(tables: _Tables, question: str, max_chars: int | None) -> _Tables:
    """The tables and columns that the question mentions first, as many as `max_chars` has room for, at least one."""
    if max_chars is None or len(describe(tables)) <= max_chars:
        return tables
    asked = _stems(question)
    order = sorted(
        ((table, column) for table, columns in tables for column in columns),
        key=lambda pair: -(2 * len(_stems(words(pair[0])) & asked) + len(_stems(words(pair[1])) & asked)),
    )
    kept: set[tuple[str, str]] = set()
    shown: _Tables = []
    for pair in order:
        now = [(table, [column for column in columns if (table, column) in kept | {pair}]) for table, columns in tables]
        now = [(table, columns) for table, columns in now if columns]
        if not shown or len(describe(now)) <= max_chars:
            kept.add(pair)
            shown = now
    return shown


def _stems(text: str) -> set[str]:
    return {word.rstrip("s") for word in re.findall(r"\w+", text.lower())}
