"""Questions with gold answers about any SQLite database, from templates, its schema and its contents."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightningrl.errors import UserError
from lightningrl.tasks.splits import held_out
from lightningrl.tasks.text_to_sql.hardness import hardness
from lightningrl.tasks.text_to_sql.metric import execution_match
from lightningrl.tasks.text_to_sql.mistakes import mistakes
from lightningrl.tasks.text_to_sql.query import Query
from lightningrl.tasks.text_to_sql.schema import Schema, describe_for, read_schema
from lightningrl.tasks.text_to_sql.sql_tool import run_query
from lightningrl.tasks.text_to_sql.templates import KINDS, Draft, Draw

MAX_ROWS = 200  # of a gold answer
MAX_GOLD_CHARS = 160  # of a gold query: a response has to hold it
MAX_SCHEMA_CHARS = 160  # of the schema text; the columns that the answer needs are there even if they take more
_FEWEST_MISTAKES = 2
_DRAWS = 12  # of a kind in one round, before the next kind has its turn
_DRY_ROUNDS = 8  # after so many rounds in which a kind gave nothing new, it is taken to be exhausted


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about one database."""

    id: str  # unique over databases of different file names
    database: str  # path of the SQLite file
    question: str
    gold: str
    kind: str  # the template, a key of `templates.KINDS`; "spider" for Spider's own
    hardness: str  # easy, medium, hard, extra: Spider's rule
    schema: str  # as a prompt shows it
    wrong: tuple[tuple[str, str], ...] = ()  # (kind of mistake, SQL), none of which matches the gold answer
    gold_rows: int = 1


def generate_questions(database: str | Path, seed: int, count: int, *, max_schema_chars: int = MAX_SCHEMA_CHARS) -> list[Question]:
    """Up to `count` different questions about the database, the kinds in equal shares as far as it has room for them.

    Every gold answer has been run: 1 to `MAX_ROWS` rows, not all NULL, and where it orders, no ties; the query has at
    most `MAX_GOLD_CHARS` characters. No two questions share their text or their gold query, and each comes with at least
    two mistakes that the metric tells from the gold. The same file name, contents and seed give the same questions.

    Raises `UserError` for a file that is missing, is not SQLite or is empty, and where no question can be made.
    """
    schema = read_schema(database)
    name = Path(database).stem
    rng = np.random.default_rng([seed, int.from_bytes(_digest(name, size=4), "big")])
    draw = Draw(schema, rng)
    texts: set[str] = set()
    golds: set[str] = set()
    questions: list[Question] = []
    dry: collections.Counter[str] = collections.Counter()
    while len(questions) < count and (kinds := [kind for kind in KINDS if dry[kind] < _DRY_ROUNDS]):
        for kind in kinds:
            question = None
            for _ in range(_DRAWS):
                draft = _draft(kind, draw)
                if draft is None or draft[0].lower() in texts or draft[1].render() in golds:
                    continue
                question = _question(kind, draft, database, schema, rng, max_schema_chars)
                texts.add(draft[0].lower())
                golds.add(draft[1].render())
                if question is not None:
                    questions.append(question)
                    break
            dry[kind] = 0 if question is not None else dry[kind] + 1
            if len(questions) == count:
                break
    if not questions:
        raise UserError(f"{database}: no question can be made about this database; it needs a table with text or number columns")
    return questions


def _draft(kind: str, draw: Draw) -> Draft | None:
    try:
        return KINDS[kind](draw)
    except LookupError:
        return None


def _question(
    kind: str, draft: Draft, database: str | Path, schema: Schema, rng: np.random.Generator, max_schema_chars: int
) -> Question | None:
    text, query = draft
    gold = query.render()
    if len(gold) > MAX_GOLD_CHARS:
        return None
    result = run_query(database, gold, max_rows=MAX_ROWS)
    if not result.rows or all(value is None for row in result.rows for value in row) or _tied(query, database):
        return None
    wrong: dict[str, str] = {}
    for mistake, sql in mistakes(query, schema):
        if sql not in wrong.values() and not execution_match(gold, sql, database):
            wrong.setdefault(mistake, sql)
    if len(wrong) < _FEWEST_MISTAKES:
        return None
    return Question(
        id=f"{Path(database).stem}-{_digest(text).hex()}",
        database=str(database),
        question=text,
        gold=gold,
        kind=kind,
        hardness=hardness(gold),
        schema=describe_for(schema, _needed(query), max_schema_chars, rng),
        wrong=tuple(wrong.items()),
        gold_rows=len(result.rows),
    )


def _tied(query: Query, database: str | Path) -> bool:
    """Whether the order leaves open which rows come first: then the right answer is not one answer."""
    if query.order is None:
        return False
    keys = run_query(database, dataclasses.replace(query, select=(query.order,), limit=None).render(), max_rows=100_000).rows
    first = (keys or [])[: None if query.limit is None else query.limit + 1]
    return len(set(first)) < len(first)


def _needed(query: Query) -> list[tuple[str, str]]:
    inner = [condition.inner for condition in query.where if condition.inner is not None]
    pairs = [(column.table, column.name) for column in [*query.columns(), *inner]]
    if query.join is not None:
        pairs += [(query.join.child, query.join.column), (query.join.parent, query.join.target)]
    return pairs


def _digest(text: str, size: int = 6) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


def split_questions(questions: Sequence[Question], heldout_count: int, seed: int) -> tuple[list[Question], list[Question]]:
    """(train, held-out): no held-out question's text, and no held-out gold query on its database, is trained on.

    Of each kind the same share is held out, so that both sides ask alike: a kind that a database has room for only a
    few questions of is trained on too. Questions that share their text with a held-out one (on another database) go to
    neither side. Raises `UserError` if nothing would be left to train on.
    """
    heldout = held_out(questions, heldout_count, seed)
    texts = {question.question.lower() for question in heldout}
    golds = {(question.database, question.gold) for question in heldout}
    chosen = {question.id for question in heldout}
    train = [
        question
        for question in questions
        if question.id not in chosen and question.question.lower() not in texts and (question.database, question.gold) not in golds
    ]
    if len(heldout) < heldout_count or not train:
        raise UserError(
            f"{len(questions)} questions are too few to hold out {heldout_count} and train on others: hold out fewer, "
            "or give a database with more contents"
        )
    return train, heldout
