from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from lightningrl.errors import UserError
from lightningrl.metrics import MetricsLog, plot_rewards, read_metrics, without_timings


def events(directory: pathlib.Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of every scalar in the event files; a record is length (8), crc (4), data, crc (4)."""
    found = []
    for path in sorted(directory.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_read_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    log = MetricsLog(tmp_path_factory.mktemp("floats"))
    log.append(0, {"x": value})
    log.close()
    assert np.float64(log.read()[0]["x"]).tobytes() == np.float64(value).tobytes()


def test_lines_are_sorted_json_with_plain_numbers(tmp_path: pathlib.Path) -> None:
    log = MetricsLog(tmp_path)
    log.append(3, {"b": np.float32(0.1), "a": np.int64(2), "c": "ppo", "d": {"z": [np.float64(0.5)]}, "e": True, "f": None})
    log.close()
    expected = {"a": 2, "b": float(np.float32(0.1)), "c": "ppo", "d": {"z": [0.5]}, "e": True, "f": None, "iteration": 3}
    assert (tmp_path / "metrics.jsonl").read_text() == json.dumps(expected) + "\n"
    assert log.read() == [expected]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
@pytest.mark.parametrize(("fields", "name"), [(lambda x: {"loss": x}, "loss"), (lambda x: {"by": {"easy": [1.0, x]}}, r"by\.easy\[1\]")])
def test_a_number_that_is_none_is_refused_by_name(tmp_path: pathlib.Path, value: Any, fields: Any, name: str) -> None:
    log = MetricsLog(tmp_path)
    with pytest.raises(ValueError, match=f"metric {name} is "):
        log.append(0, fields(value))
    log.close()
    assert log.read() == []


def test_numbers_go_to_tensorboard(tmp_path: pathlib.Path) -> None:
    log = MetricsLog(tmp_path)
    log.append(1, {"reward": 0.25, "count": 3, "name": "x", "flag": True})
    log.append(2, {"reward": 0.5})
    log.close()
    assert events(tmp_path) == [(1, "reward", 0.25), (1, "count", 3.0), (2, "reward", 0.5)]


def test_a_resumed_run_goes_on_after_its_last_iteration(tmp_path: pathlib.Path) -> None:
    log = MetricsLog(tmp_path)
    for iteration in range(4):
        log.append(iteration, {"reward": iteration / 4})
    log.close()
    resumed = MetricsLog(tmp_path)
    resumed.truncate_after(1)
    resumed.append(2, {"reward": 0.75})
    resumed.close()
    assert [(row["iteration"], row["reward"]) for row in resumed.read()] == [(0, 0.0), (1, 0.25), (2, 0.75)]
    assert events(tmp_path) == [(0, "reward", 0.0), (1, "reward", 0.25), (2, "reward", 0.75)]


def test_a_line_cut_short_is_dropped(tmp_path: pathlib.Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0, "reward": 0.5}\n{"iteration": 1, "rew')
    log = MetricsLog(tmp_path)
    assert log.read() == [{"iteration": 0, "reward": 0.5}]
    log.append(1, {"reward": 0.25})
    log.close()
    assert log.read() == [{"iteration": 0, "reward": 0.5}, {"iteration": 1, "reward": 0.25}]


def test_a_damaged_line_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\n{"iter\n{"iteration": 2}\n')
    with pytest.raises(UserError, match=r"line 2 of .*metrics.jsonl is damaged"):
        read_metrics(tmp_path)


def test_timings_are_told_by_their_names() -> None:
    assert without_timings({"reward": 1, "train_seconds": 2.5, "tokens_per_second": 3, "seconds_install": 4}) == {
        "reward": 1,
        "seconds_install": 4,
    }


@pytest.mark.parametrize("fields", [("train_reward", "heldout_reward", "unseen_reward"), ("train_reward",), ()])
def test_the_reward_curve_is_a_picture(tmp_path: pathlib.Path, fields: tuple[str, ...]) -> None:
    rows = [{"iteration": i, **{field: i / 10 for field in fields if field == "train_reward" or i % 5 == 0}} for i in range(10)]
    plot_rewards(rows, tmp_path / "reward.png")
    picture = (tmp_path / "reward.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5_000
