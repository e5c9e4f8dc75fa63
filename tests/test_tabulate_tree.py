"""From parents and branches to a table with trees."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings

from lightningrl.credit.trees import node_values, spo_tree, tree_grpo, treeadv, treerl
from lightningrl.table import Evidence
from lightningrl.tabulate import table_from_rollouts
from lightningrl.tabulate_tree import own_calls, table_from_branched_rollouts
from lightningrl.types import Rollout
from tests.batches import SIZE, batches, make_rollout


def branched(parent: Rollout, turn: int, outcome: float, own: int, name: str) -> Rollout:
    """A branch that repeats the parent's first calls and makes `own` more, of responses of 5 + turn tokens."""
    made = make_rollout(parent.group, outcome, [0.0] * (turn + own), lengths=[5 + k for k in range(turn + own)], name=name)
    calls = (*parent.transitions[:turn], *made.transitions[turn:])
    return dataclasses.replace(made, transitions=calls, parent=parent.id, metrics={"replayed_calls": float(turn)})


def observed(rollout: Rollout, *seen: str) -> Rollout:
    calls = zip(rollout.transitions, seen, strict=True)
    messages = tuple(dataclasses.replace(t, messages=({"role": "user", "content": text},)) for t, text in calls)
    return dataclasses.replace(rollout, transitions=messages)


def family() -> list[Rollout]:
    """a: 0 ─ 1 ─ 2; its branch b goes 0 ─ 3 ─ 4, b's branch c goes 0 ─ 3 ─ 5, and d stands beside them with 6."""
    a = observed(make_rollout("g", 1.0, [0.5, 0.0, 0.25], name="a"), "start", "x", "y")
    b = observed(branched(a, 1, 0.0, 2, "b"), "start", "x", "y")
    c = observed(branched(b, 2, 4.0, 1, "c"), "start", "x", "z")
    d = observed(make_rollout("g", 3.0, name="d"), "start")
    return [a, b, c, d]


def test_by_hand():
    table = table_from_branched_rollouts(family(), size=8, pairs=12)
    tree = table.tree
    assert table.valid.tolist() == [True] * 7 + [False]
    assert table.rollout.tolist() == [0, 0, 0, 1, 1, 2, 3, 0]
    assert table.turn.tolist() == [0, 1, 2, 1, 2, 2, 0, 0]
    assert table.outcome[:, 0].tolist() == [1, 1, 1, 0, 0, 4, 3, 0]
    assert table.reward.tolist() == [0.5, 0, 0.25, 0, 0, 0, 0, 0]
    assert table.num_tokens.tolist() == [1, 1, 1, 6, 7, 7, 1, 0]
    np.testing.assert_allclose(table.weight, [1 / 3] * 3 + [1 / 2] * 2 + [1, 1, 0])
    assert tree.parent.tolist() == [-1, 0, 1, 0, 3, 3, -1, -1]
    assert tree.tree.tolist() == [0, 0, 0, 0, 0, 0, 3, 0]
    assert tree.path_node.tolist() == [0, 1, 2, 0, 3, 4, 0, 3, 5, 6, 0, 0]
    assert tree.path_rollout.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 0, 0]
    assert tree.path_outcome[:, 0].tolist() == [1, 1, 1, 0, 0, 0, 4, 4, 4, 3, 0, 0]
    assert tree.path_valid.tolist() == [True] * 10 + [False] * 2


def test_anchors_look_back_across_a_branch():
    table = table_from_branched_rollouts(family(), size=7, pairs=10)
    last, two, three = table.anchor.T
    assert last[0] == last[6] and last[1] == last[3] and last[2] == last[4] != last[5]
    assert two[1] == two[3] and two[2] == two[4] and three[2] == three[4] != three[5]  # start, x, y of a and of b
    assert table.next_anchor.tolist() == [last[1], last[2], -1, last[4], -1, -1, -1]


@pytest.mark.slow
def test_tree_methods_on_it_by_hand():
    """V = mean of outcomes through the entry: 5/3 for the shared call, 2 for b's and c's; V(root) = 2."""
    table = table_from_branched_rollouts(family(), size=8, pairs=12)
    value, before, root = node_values(table)
    np.testing.assert_allclose(value, [5 / 3, 1, 1, 2, 0, 4, 3, 0], rtol=1e-6)
    np.testing.assert_allclose(before, [2, 5 / 3, 1, 5 / 3, 2, 2, 2, 0], rtol=1e-6)
    np.testing.assert_allclose(root, [2] * 7 + [0], rtol=1e-6)  # a weighted mean, over pairs
    np.testing.assert_allclose(spo_tree(table, Evidence()).value, [-1 / 3, -2 / 3, 0, 1 / 3, -2, 2, 1, 0], atol=1e-6)
    for assigner in (treerl, treeadv, tree_grpo):
        assert np.isfinite(np.asarray(jax.jit(assigner)(table, Evidence()).value)).all()


@settings(max_examples=20)
@given(batches())
def test_without_branches_it_is_the_table_of_rollouts(rollouts):
    plain = table_from_rollouts(rollouts, size=SIZE)
    made = table_from_branched_rollouts(rollouts, size=SIZE, pairs=SIZE)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(made), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    assert own_calls(rollouts) == rollouts


@pytest.mark.slow
def test_parents_may_come_after_their_branches():
    a, b, c, d = family()
    table = table_from_branched_rollouts([c, d, b, a], size=7, pairs=10)
    assert table.rollout.tolist() == [0, 1, 2, 2, 3, 3, 3]
    assert table.tree.parent.tolist() == [2, -1, 4, 2, -1, 4, 5]
    assert table.tree.tree.tolist() == [3, 1, 3, 3, 3, 3, 3]
    one, other = (
        np.sort(np.asarray(spo_tree(t, Evidence()).value)) for t in (table, table_from_branched_rollouts(family(), size=7, pairs=10))
    )
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_what_did_not_end_well_is_left_out():
    a, b, c, d = family()
    lost = [dataclasses.replace(branched(a, 1, 9.0, 1, s), status=s, outcome={}) for s in ("diverged", "failed", "timed_out")]
    one = table_from_branched_rollouts([a, lost[0], b, *lost[1:], c, d], size=8, pairs=12)
    for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(table_from_branched_rollouts(family(), size=8, pairs=12)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.slow
def test_a_branch_that_made_no_call_of_its_own_counts_where_it_passed():
    a, *_ = family()
    short = branched(a, 2, 7.0, 0, "short")
    d = make_rollout("g", 3.0, name="d")
    rollouts = [a, short, d]
    assert [r.id for r in own_calls(rollouts)] == ["a", "d", "short"]
    table = table_from_branched_rollouts(rollouts, size=4, pairs=6)
    assert table.rollout.tolist() == [0, 0, 0, 1]
    assert table.tree.path_node.tolist() == [0, 1, 2, 3, 0, 1] and table.tree.path_rollout.tolist() == [0, 0, 0, 1, 2, 2]
    assert node_values(table)[0].tolist() == [4, 4, 1, 3]


def test_own_calls_are_the_entries_in_order():
    own = own_calls(family())
    assert [(r.id, t.turn) for r in own for t in r.transitions] == [
        ("a", 0),
        ("a", 1),
        ("a", 2),
        ("b", 1),
        ("b", 2),
        ("c", 2),
        ("d", 0),
    ]


def test_no_rollouts_make_a_table_of_padding():
    table = table_from_branched_rollouts([], size=2, pairs=3)
    assert not table.valid.any() and not table.tree.path_valid.any()
    assert table.tree.parent.tolist() == [-1, -1] and table.tree.path_outcome.shape == (3, 1)


def test_bad_batches_get_a_sentence():
    a, b, c, d = family()
    with pytest.raises(ValueError, match="'c' was branched from 'b', which is not among the rollouts of the table"):
        table_from_branched_rollouts([a, c], size=8, pairs=12)
    with pytest.raises(ValueError, match="make 10 pairs of a rollout and a call but the table holds 9: give it at least 10"):
        table_from_branched_rollouts([a, b, c, d], size=7, pairs=9)
    with pytest.raises(ValueError, match="have 7 transitions but the table holds 6"):
        table_from_branched_rollouts([a, b, c, d], size=6, pairs=12)
    bare = dataclasses.replace(branched(a, 2, 7.0, 0, "bare"), outcome={"score": 1.0})
    with pytest.raises(ValueError, match="'bare' has the outcomes"):
        table_from_branched_rollouts([a, bare], size=3, pairs=12)
