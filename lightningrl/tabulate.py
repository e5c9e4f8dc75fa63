"""From rollouts on the host to the TransitionTable that credit and advantages read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from lightningrl.table import TransitionTable, Tree
from lightningrl.types import Rollout, Transition

ANCHOR_DEPTH = 3  # K, how many last states an anchor looks back on at most


def last_message(transition: Transition) -> Hashable:
    """The state that a call was made in, as GiGPO (arXiv 2505.10978) has it: who is asked, and the observation in front of it.

    The id that ties a tool's result to the call it answers is drawn by chance, and no part of what was observed.
    """
    if not transition.messages:
        return transition.role, transition.prompt_ids.tobytes()
    seen = {name: value for name, value in transition.messages[-1].items() if name != "tool_call_id"}
    return transition.role, json.dumps(seen, sort_keys=True, default=str)


def table_from_rollouts(
    rollouts: Sequence[Rollout], *, size: int, state: Callable[[Transition], Hashable] = last_message
) -> TransitionTable:
    """One entry for every transition of every rollout that ran to its end, padded to `size`; NumPy arrays.

    Rollouts whose status is not `ok` are left out: a failed run is no reward of 0 (they stay visible to whoever counts
    rollouts). So is a rollout that made no call, which has nothing to train. The others are numbered 0 … R-1 in the order
    given, their groups 0 … G-1 in order of first appearance, their roles by name (`role_names`).

    Args:
      rollouts: every `ok` one names the same outcomes, "reward" among them, all finite.
      size: N, static, at least the number of transitions.
      state: what has to be equal for two calls of a group to have been made in the same state.

    Raises:
      ValueError: `size` is too small, outcomes differ between rollouts, or a reward is not a finite number.
    """
    used = trained_rollouts(rollouts)
    names = _outcome_names(used)
    roles = {name: index for index, name in enumerate(role_names(rollouts))}
    needed = sum(len(rollout.transitions) for rollout in used)
    if needed > size:
        raise ValueError(f"The rollouts have {needed} transitions but the table holds {size}: give it a size of at least {needed}.")

    table = _padding(size, len(names))
    groups: dict[str, int] = {}
    anchors, actions = [Numbering() for _ in range(ANCHOR_DEPTH)], Numbering()
    row = 0
    for number, rollout in enumerate(used):
        group = groups.setdefault(rollout.group, len(groups))
        states: list[Hashable] = []
        for transition in sorted(rollout.transitions, key=lambda t: t.turn):
            states.append(state(transition))
            _check_finite(transition.reward, f"the intermediate reward of turn {transition.turn}", rollout)
            table.rollout[row] = number
            table.group[row] = group
            table.turn[row] = transition.turn
            table.role[row] = roles[transition.role]
            table.reward[row] = transition.reward
            table.outcome[row] = [rollout.outcome[name] for name in names]
            table.num_tokens[row] = len(transition.response_ids)
            table.weight[row] = 1.0 / len(rollout.transitions)
            table.trainable[row] = transition.trainable
            table.valid[row] = True
            for k in range(ANCHOR_DEPTH):
                table.anchor[row, k] = anchors[k][group, tuple(states[-k - 1 :])]
            table.action[row] = actions[transition.role, transition.response_ids.tobytes()]
            table.tree.tree[row] = number
            if len(states) > 1:
                table.tree.parent[row] = row - 1
                table.next_anchor[row - 1] = table.anchor[row, 0]
            table.tree.path_node[row], table.tree.path_rollout[row] = row, number
            table.tree.path_outcome[row], table.tree.path_valid[row] = table.outcome[row], True
            row += 1
    return table


class Numbering(dict[Hashable, int]):
    """0, 1, 2 … for things in order of first appearance."""

    def __missing__(self, key: Hashable) -> int:
        self[key] = len(self)
        return self[key]


def table_size(transitions: int, multiple: int) -> int:
    """N of a table that holds them: a multiple of `multiple`, at least one, so that few shapes are compiled."""
    return max(1, -(-transitions // multiple)) * multiple


def role_names(rollouts: Sequence[Rollout]) -> tuple[str, ...]:
    """The roles that `TransitionTable.role` indexes, sorted by name."""
    return tuple(sorted({t.role for rollout in trained_rollouts(rollouts) for t in rollout.transitions}))


def trained_rollouts(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Those in the table, in order: rollout i of the table is the i-th of them."""
    return [rollout for rollout in rollouts if rollout.status == "ok" and rollout.transitions]


def _outcome_names(rollouts: Sequence[Rollout]) -> tuple[str, ...]:
    if not rollouts:
        return ("reward",)
    first = rollouts[0]
    for rollout in rollouts:
        if "reward" not in rollout.outcome:
            raise ValueError(f"Rollout {rollout.id!r} has no outcome named 'reward', which is the one that is trained on.")
        if rollout.outcome.keys() != first.outcome.keys():
            raise ValueError(
                f"Rollout {rollout.id!r} names the outcomes {sorted(rollout.outcome)} but {first.id!r} names "
                f"{sorted(first.outcome)}: all rollouts of a batch must name the same."
            )
        for name, value in rollout.outcome.items():
            _check_finite(value, f"the outcome {name!r}", rollout)
    return ("reward", *sorted(first.outcome.keys() - {"reward"}))


def _check_finite(value: float, what: str, rollout: Rollout) -> None:
    if not math.isfinite(value):
        raise ValueError(f"In rollout {rollout.id!r} {what} is {value}: rewards must be finite numbers.")


def _padding(size: int, num_outcomes: int) -> TransitionTable:
    return TransitionTable(
        rollout=np.zeros(size, np.int32),
        group=np.zeros(size, np.int32),
        turn=np.zeros(size, np.int32),
        role=np.zeros(size, np.int32),
        reward=np.zeros(size, np.float32),
        outcome=np.zeros((size, num_outcomes), np.float32),
        num_tokens=np.zeros(size, np.int32),
        weight=np.zeros(size, np.float32),
        trainable=np.zeros(size, bool),
        valid=np.zeros(size, bool),
        anchor=np.zeros((size, ANCHOR_DEPTH), np.int32),
        next_anchor=np.full(size, -1, np.int32),
        action=np.zeros(size, np.int32),
        tree=Tree(
            tree=np.zeros(size, np.int32),
            parent=np.full(size, -1, np.int32),
            path_node=np.zeros(size, np.int32),
            path_rollout=np.zeros(size, np.int32),
            path_outcome=np.zeros((size, num_outcomes), np.float32),
            path_valid=np.zeros(size, bool),
        ),
    )
