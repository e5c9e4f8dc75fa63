"""Rollouts in SQLite: written whole, before training uses them, and read back exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from lightningrl.errors import UserError
from lightningrl.types import Rollout, Status, Task, Transition

APPLICATION_ID = 0x4C52524C  # "LRRL", in the file's header: says whose database it is
VERSION = 1

SCHEMA = """
CREATE TABLE rollouts (
    id TEXT PRIMARY KEY, phase TEXT NOT NULL, iteration INTEGER NOT NULL,
    task TEXT NOT NULL, input TEXT NOT NULL, target TEXT NOT NULL,          -- input, target: JSON
    "group" TEXT NOT NULL, sample INTEGER NOT NULL, attempt INTEGER NOT NULL, status TEXT NOT NULL, parent TEXT,
    metrics TEXT NOT NULL, error TEXT NOT NULL, answer TEXT NOT NULL        -- metrics, answer: JSON
);
CREATE INDEX rollouts_by_iteration ON rollouts (phase, iteration);
CREATE TABLE transitions (
    rollout TEXT NOT NULL REFERENCES rollouts ON DELETE CASCADE, turn INTEGER NOT NULL, role TEXT NOT NULL,
    prompt_ids BLOB NOT NULL, response_ids BLOB NOT NULL, logprobs BLOB NOT NULL,  -- little-endian int32, int32, float32
    temperature REAL NOT NULL, policy_version INTEGER NOT NULL, reward REAL NOT NULL,
    finish_reason TEXT NOT NULL, trainable INTEGER NOT NULL, continues INTEGER,
    messages TEXT NOT NULL, text TEXT NOT NULL,                             -- messages: JSON
    PRIMARY KEY (rollout, turn)
);
CREATE TABLE rewards (
    rollout TEXT NOT NULL REFERENCES rollouts ON DELETE CASCADE, name TEXT NOT NULL, value REAL NOT NULL,
    PRIMARY KEY (rollout, name)
) WITHOUT ROWID;
CREATE TABLE logs (
    rollout TEXT NOT NULL REFERENCES rollouts ON DELETE CASCADE, attempt INTEGER NOT NULL, text TEXT NOT NULL
);
CREATE INDEX logs_by_rollout ON logs (rollout);
"""


@dataclasses.dataclass(frozen=True)
class LogEntry:
    """A note about one attempt at a rollout: an overridden setting, or the traceback and calls of one that was given up."""

    attempt: int
    text: str


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a rollout stands in a run."""

    phase: str
    iteration: int


class Store:
    """A SQLite file of rollouts, in write-ahead mode; safe from several threads, readable by other processes meanwhile.

    A killed process loses at most the rollout it was writing. What was given as JSON values reads back equal, token ids,
    log-probs and floats to the last bit (SQLite drops the sign of a reward of -0.0).

    Raises:
        UserError: the file is not a database of rollouts, or of another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=30.0, isolation_level=None, check_same_thread=False)
            self._prepare()
        except (OSError, sqlite3.OperationalError) as error:
            raise UserError(f"cannot open {self.path} as a store of rollouts ({error}): give a path to write to") from error
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.path} is not a store of rollouts ({error}): give another path") from error

    def _prepare(self) -> None:
        self._db.execute("PRAGMA foreign_keys = ON")
        with self._transaction():
            owner, version, tables = (
                self._db.execute(query).fetchone()[0]
                for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
            )
            if tables == 0:
                for statement in SCHEMA.split(";\n"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version = {VERSION}")
            elif owner != APPLICATION_ID:
                raise UserError(f"{self.path} is a database of something else, not a store of rollouts: give another path")
            elif version != VERSION:
                raise UserError(f"{self.path} is a store of version {version}, and this is version {VERSION}: start a new file")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")  # in WAL mode a killed process loses nothing committed

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def write(self, rollout: Rollout, phase: str, iteration: int, log: Sequence[LogEntry] = ()) -> None:
        """Writes a rollout, its transitions, rewards and log in one transaction; replaces one of the same id.

        Raises:
            UserError: a task, answer or message that JSON can't hold.
        """
        row = _rollout_row(rollout, phase, iteration)
        transitions = [_transition_row(rollout.id, transition) for transition in rollout.transitions]
        with self._transaction():
            self._db.execute("DELETE FROM rollouts WHERE id = ?", (rollout.id,))
            self._insert("rollouts", [row])
            self._insert("transitions", transitions)
            self._insert("rewards", [(rollout.id, name, float(value)) for name, value in rollout.outcome.items()])
            self._insert("logs", [(rollout.id, entry.attempt, _utf8(entry.text)) for entry in log])

    def _insert(self, table: str, rows: list[tuple[Any, ...]]) -> None:
        if rows:
            self._db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)

    def ids(self, phase: str, iteration: int, status: Status | None = None) -> list[str]:
        """The ids of an iteration's rollouts, of one status if given, by group and sample."""
        chosen = "phase = ? AND iteration = ? AND (? IS NULL OR status = ?)"
        query = f'SELECT id FROM rollouts WHERE {chosen} ORDER BY "group", sample, id'
        with self._lock:
            return [id_ for (id_,) in self._db.execute(query, (phase, iteration, status, status))]

    def places(self) -> dict[str, Place]:
        """Every rollout's id and place, by iteration, phase, group and sample."""
        query = 'SELECT id, phase, iteration FROM rollouts ORDER BY iteration, phase, "group", sample, id'
        with self._lock:
            return {id_: Place(phase, iteration) for id_, phase, iteration in self._db.execute(query)}

    def read(self, phase: str, iteration: int) -> list[Rollout]:
        """An iteration's rollouts, whatever their status, by group and sample."""
        with self._lock:
            return [self.read_rollout(id_) for id_ in self.ids(phase, iteration)]

    def read_rollout(self, id_: str) -> Rollout:
        """One rollout. Raises KeyError for an id that isn't there."""
        with self._lock:
            row = self._db.execute("SELECT * FROM rollouts WHERE id = ?", (id_,)).fetchone()
            if row is None:
                raise KeyError(f"no rollout {id_} in {self.path}")
            transitions = self._db.execute("SELECT * FROM transitions WHERE rollout = ? ORDER BY turn", (id_,)).fetchall()
            rewards = self._db.execute("SELECT name, value FROM rewards WHERE rollout = ? ORDER BY name", (id_,)).fetchall()
        return _rollout(row, transitions, rewards)

    def log(self, id_: str) -> tuple[LogEntry, ...]:
        """What was noted about a rollout, in order."""
        with self._lock:
            rows = self._db.execute("SELECT attempt, text FROM logs WHERE rollout = ? ORDER BY rowid", (id_,)).fetchall()
        return tuple(LogEntry(*row) for row in rows)

    def delete_after(self, iteration: int) -> int:
        """Deletes the rollouts of every later iteration, of all phases; returns how many there were."""
        with self._transaction():
            return self._db.execute("DELETE FROM rollouts WHERE iteration > ?", (iteration,)).rowcount

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _rollout_row(rollout: Rollout, phase: str, iteration: int) -> tuple[Any, ...]:
    where = f"rollout {rollout.id}"
    return (
        rollout.id,
        phase,
        iteration,
        rollout.task.id,
        _json(dict(rollout.task.input), f"the input of task {rollout.task.id}"),
        _json(rollout.task.target, f"the target of task {rollout.task.id}"),
        rollout.group,
        rollout.sample,
        rollout.attempt,
        rollout.status,
        rollout.parent,
        _json(dict(rollout.metrics), f"the metrics of {where}"),
        _utf8(rollout.error),
        _json(rollout.answer, f"the answer of {where}"),
    )


def _transition_row(rollout: str, transition: Transition) -> tuple[Any, ...]:
    return (
        rollout,
        transition.turn,
        transition.role,
        np.asarray(transition.prompt_ids, "<i4").tobytes(),
        np.asarray(transition.response_ids, "<i4").tobytes(),
        np.asarray(transition.logprobs, "<f4").tobytes(),
        float(transition.temperature),
        int(transition.policy_version),
        float(transition.reward),
        transition.finish_reason,
        transition.trainable,
        transition.continues,
        _json([dict(message) for message in transition.messages], f"turn {transition.turn} of rollout {rollout}"),
        transition.text,
    )


def _rollout(row: tuple[Any, ...], transitions: Iterable[tuple[Any, ...]], rewards: Iterable[tuple[str, float]]) -> Rollout:
    id_, _, _, task, input_, target, group, sample, attempt, status, parent, metrics, error, answer = row
    return Rollout(
        id=id_,
        task=Task(task, json.loads(input_), json.loads(target)),
        group=group,
        sample=sample,
        attempt=attempt,
        transitions=tuple(_transition(transition) for transition in transitions),
        outcome=dict(rewards),
        status=status,
        parent=parent,
        metrics=json.loads(metrics),
        error=error,
        answer=json.loads(answer),
    )


def _transition(row: tuple[Any, ...]) -> Transition:
    _, turn, role, prompt_ids, response_ids, logprobs, temperature, version, reward, *rest = row
    reason, trainable, continues, messages, text = rest
    return Transition(
        prompt_ids=np.frombuffer(prompt_ids, "<i4").astype(np.int32),
        response_ids=np.frombuffer(response_ids, "<i4").astype(np.int32),
        logprobs=np.frombuffer(logprobs, "<f4").astype(np.float32),
        temperature=temperature,
        policy_version=version,
        role=role,
        turn=turn,
        reward=reward,
        finish_reason=reason,
        trainable=bool(trainable),
        continues=continues,
        messages=tuple(json.loads(messages)),
        text=text,
    )


def _json(value: Any, what: str) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{what} cannot be stored as JSON ({error}): make it of dicts, lists, strings and numbers") from None


def _utf8(text: str) -> str:
    """Tracebacks may hold half a character (a file name that isn't UTF-8), which SQLite can't."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
