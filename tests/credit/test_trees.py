"""Tree methods against loops over paths in float64, and by hand on a small tree."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl.credit.trees import node_values, spo_tree, tree_grpo, treeadv, treerl
from lightningrl.table import Evidence, Tree
from tests.batches import make_rollout, make_table, poison_table
from tests.credit.checks import relative_loop

NODES, PAIRS = 24, 60


@dataclasses.dataclass(frozen=True)
class Forest:
    """Nodes 0, 1, … with a parent, a tree and a group, and rollouts as (path of nodes, outcome)."""

    parents: tuple[int, ...]
    trees: tuple[int, ...]
    groups: tuple[int, ...]
    rollouts: tuple[tuple[tuple[int, ...], float], ...]

    def table(self, nodes=NODES, pairs=PAIRS):
        table = make_table(make_rollout("a", 0.0), size=nodes)
        known, flat = len(self.parents), [(n, r, x) for r, (path, x) in enumerate(self.rollouts) for n in path]

        def padded(values, size, dtype, fill=0):
            return np.array([*values, *[fill] * (size - len(values))], dtype)

        outcomes = padded([x for *_, x in flat], pairs, np.float32)[:, None]
        tree = Tree(
            tree=padded(self.trees, nodes, np.int32),
            parent=padded(self.parents, nodes, np.int32, -1),
            path_node=padded([n for n, *_ in flat], pairs, np.int32),
            path_rollout=padded([r for _, r, _ in flat], pairs, np.int32),
            path_outcome=outcomes,
            path_valid=padded([True] * len(flat), pairs, bool, False),
        )
        valid = padded([True] * known, nodes, bool, False)
        weight = valid.astype(np.float32)
        return dataclasses.replace(table, valid=valid, weight=weight, group=padded(self.groups, nodes, np.int32), tree=tree)

    def through(self, node):
        return [r for r, (path, _) in enumerate(self.rollouts) if node in path]

    def alike(self, of):
        """Rollouts by the tree or group of their first call."""
        members: dict = {}
        for r, (path, _) in enumerate(self.rollouts):
            members.setdefault(of[path[0]], []).append(r)
        return members.values()

    def relative(self, values, of, **settings_):
        result = [0.0] * len(values)
        for members in self.alike(of):
            for r, x in zip(members, relative_loop([values[r] for r in members], [1.0] * len(members), **settings_), strict=True):
                result[r] = x
        return result


@st.composite
def forests(draw):
    """One to two groups of one to three trees; each tree a rollout of one to three calls and up to two branches off it."""
    parents, trees, groups, rollouts = [], [], [], []
    tree = 0
    for group in range(draw(st.integers(1, 2))):
        for _ in range(draw(st.integers(1, 3))):
            trunk: list[int] = []
            for branch in range(draw(st.integers(1, 3))):
                path = trunk[: draw(st.integers(0, len(trunk)))] if branch else []
                for _ in range(1 if branch else draw(st.integers(1, 2))):
                    parents.append(path[-1] if path else -1)
                    trees.append(tree)
                    groups.append(group)
                    path = [*path, len(parents) - 1]
                trunk = trunk or path
                rollouts.append((tuple(path), float(draw(st.integers(-3, 3)))))
            tree += 1
    return Forest(tuple(parents), tuple(trees), tuple(groups), tuple(rollouts))


def values_loop(forest):
    outcomes = [x for _, x in forest.rollouts]
    value = [np.mean([outcomes[r] for r in forest.through(n)]) for n in range(len(forest.parents))]
    start = {forest.groups[forest.rollouts[m[0]][0][0]]: np.mean([outcomes[r] for r in m]) for m in forest.alike(forest.groups)}
    root = [start[g] for g in forest.groups]
    before = [value[p] if p >= 0 else root[n] for n, p in enumerate(forest.parents)]
    return np.array(value), np.array(before), np.array(root)


def spo_loop(forest):
    value, before, _ = values_loop(forest)
    return value - before


def treerl_loop(forest):
    value, before, root = values_loop(forest)
    return (2 * value - root - before) / np.sqrt([len(forest.through(n)) for n in range(len(value))])


def mean_loop(forest, advantages):
    return np.array([np.mean([advantages[r] for r in forest.through(n)]) for n in range(len(forest.parents))])


def treeadv_loop(forest):
    return mean_loop(forest, forest.relative([x for _, x in forest.rollouts], forest.groups))


def tree_grpo_loop(forest, sequential=False):
    outcomes = [x for _, x in forest.rollouts]
    outer = forest.relative(outcomes, forest.groups)
    if sequential:
        return mean_loop(forest, forest.relative(outer, forest.trees, raw=True))
    return mean_loop(forest, np.add(outer, forest.relative(outcomes, forest.trees)))


ASSIGNERS: dict[str, tuple[Any, ...]] = {
    "spo_tree": (spo_tree, spo_loop),
    "treerl": (treerl, treerl_loop),
    "treeadv": (treeadv, treeadv_loop),
    "tree_grpo": (tree_grpo, tree_grpo_loop),
    "tree_grpo, sequential": (functools.partial(tree_grpo, sequential=True), functools.partial(tree_grpo_loop, sequential=True)),
}
JITTED = {name: jax.jit(assigner) for name, (assigner, _) in ASSIGNERS.items()}
NAMES = pytest.mark.parametrize("name", list(ASSIGNERS))

# A first call that two of three rollouts share, and a tree of its own beside it.
#   0 ─ 1 (4)        3 (0)
#     └ 2 (2)
SMALL = Forest((-1, 0, 0, -1), (0, 0, 0, 1), (0, 0, 0, 0), (((0, 1), 4.0), ((0, 2), 2.0), ((3,), 0.0)))


@pytest.mark.slow
@NAMES
@settings(max_examples=20, deadline=None)
@given(forest=forests())
def test_is_that_of_a_loop(name, forest):
    value = JITTED[name](forest.table(), Evidence()).value
    assert value.dtype == np.float32
    np.testing.assert_allclose(value[: len(forest.parents)], ASSIGNERS[name][1](forest), rtol=2e-5, atol=3e-6)
    assert not np.asarray(value)[len(forest.parents) :].any()


@pytest.mark.slow
@NAMES
def test_padding_reaches_nothing(name):
    tight, table = SMALL.table(4, 5), SMALL.table()
    spoiled = poison_table(dataclasses.replace(table, tree=None))
    outcomes = np.where(table.tree.path_valid[:, None], table.tree.path_outcome, np.float32(np.nan))
    spoiled = dataclasses.replace(spoiled, tree=dataclasses.replace(table.tree, path_outcome=outcomes))
    clean, other, short = (np.asarray(JITTED[name](t, Evidence()).value) for t in (table, spoiled, tight))
    assert clean.tolist() == other.tolist()
    np.testing.assert_allclose(clean[:4], short, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@NAMES
def test_pairs_may_stand_in_any_order(name):
    table = SMALL.table(4, 5)
    order = np.array([3, 0, 4, 2, 1])
    pairs = {f: getattr(table.tree, f)[order] for f in ("path_node", "path_rollout", "path_outcome", "path_valid")}
    other = dataclasses.replace(table, tree=dataclasses.replace(table.tree, **pairs))
    one, two = (JITTED[name](t, Evidence()).value for t in (table, other))
    np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@NAMES
def test_constant_groups_and_groups_of_one_get_exactly_0(name):
    same = Forest((-1, 0, 0, -1, 3, 4, -1), (0, 0, 0, 1, 1, 1, 2), (0,) * 7, (((0, 1), 0.1), ((0, 2), 0.1), ((3, 4, 5), 0.1), ((6,), 0.1)))
    alone = Forest((-1, 0, 1), (0, 0, 0), (0, 0, 0), (((0, 1, 2), 0.7),))
    for forest in (same, alone):
        assert not np.asarray(JITTED[name](forest.table(), Evidence()).value).any()


@pytest.mark.slow
def test_by_hand():
    """V = 3, 4, 2, 0 and V(root) = 2."""
    table = SMALL.table(4, 5)
    value, before, root = node_values(table)
    assert (value.tolist(), before.tolist(), root.tolist()) == ([3, 4, 2, 0], [2, 3, 3, 2], [2, 2, 2, 2])
    assert spo_tree(table, Evidence()).value.tolist() == [1, 1, -1, -2]
    np.testing.assert_allclose(treerl(table, Evidence()).value, [2 / np.sqrt(2), 3, -1, -4], rtol=1e-6)
    assert treerl(table, Evidence(), reweight=False).value.tolist() == [2, 3, -1, -4]
    # σ of 4, 2, 0 is 2 and of 4, 2 is √2: between trees 1, 0, -1, within ±1/√2.
    np.testing.assert_allclose(treeadv(table, Evidence()).value, [0.5, 1, 0, -1], atol=1e-5)
    inner = 1 / np.sqrt(2)
    np.testing.assert_allclose(tree_grpo(table, Evidence()).value, [0.5, 1 + inner, -inner, -1], atol=1e-5)
    np.testing.assert_allclose(tree_grpo(table, Evidence(), sequential=True).value, [0, inner, -inner, -1], atol=1e-5)
    assert {f(table, Evidence()).kind for f in (spo_tree, treerl, treeadv, tree_grpo)} == {"advantage"}


@settings(max_examples=10, deadline=None)
@given(forest=forests())
def test_differences_telescope_along_a_path(forest):
    """To the value of the path's end, which is the outcome where the last call is the rollout's own, less that of the root."""
    credit = np.asarray(JITTED["spo_tree"](forest.table(), Evidence()).value)
    value, _, root = values_loop(forest)
    for path, _ in forest.rollouts:
        np.testing.assert_allclose(credit[list(path)].sum(), value[path[-1]] - root[path[0]], atol=1e-5)


@pytest.mark.slow
def test_rollouts_that_were_never_branched_are_paths():
    """TreeAdv is then GRPO, and the differences all fall on the first call."""
    table = make_table(make_rollout("a", 1.0, [0.0, 0.0]), make_rollout("a", 0.0, [0.0, 0.0, 0.0]), size=6)
    np.testing.assert_allclose(treeadv(table, Evidence()).value, np.array([1, 1, -1, -1, -1, 0]) / np.sqrt(2), atol=1e-5)
    assert spo_tree(table, Evidence()).value.tolist() == [0.5, 0, -0.5, 0, 0, 0]
