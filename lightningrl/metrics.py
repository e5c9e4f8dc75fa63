"""The record of a run: one JSON object a line, the same numbers as TensorBoard events, and the reward curve.

Two runs of one seed write the same lines, but for fields that hold seconds or rates; their names end in `_seconds` or
`_per_second`.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightningrl.errors import UserError

REWARD_CURVES = {"train_reward": "training tasks", "heldout_reward": "held-out tasks", "unseen_reward": "unseen databases"}
TIMING_SUFFIXES = ("_seconds", "_per_second")


def summary_writer(directory: pathlib.Path) -> Any:
    """What writes TensorBoard events. tensorboardX imports torch where it finds it, which takes seconds and which nothing here needs."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # what Python takes for a module that is not there
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter(str(directory))


class MetricsLog:
    """`metrics.jsonl` and TensorBoard event files in one directory. The file is the truth; the events are a copy of it."""

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = pathlib.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.path = self.directory / "metrics.jsonl"
        self._events: Any = None  # a SummaryWriter, from the first line on
        self._rewrite(self.read())

    def append(self, iteration: int, fields: Mapping[str, Any]) -> None:
        """Adds the line of one iteration: JSON values by name, or NumPy scalars.

        Floats are written in the shortest form that reads back as the same float64. Numbers (booleans aside) also go to
        TensorBoard.

        Raises:
            ValueError: a field is NaN or infinite; the sentence names it.
        """
        row = {"iteration": int(iteration), **{name: _plain(name, value) for name, value in fields.items()}}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))
        self._mirror([row])

    def read(self) -> list[dict[str, Any]]:
        """All complete lines, in order. A line cut short by a crash is not complete."""
        return read_metrics(self.directory)

    def truncate_after(self, iteration: int) -> None:
        """Drops the lines of later iterations, so that a resumed run writes them anew."""
        self._rewrite([row for row in self.read() if row["iteration"] <= iteration])

    def close(self) -> None:
        """Finishes the event file."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(map(_line, rows)), encoding="utf-8")
        os.replace(partial, self.path)
        # Events cannot be taken back out of an event file, so the copy is made anew.
        self.close()
        for stale in self.directory.glob("events.out.tfevents.*"):
            stale.unlink()
        self._mirror(rows)

    def _mirror(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._events is None:
            self._events = summary_writer(self.directory)
        for row in rows:
            for name, value in row.items():
                if name != "iteration" and isinstance(value, int | float) and not isinstance(value, bool):
                    self._events.add_scalar(name, value, row["iteration"])
        self._events.flush()


class NoLog:
    """Stands for the log at processes that do not write it."""

    def append(self, iteration: int, fields: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All complete lines of the `metrics.jsonl` in a directory, in order; none if there is none.

    Raises UserError for a line that is no JSON.
    """
    path = pathlib.Path(directory) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"line {number} of {path} is damaged, it is no JSON ({error}): delete the line") from error
    return rows


def without_timings(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are the same in every run of one seed."""
    return {name: value for name, value in row.items() if not name.endswith(TIMING_SUFFIXES)}


def plot_rewards(metrics: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws the mean rewards over iterations as a PNG file.

    Args:
        metrics: rows as `MetricsLog.read` gives them; each may have any of the fields of `REWARD_CURVES`, mostly in [0, 1],
          which the axis shows if all are. A curve that no row has is left out.
    """
    # pyplot would pick a window system; a bare figure never does.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for field, label in REWARD_CURVES.items():
        points = [(row["iteration"], row[field]) for row in metrics if row.get(field) is not None]
        if points:
            sparse = field != "train_reward"
            axes.plot(
                *zip(*points, strict=True),
                label=label,
                marker="o" if sparse else "",
                linewidth=2 if sparse else 1.2,
                clip_on=False,
            )
    axes.set(xlabel="iteration", ylabel="mean reward")
    if all(0 <= row[field] <= 1 for row in metrics for field in REWARD_CURVES if row.get(field) is not None):
        axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, loc="best")
    figure.savefig(path)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, sort_keys=True, allow_nan=False) + "\n"


def _plain(name: str, value: Any) -> Any:
    """`value` with Python's own numbers, every float of it finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{name}[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, np.generic) or (hasattr(value, "item") and getattr(value, "shape", None) == ()):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"metric {name} is {value}; every metric must be a finite number")
    return value
