"""What other libraries answered (`scripts/make_goldens.py`), and their rows as our tables.

A library has one row a rollout. Ours is a transition for each run of action tokens, what lies between being observations; or, for
losses of sequences, one transition a row.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np

from lightningrl.losses import count_units
from lightningrl.table import LossInputs, TokenTable, TransitionTable
from tests.batches import make_rollout, make_table

COUNT = jax.jit(count_units)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
ROUND = 20  # tables are padded to multiples of it, so that rows cut into calls and whole ones share compiled programs


class Goldens:
    """One file: `cases` with their settings, and the arrays of a case by name."""

    def __init__(self, library: str):
        with np.load(pathlib.Path(__file__).parent / f"{library}.npz") as file:
            self.arrays = {name: file[name] for name in file.files if name != "meta"}
            meta = json.loads(str(file["meta"]))
        self.cases: dict[str, dict[str, Any]] = meta["cases"]
        self.versions: dict[str, str] = meta["versions"]

    def __getitem__(self, case: str) -> dict[str, np.ndarray]:
        start = f"{case}/"
        return {name[len(start) :]: x for name, x in self.arrays.items() if name.startswith(start) and "/" not in name[len(start) :]}

    def under(self, start: str) -> list[str]:
        return [case for case in self.cases if case.startswith(f"{start}/")]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a library as a table, and an edge for every place in them."""

    table: TransitionTable
    tokens: TokenTable
    mask: np.ndarray  # bool [B, T]
    row: np.ndarray  # int32 [N], of each transition; 0 at padding

    def grid(self, edges) -> np.ndarray:
        """Edges as rows again."""
        return np.asarray(edges).reshape(self.mask.shape)


def turns_of(mask: np.ndarray) -> list[list[list[int]]]:
    """For each row its runs of action tokens, as lists of columns; an empty one where a row has none."""
    rows = []
    for row in mask:
        runs: list[list[int]] = []
        for column in np.flatnonzero(row):
            if runs and runs[-1][-1] == column - 1:
                runs[-1].append(int(column))
            else:
                runs.append([int(column)])
        rows.append(runs or [[]])
    return rows


def make_rows(mask, group, outcome, *, turn_reward=None, logps=None, merged: bool = False) -> Rows:
    """Rows as a table.

    Args:
      mask: [B, T], 1 at action tokens.
      group: B names of tasks.
      outcome: [B].
      turn_reward: [B, T], read at the last token of each run of actions; none by default.
      logps: old_logp, behaviour_logp and ref_logp, each [B, T]; 0 by default.
      merged: whether a row is one transition.
    """
    mask = np.asarray(mask) > 0
    runs = [[sum(row, [])] if merged else row for row in turns_of(mask)]
    rewards = [[float(turn_reward[i, run[-1]]) if turn_reward is not None and run else 0.0 for run in row] for i, row in enumerate(runs)]
    number_of = [len(row) for row in runs]
    size = -(-sum(number_of) // ROUND) * ROUND
    table = make_table(
        *(
            make_rollout(str(group[i]), float(outcome[i]), rewards[i], lengths=[len(run) for run in row], name=str(i))
            for i, row in enumerate(runs)
        ),
        size=size,
    )
    transition, k = np.zeros(mask.shape, np.int32), np.zeros(mask.shape, np.int32)
    number = 0
    for i, row in enumerate(runs):
        for run in row:
            # What follows a run, observation or padding, counts to it; the mask keeps it out.
            first = run[0] if run and run is not row[0] else 0
            transition[i, first:] = number
            k[i, first:] = np.arange(mask.shape[1] - first)
            number += 1
    zeros = np.zeros(mask.size, np.float32)
    of = {name: zeros if not logps or name not in logps else np.ravel(logps[name]) for name in ("old_logp", "behaviour_logp", "ref_logp")}
    tokens = TokenTable(
        transition=transition.ravel(),
        k=k.ravel(),
        node=np.arange(mask.size, dtype=np.int32),
        token=np.zeros(mask.size, np.int32),
        temperature=np.ones(mask.size, np.float32),
        mask=mask.ravel(),
        **of,
    )
    row_of = np.zeros(size, np.int32)
    row_of[: sum(number_of)] = np.repeat(np.arange(len(runs)), number_of)
    return Rows(table=table, tokens=tokens, mask=mask, row=row_of)


def make_inputs(rows: Rows, *, logp, advantage, drawn) -> LossInputs:
    """What a loss reads, from arrays [B, T]."""
    flat = {name: np.ravel(drawn[name]) for name in ("entropy", "value", "old_value", "value_target")}
    return LossInputs(tokens=rows.tokens, counts=COUNT(rows.table, rows.tokens), advantage=np.ravel(advantage), logp=np.ravel(logp), **flat)
