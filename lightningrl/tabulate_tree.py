"""From rollouts and the branches that were started off them to one table in which a shared transition stands once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from lightningrl.table import TransitionTable, Tree
from lightningrl.tabulate import ANCHOR_DEPTH, Numbering, last_message, table_from_rollouts, trained_rollouts
from lightningrl.types import Rollout, Transition


def table_from_branched_rollouts(
    rollouts: Sequence[Rollout], *, size: int, pairs: int, state: Callable[[Transition], Hashable] = last_message
) -> TransitionTable:
    """The table of `own_calls(rollouts)`, with trees: a call that branches repeat is their parent's and has no entry of its own.

    An entry has the reward and outcome of the rollout that sampled it, and `weight` shares a rollout's weight among the
    entries it has. `tree` has a pair for every rollout and every transition on its way from the start, repeated ones too. Anchors look
    back across a branch. Of rollouts that were never branched it is the table of `table_from_rollouts`, with `pairs` pairs.

    Args:
      rollouts: parents and branches in any order; those whose status is not `ok` are left out, as in `table_from_rollouts`.
      size: N, static, at least the number of transitions that were sampled.
      pairs: L ≥ N, static, at least the number of calls of all rollouts, repeated ones counted again.
      state: as in `table_from_rollouts`.

    Raises:
      ValueError: as `table_from_rollouts`; `pairs` is too small; a branch's parent is not among the rollouts that are used.
    """
    own = own_calls(rollouts)
    table = table_from_rollouts(own, size=size, state=state)
    paths = _paths(own)
    needed = max(size, sum(map(len, paths)))
    if needed > pairs:
        raise ValueError(
            f"The rollouts make {needed} pairs of a rollout and a call but the table holds {pairs}: give it at least {needed}."
        )
    anchor, next_anchor = _anchors(table, [state(t) for rollout in own for t in rollout.transitions], own, paths)
    return dataclasses.replace(table, anchor=anchor, next_anchor=next_anchor, tree=_tree(table, own, paths, pairs))


def own_calls(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts of the table, numbered as there, each with only the calls that it sampled: entry i is the i-th of these.

    Those that sampled none come last: branches that ended where they started, whose outcomes count all the same.
    """
    used = trained_rollouts(rollouts)
    own = [dataclasses.replace(r, transitions=tuple(sorted(r.transitions, key=lambda t: t.turn))[first_sampled(r) :]) for r in used]
    return [rollout for rollout in own if rollout.transitions] + [rollout for rollout in own if not rollout.transitions]


def first_sampled(rollout: Rollout) -> int:
    """The turn from which on a rollout's calls are its own; those before are its parent's."""
    return int(rollout.metrics.get("replayed_calls", 0)) if rollout.parent is not None else 0


def _paths(own: Sequence[Rollout]) -> list[list[int]]:
    """The entries on each rollout's way from the start."""
    by_id: Mapping[str, int] = {rollout.id: number for number, rollout in enumerate(own)}
    starts = np.cumsum([0, *(len(rollout.transitions) for rollout in own)]).tolist()

    def path(number: int) -> list[int]:
        rollout = own[number]
        shared = first_sampled(rollout)
        if shared and rollout.parent not in by_id:
            raise ValueError(f"Rollout {rollout.id!r} was branched from {rollout.parent!r}, which is not among the rollouts of the table.")
        before = path(by_id[rollout.parent])[:shared] if shared and rollout.parent else []
        return [*before, *range(starts[number], starts[number + 1])]

    return [path(number) for number in range(len(own))]


def _anchors(
    table: TransitionTable, states: Sequence[Hashable], own: Sequence[Rollout], paths: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    anchor, next_anchor = np.zeros_like(table.anchor), np.full_like(table.next_anchor, -1)
    numbers = [Numbering() for _ in range(ANCHOR_DEPTH)]
    for rollout, path in zip(own, paths, strict=True):
        first = len(path) - len(rollout.transitions)
        for depth in range(first, len(path)):
            for k in range(ANCHOR_DEPTH):
                back = tuple(states[node] for node in path[max(0, depth - k) : depth + 1])
                anchor[path[depth], k] = numbers[k][int(table.group[path[depth]]), back]
            if depth > first:
                next_anchor[path[depth - 1]] = anchor[path[depth], 0]
    return anchor, next_anchor


def _tree(table: TransitionTable, own: Sequence[Rollout], paths: Sequence[Sequence[int]], pairs: int) -> Tree:
    names = _outcome_names(own)
    size = len(table.valid)
    tree = Tree(
        tree=np.zeros(size, np.int32),
        parent=np.full(size, -1, np.int32),
        path_node=np.zeros(pairs, np.int32),
        path_rollout=np.zeros(pairs, np.int32),
        path_outcome=np.zeros((pairs, len(names)), np.float32),
        path_valid=np.zeros(pairs, bool),
    )
    pair = 0
    for number, (rollout, path) in enumerate(zip(own, paths, strict=True)):
        here = slice(pair, pair + len(path))
        tree.path_node[here], tree.path_rollout[here], tree.path_valid[here] = path, number, True
        tree.path_outcome[here] = [rollout.outcome[name] for name in names]
        for depth in range(len(path) - len(rollout.transitions), len(path)):
            tree.parent[path[depth]] = path[depth - 1] if depth else -1
            tree.tree[path[depth]] = table.rollout[path[0]]
        pair = here.stop
    return tree


def _outcome_names(own: Sequence[Rollout]) -> tuple[str, ...]:
    """As `table_from_rollouts` has them, which has checked those that have entries."""
    if not own:
        return ("reward",)
    for rollout in own:
        if rollout.outcome.keys() != own[0].outcome.keys() or not np.isfinite(list(rollout.outcome.values())).all():
            raise ValueError(f"Rollout {rollout.id!r} has the outcomes {dict(rollout.outcome)}: all must name the same, of finite numbers.")
    return ("reward", *sorted(own[0].outcome.keys() - {"reward"}))
