"""Sampled rollouts have the chances of the process, cost what is said, and become the tables that the library makes of them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningrl import credit
from lightningrl.lab import truth
from lightningrl.lab.difficulties import PROCESSES
from lightningrl.lab.process import ACTIONS, STATES, TURNS
from lightningrl.lab.records import make_table, make_tokens
from lightningrl.lab.sampling import BRANCHES, Plan, greedy, restart, sample, steps_per_group
from lightningrl.table import Evidence
from lightningrl.tabulate_tree import table_from_branched_rollouts
from lightningrl.types import Rollout, Task, Transition

LOGITS = np.random.default_rng(5).normal(size=(STATES, ACTIONS)).astype(np.float32)
GROUPS = 192
PLANS = {
    "groups": Plan("groups", groups=GROUPS, group_size=8),
    "trees": Plan("trees", groups=GROUPS, group_size=8),
    "branches": Plan("branches", groups=GROUPS, group_size=8, restarts=2),
}
sampled = jax.jit(sample, static_argnames="plan")
restarted = jax.jit(restart, static_argnames="plan")


@functools.lru_cache
def rollouts_of(name: str, kind: str, groups: float = GROUPS):
    """What is compiled for one test serves the others: there is room for all groups, also where only two are sampled."""
    found = sampled(PROCESSES[name](), LOGITS, jax.random.key(3), plan=PLANS[kind], groups=jnp.float32(groups))
    return jax.tree.map(np.asarray, found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["groups", "trees"])
@pytest.mark.parametrize("name", ["stochastic_tools", "mistake_and_recovery", "unequal_lengths"])
def test_states_and_actions_have_their_chances(name, kind):
    """1536 rollouts: within five standard deviations of the occupancy at every turn, also of rollouts that branched off."""
    process, rollouts = PROCESSES[name](), rollouts_of(name, kind)
    exact = np.asarray(jax.jit(truth.occupancy)(process, LOGITS))
    policy = np.asarray(jax.nn.softmax(LOGITS))
    # A tree's rollouts share their first calls, and its groups a task: fewer independent draws.
    independent = len(rollouts.made) / (len(BRANCHES) if kind == "trees" else 1)
    independent = independent if process.start.max() == 1 else GROUPS
    for turn in range(TURNS):
        chance = exact[turn][:, None] * policy
        seen = np.zeros((STATES, ACTIONS))
        np.add.at(seen, (rollouts.state[:, turn], rollouts.action[:, turn]), rollouts.made[:, turn])
        error = np.abs(seen / len(rollouts.made) - chance)
        assert (error <= 5 * np.sqrt(chance * (1 - chance) / independent)).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(PLANS))
@pytest.mark.parametrize("name", ["delayed_reward", "stochastic_tools", "unequal_lengths"])
def test_a_group_costs_what_is_said(name, kind):
    """Calls that were really made, extra rollouts among them, against the exact mean."""
    process, plan, rollouts = PROCESSES[name](), PLANS[kind], rollouts_of(name, "trees" if kind == "trees" else "groups")
    steps = float(rollouts.own.sum())
    if kind == "branches":
        steps += float(restarted(process, LOGITS, jax.random.key(4), rollouts, plan=plan)[1])
    said = float(jax.jit(steps_per_group, static_argnums=2)(process, LOGITS, plan))
    np.testing.assert_allclose(steps / plan.groups, said, rtol=1e-6 if name == "delayed_reward" else 0.1)


def test_a_greedy_rollout_is_counted():
    process = PROCESSES["unequal_lengths"]()
    cost = jax.jit(steps_per_group, static_argnums=2)
    plan = PLANS["groups"]
    extra = cost(process, LOGITS, dataclasses.replace(plan, greedy=True)) - cost(process, LOGITS, plan)
    paid, calls = jax.jit(greedy)(process, LOGITS, jax.random.key(0), jnp.zeros(5, jnp.int32))
    assert len(set(np.asarray(calls).tolist())) == 1
    np.testing.assert_allclose(extra, calls[0], rtol=1e-5)
    assert set(np.round(np.asarray(paid), 6).tolist()) <= {0.0, 0.3, 0.5, 1.0}


def test_groups_that_are_no_whole_number_are_drawn_by_chance():
    process, plan = PROCESSES["delayed_reward"](), PLANS["groups"]
    made = [sampled(process, LOGITS, jax.random.key(i), plan=plan, groups=jnp.float32(1.25)).made for i in range(100)]
    count = np.array([np.asarray(x)[:, 0].sum() / plan.group_size for x in made])
    assert set(count.tolist()) == {1.0, 2.0}
    np.testing.assert_allclose(count.mean(), 1.25, atol=0.15)


def test_restarts_mean_what_is_paid_from_there_on():
    """The mean of all restarts from a state at a turn is V there."""
    process, rollouts = PROCESSES["mistake_and_recovery"](), rollouts_of("mistake_and_recovery", "groups")
    mean, _ = restarted(process, LOGITS, jax.random.key(4), rollouts, plan=PLANS["branches"])
    v = np.asarray(jax.jit(truth.policy_values)(process, LOGITS).v)
    compared = 0
    for turn, state in np.ndindex(TURNS, STATES):
        here = rollouts.made[:, turn] & (rollouts.state[:, turn] == state)
        if here.sum() >= 100:
            of_state = np.asarray(mean)[here, turn]
            assert abs(of_state.mean() - v[turn, state]) < 5 * of_state.std() / np.sqrt(here.sum()) + 1e-6
            compared += 1
    assert compared >= 6
    assert not np.asarray(mean)[~rollouts.made].any()


def as_rollouts(name: str, kind: str) -> list[Rollout]:
    """The sampled rollouts as the host would have recorded them: prompts say what is shown, a response's first token is the action."""
    process, r = PROCESSES[name](), rollouts_of(name, kind, 2.0)
    result = []
    for i in np.flatnonzero(r.made[:, 0]):
        calls = []
        for turn in np.flatnonzero(r.made[i]):
            state, action = int(r.state[i, turn]), int(r.action[i, turn])
            response = np.zeros(process.tokens[state, action], np.int32)
            response[0] = action
            calls.append(
                Transition(
                    prompt_ids=np.array([process.observation[state]], np.int32),
                    response_ids=response,
                    logprobs=np.zeros(len(response), np.float32),
                    temperature=1.0,
                    policy_version=0,
                    role=f"role {process.role[state]}",
                    turn=int(turn),
                    reward=float(process.reward[state, action]),
                )
            )
        shared = int((~r.own[i] & r.made[i]).sum())
        rollout = Rollout(f"r{i}", Task("t", {}), f"g{r.group[i]}", 0, 0, tuple(calls), {"reward": float(r.outcome[i])}, "ok")
        if shared:
            rollout = dataclasses.replace(rollout, parent=f"r{r.tree[i]}", metrics={"replayed_calls": float(shared)})
        result.append(rollout)
    return result


def pattern(ids: np.ndarray) -> list[int]:
    """Numbers renamed in order of first appearance: which are equal, and nothing else."""
    return [list(dict.fromkeys(ids.tolist())).index(x) for x in ids.tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["groups", "trees"])
@pytest.mark.parametrize("name", ["one_to_blame", "mistake_and_recovery", "key_used_late", "distractor_turn"])
def test_the_table_is_what_the_library_makes_of_the_same_rollouts(name, kind):
    """Every field, ids up to their names, and the credit that methods of every kind read off it."""
    r = rollouts_of(name, kind, 2.0)
    table = jax.tree.map(np.asarray, jax.jit(make_table, static_argnums=2)(PROCESSES[name](), r, 8))
    size = table.valid.size
    theirs = table_from_branched_rollouts(as_rollouts(name, kind), size=size, pairs=size)
    ours, known = np.flatnonzero(table.valid), np.flatnonzero(theirs.valid)
    assert len(ours) == len(known) and len(np.unique(theirs.group[known])) == 2
    for field in ("turn", "role", "reward", "outcome", "num_tokens", "weight", "trainable"):
        np.testing.assert_allclose(getattr(table, field)[ours], getattr(theirs, field)[known], rtol=1e-6, err_msg=field)
    for field in ("rollout", "group", "next_anchor"):
        assert pattern(getattr(table, field)[ours]) == pattern(getattr(theirs, field)[known]), field
    for k in range(table.anchor.shape[1]):
        assert pattern(table.anchor[ours, k]) == pattern(theirs.anchor[known, k])
    both = (((table.role * ACTIONS) + table.action)[ours], theirs.action[known])
    assert len(np.unique(both[0])) <= len(np.unique(both[1]))  # in the lab the length of a response is no part of the action
    assert pattern(np.r_[-1, ours[:1], table.tree.parent[ours]]) == pattern(np.r_[-1, known[:1], theirs.tree.parent[known]])
    for assign in (credit.hgpo, credit.rewardflow, credit.salt, credit.spo_tree, credit.tree_grpo):
        one, other = (np.asarray(jax.jit(assign)(x, Evidence()).value) for x in (table, theirs))
        np.testing.assert_allclose(one[ours], other[known], atol=1e-5, err_msg=assign.__name__)


def test_tokens():
    """The first token has the log-prob of the choice, those after it follow from it; nothing at padding."""
    process, r = PROCESSES["unequal_lengths"](), rollouts_of("unequal_lengths", "groups", 2.0)
    tokens = jax.tree.map(np.asarray, jax.jit(make_tokens)(process, r, LOGITS, 2 * LOGITS))
    logp = np.asarray(jax.nn.log_softmax(LOGITS))
    by_call = tokens.mask.reshape(*r.made.shape, -1)
    for i, turn in np.ndindex(r.made.shape):
        state, action = r.state[i, turn], r.action[i, turn]
        expected = process.tokens[state, action] if r.made[i, turn] else 0
        assert by_call[i, turn].sum() == expected
        chosen = tokens.old_logp.reshape(by_call.shape)[i, turn]
        np.testing.assert_allclose(chosen, [logp[state, action] if expected else 0.0, 0.0, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(tokens.old_logp, tokens.behaviour_logp)
    assert (tokens.ref_logp != tokens.old_logp)[tokens.mask & (tokens.k == 0)].any()


def test_a_tree_needs_whole_trees():
    with pytest.raises(ValueError, match="whole trees of 4"):
        Plan("trees", group_size=6)
