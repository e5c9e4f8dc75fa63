from __future__ import annotations

import dataclasses
import json
import pathlib
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightningrl.errors import UserError
from lightningrl.runtime import LogEntry, Store
from lightningrl.runtime.store import Place
from lightningrl.types import Rollout, Task, Transition

ROOT = pathlib.Path(__file__).parents[2]


def transition(turn: int = 0, **fields: Any) -> Transition:
    given: dict[str, Any] = {
        "prompt_ids": np.arange(5, dtype=np.int32),
        "response_ids": np.array([7, 2**31 - 1, -(2**31)], np.int32),
        "logprobs": np.array([-0.1, -0.0, -1e-38], np.float32),
        "temperature": 0.7,
        "policy_version": 12,
        "role": "writer",
        "turn": turn,
        "reward": -0.1,
        "finish_reason": "length",
        "trainable": False,
        "continues": None,
        "messages": ({"role": "user", "content": "Wie viele Sänger? 🎤"}, {"role": "tool", "content": [{"text": "\x00"}]}),
        "text": "SELECT 'é' \x00 \n",
    }
    return Transition(**{**given, **fields})


def rollout(id_: str = "train/3/t1/0", **fields: Any) -> Rollout:
    given: dict[str, Any] = {
        "id": id_,
        "task": Task("t1", {"question": "how many?", "deep": {"list": [1, 2.5, None, True]}}, target={"sql": "SELECT 1"}),
        "group": "train/3/t1",
        "sample": 0,
        "attempt": 1,
        "transitions": (transition(0), transition(1, continues=0, trainable=True, finish_reason="stop")),
        "outcome": {"reward": 0.1 + 0.2, "style": -2.5},
        "parent": "train/3/t1/9",
        "metrics": {"calls": 2.0, "agent_seconds": 1 / 3},
        "answer": ["SELECT 1", {"n": None}],
    }
    return Rollout(**{**given, **fields})


def plain(value: Any) -> Any:
    """A record as nested builtins, arrays with their type and bytes: what `==` can compare to the last bit."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [type(value).__name__, *(plain(each) for each in value)]
    return (type(value).__name__, repr(value))  # repr tells 0.0 from -0.0, True from 1


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store(tmp_path / "rollouts.sqlite") as store:
        yield store


@pytest.mark.parametrize(
    "written",
    [
        rollout(),
        rollout(transitions=(), outcome={}, status="failed", error="Traceback …\nValueError: no\n", answer=None, parent=None),
        rollout(status="timed_out", outcome={}, task=Task("t1", {}, None), metrics={}),
        rollout(transitions=(transition(response_ids=np.zeros(0, np.int32), logprobs=np.zeros(0, np.float32), text=""),)),
        rollout(transitions=(transition(logprobs=np.array([np.nan, -np.inf, 1e-45], np.float32)),)),
        rollout(transitions=tuple(transition(turn) for turn in range(12))),
    ],
    ids=["full", "failed", "timed out", "empty response", "odd log-probs", "twelve turns"],
)
def test_a_rollout_reads_back_as_it_was(store: Store, written: Rollout) -> None:
    store.write(written, "train", 3)
    assert plain(store.read_rollout(written.id)) == plain(written)
    (read,) = store.read("train", 3)
    assert plain(read) == plain(written)
    assert read.transitions == () or read.transitions[0].prompt_ids.flags.writeable


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values, st.text(st.characters(exclude_categories=["Cs"])), st.floats(allow_nan=False).map(lambda x: x + 0.0))
def test_any_json_text_and_number_reads_back(value: Any, text: str, number: float) -> None:
    written = rollout(
        task=Task("t", {"field": value}, value),
        answer=value,
        outcome={"reward": number},
        transitions=(transition(text=text, reward=number, messages=({"role": "user", "content": text, "extra": value},)),),
    )
    with Store(":memory:") as store:
        store.write(written, "train", 0)
        assert plain(store.read_rollout(written.id)) == plain(written)


def test_an_error_with_half_a_character_is_kept_readable(store: Store) -> None:
    store.write(rollout(status="failed", error="no file \udcff"), "train", 0, [LogEntry(0, "\udcff")])
    assert store.read_rollout("train/3/t1/0").error == "no file \\udcff"
    assert store.log("train/3/t1/0") == (LogEntry(0, "\\udcff"),)


def test_reading_is_by_phase_and_iteration_in_order_of_group_and_sample(store: Store) -> None:
    for sample in (2, 10, 0):
        store.write(rollout(f"b/{sample}", group="b", sample=sample), "train", 1)
    store.write(rollout("a/5", group="a", sample=5, status="failed"), "train", 1)
    store.write(rollout("other phase"), "eval", 1)
    store.write(rollout("other iteration"), "train", 2)
    assert store.ids("train", 1) == ["a/5", "b/0", "b/2", "b/10"] == [each.id for each in store.read("train", 1)]
    assert store.ids("train", 1, "ok") == ["b/0", "b/2", "b/10"]
    assert store.ids("train", 1, "timed_out") == [] == store.read("train", 7)


def test_places_are_in_order_of_iterations(store: Store) -> None:
    for id_, phase, iteration, group in (("d", "train", 2, "a"), ("c", "train", 1, "b"), ("b", "train", 1, "a"), ("a", "heldout", 2, "a")):
        store.write(rollout(id_, group=group), phase, iteration)
    expected = {"b": Place("train", 1), "c": Place("train", 1), "a": Place("heldout", 2), "d": Place("train", 2)}
    assert list(store.places().items()) == list(expected.items())


def test_writing_an_id_again_replaces_all_of_it(store: Store) -> None:
    store.write(rollout(), "train", 3, [LogEntry(0, "first")])
    again = rollout(transitions=(transition(text="second"),), outcome={"reward": 1.0})
    store.write(again, "train", 3, [LogEntry(0, "second")])
    assert plain(store.read("train", 3)) == plain([again])
    assert store.log(again.id) == (LogEntry(0, "second"),)


def test_delete_after_leaves_nothing_of_later_iterations(store: Store, tmp_path: Path) -> None:
    for iteration in range(4):
        for phase in ("train", "eval"):
            store.write(rollout(f"{phase}/{iteration}"), phase, iteration, [LogEntry(0, "note")])
    assert store.delete_after(1) == 4
    assert [store.ids("train", iteration) for iteration in range(4)] == [["train/0"], ["train/1"], [], []]
    with sqlite3.connect(tmp_path / "rollouts.sqlite") as db:
        counts = [db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("transitions", "rewards", "logs")]
    assert counts == [8, 8, 4]
    assert store.delete_after(1) == 0


def test_an_unknown_id(store: Store) -> None:
    with pytest.raises(KeyError, match="no rollout train/0/x/0 in"):
        store.read_rollout("train/0/x/0")
    assert store.log("train/0/x/0") == ()


def test_a_rollout_is_written_whole_or_not_at_all(store: Store) -> None:
    store.write(rollout(), "train", 3)
    twice_the_same_turn = rollout(transitions=(transition(0), transition(0)))
    with pytest.raises(sqlite3.IntegrityError):
        store.write(twice_the_same_turn, "train", 3)
    assert plain(store.read("train", 3)) == plain([rollout()])


def test_what_json_cannot_hold_is_named(store: Store) -> None:
    with pytest.raises(UserError, match="the target of task t1 cannot be stored as JSON .*set.*: make it of dicts"):
        store.write(rollout(task=Task("t1", {}, target={1, 2})), "train", 0)
    assert store.ids("train", 0) == []


def test_threads_may_write_and_read_at_once(store: Store) -> None:
    start = threading.Barrier(8)

    def work(thread: int) -> None:
        start.wait(10)
        for sample in range(20):
            written = rollout(f"{thread}/{sample}", group=str(thread), sample=sample)
            store.write(written, "train", 0)
            assert plain(store.read_rollout(written.id)) == plain(written)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(store.read("train", 0)) == 160


def test_another_process_may_read_meanwhile(store: Store) -> None:
    store.write(rollout(), "train", 0)
    with Store(store.path) as reader:
        assert reader.ids("train", 0) == ["train/3/t1/0"]
        store.write(rollout("second", sample=1), "train", 0)
        assert reader.ids("train", 0) == ["train/3/t1/0", "second"]


WRITER = """
import sys
from lightningrl.runtime import Store
from tests.runtime.test_store import rollout, transition
with Store(sys.argv[1]) as store:
    for sample in range(100_000):
        store.write(rollout(str(sample), sample=sample, transitions=tuple(transition(turn) for turn in range(20))), "train", 0)
        print(sample, flush=True)
"""


@pytest.mark.slow
def test_a_killed_process_loses_at_most_the_rollout_it_was_writing(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.sqlite"
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        reported = [int(process.stdout.readline()) for _ in range(50)]
        process.kill()
        reported += [int(line) for line in process.stdout]
    expected = tuple(transition(turn) for turn in range(20))
    with Store(path) as store:
        kept = store.read("train", 0)
        assert [each.sample for each in kept] == list(range(len(kept)))
        assert len(kept) - len(reported) in (0, 1)  # committed, and killed before it could say so
        assert all(plain(each.transitions) == plain(expected) for each in kept)
        store.write(rollout("after"), "train", 1)


def test_agent_lightning_in_memory_store_lost_all_on_restart(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "rollouts.sqlite"
    with Store(path) as store:
        store.write(rollout(), "train", 3)
    with Store(path) as store:
        assert plain(store.read("train", 3)) == plain([rollout()])


def write_text(path: Path) -> None:
    path.write_text("these are notes, not a database, and long enough to be more than a header\n" * 20)


def write_foreign_database(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE singer (name TEXT)")


def write_later_version(path: Path) -> None:
    Store(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (write_text, "is not a store of rollouts (file is not a database): give another path"),
        (write_foreign_database, "is a database of something else, not a store of rollouts: give another path"),
        (write_later_version, "is a store of version 99, and this is version 1: start a new file"),
        (Path.mkdir, "as a store of rollouts (unable to open database file): give a path to write to"),
    ],
    ids=["text", "another database", "another version", "a folder"],
)
def test_a_file_that_is_no_store_is_refused_in_one_sentence_and_left_alone(tmp_path: Path, make: Any, sentence: str) -> None:
    path = tmp_path / "file"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(UserError) as refused:
        Store(path)
    assert sentence in str(refused.value) and str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert before is None or path.read_bytes() == before


def test_blobs_are_little_endian_for_other_tools(store: Store) -> None:
    store.write(rollout(), "train", 0)
    with sqlite3.connect(store.path) as db:
        query = "SELECT response_ids, logprobs, messages FROM transitions WHERE turn = 0"
        ids, logprobs, messages = db.execute(query).fetchone()
    assert ids == b"\x07\0\0\0" + b"\xff\xff\xff\x7f" + b"\0\0\0\x80"
    assert np.frombuffer(logprobs, "<f4").tolist() == transition().logprobs.tolist()
    assert json.loads(messages) == list(transition().messages)
