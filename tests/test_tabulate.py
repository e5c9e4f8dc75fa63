"""From rollouts to the table."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lightningrl.tabulate import role_names, table_from_rollouts, trained_rollouts
from lightningrl.types import Rollout
from tests.batches import make_rollout, make_table


def test_entries_stand_in_order_of_rollout_and_turn():
    rollouts = [
        make_rollout("b", 1.0, [0.5, 0.25], lengths=[3, 2], roles=["writer", "checker"], trainable=[True, False]),
        make_rollout("a", 0.0, [0.0]),
        make_rollout("b", -1.0, [0.0, 0.0, 2.0], roles=["writer", "checker", "rewriter"]),
    ]
    table = table_from_rollouts(rollouts, size=8)
    assert table.valid.tolist() == [True] * 6 + [False] * 2
    assert table.rollout.tolist() == [0, 0, 1, 2, 2, 2, 0, 0]
    assert table.group.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert table.turn.tolist() == [0, 1, 0, 0, 1, 2, 0, 0]
    assert role_names(rollouts) == ("checker", "policy", "rewriter", "writer")
    assert table.role.tolist() == [3, 0, 1, 3, 0, 2, 0, 0]
    assert table.reward.tolist() == [0.5, 0.25, 0, 0, 0, 2, 0, 0]
    assert table.outcome.tolist() == [[1.0], [1.0], [0.0], [-1.0], [-1.0], [-1.0], [0.0], [0.0]]
    assert table.num_tokens.tolist() == [3, 2, 1, 1, 1, 1, 0, 0]
    assert table.weight.tolist() == [0.5, 0.5, 1.0, *[float(np.float32(1 / 3))] * 3, 0, 0]
    assert table.trainable.tolist() == [True, False, True, True, True, True, False, False]


def test_turns_are_sorted():
    rollout = make_rollout("g", 1.0, [1.0, 2.0, 3.0])
    shuffled = dataclasses.replace(rollout, transitions=rollout.transitions[::-1])
    assert make_table(shuffled).turn.tolist() == [0, 1, 2]
    assert make_table(shuffled).reward.tolist() == [1.0, 2.0, 3.0]


def test_dtypes():
    table = make_table(make_rollout("g", 1.0))
    assert {x.dtype for x in (table.rollout, table.group, table.turn, table.role, table.num_tokens)} == {np.dtype(np.int32)}
    assert {x.dtype for x in (table.reward, table.outcome, table.weight)} == {np.dtype(np.float32)}
    assert {x.dtype for x in (table.trainable, table.valid)} == {np.dtype(bool)}


def test_named_outcomes_have_the_reward_first():
    rollout = dataclasses.replace(make_rollout("g", 0.0), outcome={"format": 0.25, "accuracy": 0.5, "reward": 1.0})
    assert make_table(rollout).outcome.tolist() == [[1.0, 0.5, 0.25]]


def test_failed_rollouts_and_those_without_a_call_are_left_out():
    rollouts = [
        make_rollout("g", 9.0, [1.0, 1.0], status="failed"),
        make_rollout("g", 1.0),
        make_rollout("g", 9.0, [], status="ok"),
        make_rollout("g", 9.0, status="timed_out"),
        make_rollout("g", 2.0),
    ]
    table = table_from_rollouts(rollouts, size=3)
    assert table.outcome[:, 0].tolist() == [1.0, 2.0, 0.0]
    assert table.rollout.tolist() == [0, 1, 0]
    assert trained_rollouts(rollouts) == [rollouts[1], rollouts[4]]


def test_no_rollouts_make_a_table_of_padding():
    table = table_from_rollouts([make_rollout("g", 1.0, status="failed")], size=2)
    assert table.outcome.shape == (2, 1)
    assert not table.valid.any()


def test_bad_batches_get_a_sentence():
    good = make_rollout("g", 1.0, [0.0, 0.0], name="good")
    with pytest.raises(ValueError, match="have 2 transitions but the table holds 1: give it a size of at least 2"):
        table_from_rollouts([good], size=1)
    other = dataclasses.replace(good, id="other", outcome={"reward": 1.0, "format": 1.0})
    with pytest.raises(ValueError, match="'other' names the outcomes .* but 'good' names"):
        table_from_rollouts([good, other], size=9)
    with pytest.raises(ValueError, match="'other' has no outcome named 'reward'"):
        table_from_rollouts([dataclasses.replace(other, outcome={"score": 1.0})], size=9)
    with pytest.raises(ValueError, match="'r' the outcome 'reward' is nan"):
        table_from_rollouts([make_rollout("g", float("nan"))], size=9)
    with pytest.raises(ValueError, match="'r' the intermediate reward of turn 1 is inf"):
        table_from_rollouts([make_rollout("g", 1.0, [0.0, float("inf")])], size=9)


def asked(rollout: Rollout, *observations: str) -> Rollout:
    """The rollout with one user message before each call."""
    messages = [({"role": "user", "content": text},) for text in observations]
    return dataclasses.replace(
        rollout, transitions=tuple(dataclasses.replace(t, messages=m) for t, m in zip(rollout.transitions, messages, strict=True))
    )


def test_anchors_are_equal_where_the_last_states_of_a_group_are() -> None:
    table = make_table(
        asked(make_rollout("a", 1.0, (0.0,) * 3, name="1"), "start", "error", "rows"),
        asked(make_rollout("a", 0.0, (0.0,) * 3, name="2"), "start", "rows", "rows"),
        asked(make_rollout("b", 0.0, (0.0,), name="3"), "start"),
    )
    last, two, three = table.anchor.T
    assert (last[0], last[2], last[4]) == (last[3], last[4], last[5])  # "rows" after an error, after the start, after rows
    assert last[6] not in last[:6]  # the same words in another group are another state
    assert two[2] != two[4] != two[5]  # other histories of two
    assert two[0] == two[3] and three[0] == three[3]
    assert list(table.next_anchor) == [last[1], last[2], -1, last[4], last[5], -1, -1]


def test_a_tools_result_is_the_same_state_whatever_the_call_was_called() -> None:
    """Clients name each call by chance; that is no part of what the agent saw."""

    def searched(found: str, call_id: str) -> Rollout:
        rollout = make_rollout("g", 1.0, [0.0, 0.0], name=call_id)
        first, second = rollout.transitions
        seen = ({"role": "user", "content": "where?"}, {"role": "tool", "content": found, "tool_call_id": call_id})
        return dataclasses.replace(
            rollout, transitions=(dataclasses.replace(first, messages=seen[:1]), dataclasses.replace(second, messages=seen))
        )

    table = make_table(searched("Rome", "call_a"), searched("Rome", "call_b"), searched("Oslo", "call_a"))
    assert table.anchor[:, 0].tolist() == [0, 1, 0, 1, 0, 2]


def test_a_state_of_ones_own() -> None:
    rollouts = [make_rollout("a", 1.0, (0.0, 0.0), name="1"), make_rollout("a", 1.0, (0.0, 0.0), name="2")]
    table = table_from_rollouts(rollouts, size=4, state=lambda transition: transition.turn)
    assert list(table.anchor[:, 0]) == [0, 1, 0, 1]


def test_equal_responses_of_a_role_are_the_same_action() -> None:
    table = make_table(
        make_rollout("a", 1.0, (0.0, 0.0), lengths=(2, 3), name="1"),
        make_rollout("b", 1.0, (0.0, 0.0), lengths=(3, 3), roles=("policy", "checker"), name="2"),
    )
    assert list(table.action) == [0, 1, 1, 2]


def test_rollouts_that_were_not_branched_are_trees_of_one_path() -> None:
    table = make_table(make_rollout("a", 1.0, (0.0, 0.0), name="1"), make_rollout("a", 0.5, (0.0,), name="2"), size=5)
    tree = table.tree
    assert list(tree.parent) == [-1, 0, -1, -1, -1] and list(tree.tree) == [0, 0, 1, 0, 0]
    assert list(tree.path_node) == [0, 1, 2, 0, 0] and list(tree.path_rollout) == [0, 0, 1, 0, 0]
    assert list(tree.path_valid) == [True] * 3 + [False] * 2
    assert list(tree.path_outcome[:, 0]) == [1.0, 1.0, 0.5, 0.0, 0.0]
