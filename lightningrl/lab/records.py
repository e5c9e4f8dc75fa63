"""Sampled rollouts as the records that credit, advantages and losses read."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lightningrl.lab.process import ACTIONS, RESPONSE, STATES, TURNS, Process
from lightningrl.lab.sampling import Rollouts
from lightningrl.segments import segment_count
from lightningrl.table import Array, TokenTable, TransitionTable, Tree

DEPTH = 3  # K, as in tabulate.ANCHOR_DEPTH


def make_table(process: Process, rollouts: Rollouts, group_size: int) -> TransitionTable:
    """One entry for each call, that of rollout r at turn t at place r T + t; the other places are padding.

    States are equal where (role, observation) is. A call that a branch shares with its trunk stands at the trunk's place only.
    Rollouts r, r+1, … of a group are consecutive, `group_size` of them.
    """
    size = rollouts.made.size
    valid = jnp.ravel(rollouts.own)
    fill = lambda x, padding=0: jnp.where(valid, jnp.ravel(x), padding)  # noqa: E731
    per_call = lambda x: jnp.broadcast_to(x[:, None], rollouts.made.shape)  # noqa: E731
    number = jnp.arange(rollouts.made.shape[0], dtype=jnp.int32)
    rollout, group = fill(per_call(number)), fill(per_call(rollouts.group))
    role = process.role[rollouts.state]
    anchor = _anchors(role * STATES + process.observation[rollouts.state], rollouts.own, group_size)
    calls = segment_count(rollout, size, mask=valid)[rollout]
    goes_on = jnp.logical_and(rollouts.own[:, :-1], rollouts.made[:, 1:])
    following = jnp.where(goes_on, anchor[:, 0].reshape(rollouts.made.shape)[:, 1:], -1)
    outcome = per_call(rollouts.outcome)
    return TransitionTable(
        rollout=rollout,
        group=group,
        turn=fill(jnp.broadcast_to(jnp.arange(TURNS, dtype=jnp.int32), rollouts.made.shape)),
        role=fill(role),
        reward=fill(rollouts.reward, 0.0),
        outcome=fill(outcome, 0.0)[:, None],
        num_tokens=fill(process.tokens[rollouts.state, rollouts.action]),
        weight=jnp.where(valid, 1.0 / jnp.maximum(calls, 1.0), 0.0),
        trainable=valid,
        valid=valid,
        anchor=anchor,
        next_anchor=fill(jnp.pad(following, ((0, 0), (0, 1)), constant_values=-1), -1),
        action=fill(role * ACTIONS + rollouts.action),
        tree=_tree(rollouts, fill, per_call(number), outcome),
    )


def make_tokens(process: Process, rollouts: Rollouts, logits: Array, reference: Array) -> TokenTable:
    """The tokens of all responses, edge n K + k token k of call n: the first is the action, those after it are certain.

    Args:
      logits, reference: f32[S, A], of the policy that sampled and of the one that KL is measured to.
    """
    size = rollouts.made.size
    k = jnp.arange(RESPONSE, dtype=jnp.int32)
    length = jnp.ravel(process.tokens[rollouts.state, rollouts.action])
    mask = jnp.logical_and(jnp.ravel(rollouts.own)[:, None], k < length[:, None])
    chosen = jnp.where(mask & (k == 0), 1, 0)
    of_token = lambda x: jnp.ravel(chosen * jnp.ravel(x)[:, None])  # noqa: E731
    logp, ref_logp = (jax.nn.log_softmax(x)[rollouts.state, rollouts.action] for x in (logits, reference))
    return TokenTable(
        transition=jnp.ravel(jnp.where(mask, jnp.arange(size, dtype=jnp.int32)[:, None], 0)),
        k=jnp.ravel(jnp.where(mask, k, 0)),
        node=jnp.arange(size * RESPONSE, dtype=jnp.int32),
        token=of_token(rollouts.action),
        temperature=jnp.ones(size * RESPONSE),
        old_logp=of_token(logp),
        behaviour_logp=of_token(logp),
        ref_logp=of_token(ref_logp),
        mask=jnp.ravel(mask),
    )


def _anchors(shown: Array, own: Array, group_size: int) -> jax.Array:
    """int32[N, K]: the place of the first call of the group whose last k+1 states are equal; shorter histories are shorter tuples.

    Equal where the ids of `tabulate` are. Groups are short: to compare all pairs is quicker than to sort.
    """
    size = group_size * TURNS
    by_group = lambda x: jnp.asarray(x).reshape(-1, size)  # noqa: E731
    valid, here = by_group(own), jnp.arange(size, dtype=jnp.int32)
    start = jnp.arange(valid.shape[0], dtype=jnp.int32)[:, None] * size
    equal = valid[:, :, None] & valid[:, None, :]
    columns = []
    for back in range(DEPTH):
        earlier = by_group(jnp.pad(shown, ((0, 0), (back, 0)), constant_values=-1)[:, : shown.shape[1]])
        equal = equal & (earlier[:, :, None] == earlier[:, None, :])
        first = jnp.min(jnp.where(equal, here, size), -1)
        columns.append(jnp.ravel(jnp.where(valid, first + start, 0)))
    return jnp.stack(columns, 1)


def _tree(rollouts: Rollouts, fill: Callable[..., jax.Array], number: Array, outcome: Array) -> Tree:
    before = jnp.pad(rollouts.node[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    made = jnp.ravel(rollouts.made)
    of_path = lambda x: jnp.where(made, jnp.ravel(x), 0)  # noqa: E731
    return Tree(
        tree=fill(jnp.broadcast_to(rollouts.tree[:, None], rollouts.made.shape)),
        parent=fill(before, -1),
        path_node=of_path(rollouts.node),
        path_rollout=of_path(number),
        path_outcome=of_path(outcome)[:, None],
        path_valid=made,
    )
