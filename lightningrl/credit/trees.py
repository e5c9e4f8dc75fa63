"""Credit from rollouts that branch: what a call is worth is what the rollouts through it came to.

A transition that several rollouts share stands once in the table, and `table.tree` says which rollouts go through it. Rollouts
that were never branched are trees of one path, so every method here is defined for them too. Outcomes alone are read,
no intermediate rewards. A statistic of a group counts every rollout once, also those that share most of their way.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lightningrl.normalize import Scale, Singleton, group_normalize
from lightningrl.segments import EPSILON, joint_ids, safe_divide, safe_sqrt, segment_count, segment_max, segment_mean, segment_min
from lightningrl.table import Array, Credit, Evidence, TransitionTable


def node_values(table: TransitionTable) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The state after a transition, before it, and at the start of the task: each the mean outcome of the rollouts through it.

      V(n) = mean of R over the rollouts through n,   V(root) = mean of R over all rollouts of the group

    The state before a rollout's first call is the root, whichever tree it starts: all rollouts of a group are of one task. A
    mean of branched rollouts is an unbiased value only if where to branch was decided without looking at outcomes.

    Args:
      table: N transitions, L pairs in `tree`.

    Returns:
      (V(n), V(parent of n), V(root)), f32[N] each; 0 at padding.
    """
    _check_tree(table)
    tree, size = table.tree, table.rollout.shape[0]
    value = _mean(tree.path_outcome[:, 0], tree.path_node, size, jnp.asarray(tree.path_valid, jnp.float32))
    groups = jnp.asarray(table.group)[tree.path_node]
    root = _mean(tree.path_outcome[:, 0], groups, tree.path_node.shape[0], _path_weights(table))[table.group]
    before = jnp.where(tree.parent >= 0, value[jnp.maximum(tree.parent, 0)], root)
    value, before, root = (jnp.where(table.valid, x, 0.0) for x in (value, before, root))
    return value, before, root


def spo_tree(table: TransitionTable, evidence: Evidence) -> Credit:
    """What a call changed: the value after it minus the value before it (SPO-tree, arXiv 2505.23564; VinePPO's estimate on a tree).

      A(n) = V(n) - V(parent of n)

    Along any path the credits sum to R - V(root) where the path's last call is its own. A call that all rollouts of a tree
    share and that has no branch before it is compared with the other trees of the group. The difference of values was read in
    the authors' code; the paper's text was not checked, neither how its tree averages values nor how it scales A. Its mask,
    which leaves a loss only to tokens of π_old < 0.9 in that code, belongs to the loss and is not here.

    Args:
      table: N transitions with `tree`.
      evidence: not read.

    Returns:
      Credit of kind "advantage", f32[N]; 0 at padding, in a group of one rollout or of equal outcomes, and, up to rounding,
      after a state with one way out.
    """
    _check_tree(table)
    value, before, _ = node_values(table)
    return Credit(value=value - before, kind="advantage")


def treerl(table: TransitionTable, evidence: Evidence, *, reweight: bool = True) -> Credit:
    """Better than the start, and better than just before (TreeRL, arXiv 2506.11902, global and local advantage).

      A(n) = ((V(n) - V(root)) + (V(n) - V(parent of n))) / √(rollouts through n)

    A call that many rollouts share would be trained on once for each of them; the root takes part of that back. In the
    authors' code outcomes are first made relative to the other leaves, which changes A by a scale of about n / (n - 1), and a
    value of exactly 0 is replaced by the one before it; neither is done here. The formula was not checked against the paper's text.

    Args:
      table: N transitions with `tree`.
      evidence: not read.
      reweight: whether to divide by the root of the number of rollouts.

    Returns:
      Credit of kind "advantage", f32[N]; 0 at padding and in a group of one rollout or of equal outcomes.
    """
    _check_tree(table)
    value, before, root = node_values(table)
    advantage = (value - root) + (value - before)
    if reweight:
        through = segment_count(table.tree.path_node, table.rollout.shape[0], mask=table.tree.path_valid)
        advantage = safe_divide(advantage, safe_sqrt(through))
    return Credit(value=advantage, kind="advantage")


def tree_grpo(
    table: TransitionTable,
    evidence: Evidence,
    *,
    sequential: bool = False,
    scale: Scale = "std",
    ddof: float = 1.0,
    eps: float = EPSILON,
) -> Credit:
    """Rollouts relative to their tree and to the whole task (Tree-GRPO, arXiv 2509.21240).

      paper        Aᵢ = z(Rᵢ; rollouts of the tree) + z(Rᵢ; rollouts of the group)
      sequential   Aᵢ = z(z(Rᵢ; rollouts of the group); rollouts of the tree),   the inner z alone for a tree of one rollout
      A(n) = mean of Aᵢ over the rollouts i through n,   z(x) = (x - μ) / (σ + eps)

    The sum is the paper's, as its abstract has it; the sequence is what its published code does, and the two are not the same: the
    sequence forgets how good a tree is as a whole. Both treat a rollout as one sequence; where calls are shared, the mean
    over rollouts is the gradient that those sequences would give together, divided by their number.

    Args:
      table: N transitions with `tree`.
      evidence: not read.
      sequential: whether to do as the code does.
      scale, ddof, eps: `normalize.group_normalize`; the code's are "std", 1 and 10⁻⁶.

    Returns:
      Credit of kind "advantage", f32[N]; 0 at padding. A constant tree adds exactly 0, a tree of one rollout adds 0 to the sum, and
      a group of one rollout gets 0.
    """
    _check_tree(table)
    tree = table.tree
    trees = joint_ids(tree.path_valid, jnp.asarray(tree.tree)[tree.path_node])
    of_group = _relative_rollouts(table, scale=scale, ddof=ddof, eps=eps)
    weights = _path_weights(table)
    values = of_group if sequential else jnp.asarray(tree.path_outcome[:, 0])
    singleton: Singleton = "raw" if sequential else "zero"
    of_tree = group_normalize(values, trees, weights, units=tree.path_rollout, scale=scale, ddof=ddof, eps=eps, singleton=singleton)
    return _mean_over_rollouts(table, of_tree if sequential else of_tree + of_group)


def treeadv(table: TransitionTable, evidence: Evidence, *, scale: Scale = "std", ddof: float = 1.0, eps: float = EPSILON) -> Credit:
    """A shared call gets the mean of the advantages of the rollouts through it (TreeAdv, arXiv 2601.03703).

      A(n) = mean over the rollouts i through n of (Rᵢ - μ(R)) / (σ(R) + eps),   μ, σ over the rollouts of the group

    The paper speaks of aggregating the leaves' advantages; that all leaves weigh the same is our reading of it.

    Args:
      table: N transitions with `tree`.
      evidence: not read.
      scale, ddof, eps: `normalize.group_normalize`.

    Returns:
      Credit of kind "advantage", f32[N]; 0 at padding, in a constant group and in a group of one rollout. Without a branch it is
      GRPO's advantage, the same for all calls of a rollout.
    """
    _check_tree(table)
    return _mean_over_rollouts(table, _relative_rollouts(table, scale=scale, ddof=ddof, eps=eps))


def _check_tree(table: TransitionTable) -> None:
    tree = table.tree
    chex.assert_equal_shape([table.rollout, table.group, table.valid, tree.tree, tree.parent])
    chex.assert_equal_shape([tree.path_node, tree.path_rollout, tree.path_valid])
    chex.assert_shape(tree.path_outcome, (*tree.path_node.shape, None))
    chex.assert_type([table.valid, tree.path_valid, tree.path_outcome], [bool, bool, float])


def _mean(values: Array, ids: Array, size: int, weights: Array) -> jax.Array:
    """The weighted mean per id, and exactly the common value where all are equal, so that differences of such means are 0."""
    low, high = (f(values, ids, size, mask=weights > 0) for f in (segment_min, segment_max))
    return jnp.where(low == high, low, segment_mean(values, ids, size, weights=weights))


def _path_weights(table: TransitionTable) -> jax.Array:
    """f32[L]: 1 / transitions on the pair's rollout, so that every rollout weighs one."""
    tree, pairs = table.tree, table.tree.path_rollout.shape[0]
    length = segment_count(tree.path_rollout, pairs, mask=tree.path_valid)[tree.path_rollout]
    return jnp.where(tree.path_valid, safe_divide(1.0, length), 0.0)


def _relative_rollouts(table: TransitionTable, *, scale: Scale, ddof: float, eps: float) -> jax.Array:
    """f32[L]: the advantage of the pair's rollout in its group."""
    tree = table.tree
    groups = jnp.asarray(table.group)[tree.path_node]
    weights = _path_weights(table)
    return group_normalize(tree.path_outcome[:, 0], groups, weights, units=tree.path_rollout, scale=scale, ddof=ddof, eps=eps)


def _mean_over_rollouts(table: TransitionTable, of_pair: jax.Array) -> Credit:
    mean = segment_mean(of_pair, table.tree.path_node, table.rollout.shape[0], mask=table.tree.path_valid)
    return Credit(value=jnp.where(table.valid, mean, 0.0), kind="advantage")
