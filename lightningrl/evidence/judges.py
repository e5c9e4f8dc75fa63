"""Scores from outside: a judge of every call, and a potential of every state.

A judge is a function of the rollouts of one group. It gives each of them one score, for all its calls, or one for each call,
or, for the whole group, None: it abstains. `endpoint_judge` makes one of a language model.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lightningrl.errors import UserError
from lightningrl.table import Array, Evidence
from lightningrl.tabulate import table_size, trained_rollouts
from lightningrl.types import Rollout

Score = float | Sequence[float]  # of a rollout, or of each of its calls in order of turn
Judge = Callable[[Sequence[Rollout]], Sequence[Score] | None]


def judge_rollouts(
    policy: Any,
    aux: Mapping[str, float] | None,
    rollouts: Sequence[Rollout],
    key: Array,
    *,
    judge: Judge,
    concurrency: int = 1,
    multiple: int = 1,
) -> tuple[Evidence, dict[str, float]]:
    """The evidence producer of `judge`: what a judge says of every call, group by group.

    The calls of a group that a judge abstains from score 0: with equal scores `credit.judged` gives them exactly no credit.

    Args:
      policy, key: not read.
      aux: totals so far, a JSON object: `judge_groups`, and of these `judge_abstained`; None at first.
      rollouts: those of the table, in its order.
      judge: scores may be on any scale, which `credit.judged` takes out within the group.
      concurrency: groups that are judged at a time, each in a thread if there are several; the result is the same.
      multiple: N is the least multiple of it that holds the transitions.

    Returns:
      The evidence, float32 [N], 0 at padding, and the totals with this call's added.

    Raises:
      UserError: the judge gave another number of scores than there are rollouts, or than a rollout has calls, or one that is no
        finite number; the sentence names the rollout.
    """
    used = trained_rollouts(rollouts)
    groups: dict[str, list[int]] = {}
    for i, rollout in enumerate(used):
        groups.setdefault(rollout.group, []).append(i)
    scores: list[list[float]] = [[0.0] * len(rollout.transitions) for rollout in used]
    verdicts = _in_threads(judge, [[used[i] for i in members] for members in groups.values()], concurrency)
    for (name, members), verdict in zip(groups.items(), verdicts, strict=True):
        if verdict is None:
            continue
        if len(verdict) != len(members):
            of = f"group {name!r}, whose first is rollout {used[members[0]].id!r},"
            raise UserError(f"the judge gave {len(verdict)} scores for the {len(members)} rollouts of {of}: it should give one for each")
        for i, score in zip(members, verdict, strict=True):
            scores[i] = _of_calls(score, used[i])
    new = {"judge_groups": float(len(groups)), "judge_abstained": float(sum(verdict is None for verdict in verdicts))}
    return Evidence(judge=_padded(scores, multiple)), {name: (aux or {}).get(name, 0.0) + n for name, n in new.items()}


def potentials(
    policy: Any,
    aux: Mapping[str, float] | None,
    rollouts: Sequence[Rollout],
    key: Array,
    *,
    potential: Callable[[Rollout], Sequence[float]],
    multiple: int = 1,
) -> tuple[Evidence, dict[str, float]]:
    """The evidence producer of `potential`: a scripted guess Φ of how far along a run is.

    Args:
      policy, aux, key: not read; there is no state.
      rollouts: those of the table, in its order.
      potential: Φ of the state before each call of a rollout, and of the one after its last: T + 1 numbers. So that shaping is fair
        it must not look ahead: not at later calls, nor at the outcome, but for the last number.
      multiple: N is the least multiple of it that holds the transitions.

    Returns:
      The evidence, float32 [N, 2]: Φ before and after each call, 0 at padding. And an empty state.

    Raises:
      UserError: another number of numbers, or one that is not finite; the sentence names the rollout.
    """
    pairs = []
    for rollout in trained_rollouts(rollouts):
        phi = [_finite(value, "the potential", rollout) for value in potential(rollout)]
        if len(phi) != len(rollout.transitions) + 1:
            calls = len(rollout.transitions)
            raise UserError(
                f"the potential gave {len(phi)} numbers for rollout {rollout.id!r} of {calls} calls: there should be {calls + 1}"
            )
        pairs.append(list(itertools.pairwise(phi)))
    return Evidence(potential=_padded(pairs, multiple, 2)), {}


def _in_threads(judge: Judge, groups: Sequence[Sequence[Rollout]], concurrency: int) -> list[Sequence[Score] | None]:
    """In the order of the groups; the first group that fails says what went wrong, whichever failed first."""
    if concurrency <= 1:
        return [judge(group) for group in groups]
    with concurrent.futures.ThreadPoolExecutor(concurrency, "judge") as pool:
        verdicts = [pool.submit(judge, group) for group in groups]
        try:
            return [verdict.result() for verdict in verdicts]
        finally:
            for verdict in verdicts:
                verdict.cancel()


def _of_calls(score: Score, rollout: Rollout) -> list[float]:
    """One score for each call."""
    calls = len(rollout.transitions)
    scores = list(score) if isinstance(score, Sequence | np.ndarray) else [score] * calls
    if len(scores) != calls:
        raise UserError(f"the judge gave {len(scores)} scores for rollout {rollout.id!r} of {calls} calls: it should give one for each")
    return [_finite(value, "the judge", rollout) for value in scores]


def _finite(value: Any, who: str, rollout: Rollout) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{who} gave {value!r} for rollout {rollout.id!r}: it should give finite numbers")
    return number


def _padded(of_rollouts: Sequence[Sequence[Any]], multiple: int, *columns: int) -> np.ndarray:
    """float32 [N, *columns] in the table's order."""
    rows = [row for rollout in of_rollouts for row in rollout]
    result = np.zeros((table_size(len(rows), multiple), *columns), np.float32)
    result[: len(rows)] = np.reshape(np.array(rows, np.float32), (len(rows), *columns))
    return result
