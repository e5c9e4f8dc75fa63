"""The running baseline of roles against a loop, and what it must not depend on."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl.advantages.baselines import role_baseline
from lightningrl.credit import identical
from lightningrl.evidence.role_baseline import role_baselines
from lightningrl.types import Rollout
from tests.batches import SIZE, batches, by_rollout, make_rollout, make_table

KEY = jax.random.key(0)


def produce(rollouts, aux=None, **settings):
    """What producer and state say, with the padding off; of one size for all, so that little is compiled."""
    evidence, after = role_baselines(None, aux, rollouts, KEY, **{"multiple": SIZE} | settings)
    values = np.asarray(evidence.role_baseline)
    calls = sum(len(r.transitions) for r in rollouts if r.status == "ok")
    assert not values[calls:].any()
    return values[:calls], after


def acted(rollout: Rollout) -> set[str]:
    return {transition.role for transition in rollout.transitions}


def one_rollout_at_a_time(rollouts, start, decay):
    """SPIRAL's loop: b moves once for each rollout that a role acted in."""
    b = dict(start)
    for rollout in rollouts:
        for role in acted(rollout):
            b[role] = decay * b.get(role, 0.0) + (1 - decay) * rollout.reward
    return b


@settings(max_examples=10, deadline=None)
@given(rollouts=batches(), decay=st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_evidence_is_what_was_known_before_and_the_state_moves_after(rollouts, decay):
    before = {"writer": 0.25, "judge": 7.0}
    values, after = produce(rollouts, before, decay=decay, steps="batch")
    assert values.dtype == np.float32
    assert values.tolist() == [before.get(t.role, 0.0) for r in rollouts for t in r.transitions]
    expected = dict(before)
    for role in set().union(*map(acted, rollouts)):
        rewards = [r.reward for r in rollouts if role in acted(r)]
        expected[role] = decay * before.get(role, 0.0) + (1 - decay) * sum(rewards) / len(rewards)
    assert after.keys() == expected.keys()
    for role, b in expected.items():
        np.testing.assert_allclose(after[role], b, rtol=1e-5, atol=1e-6)


def test_a_batch_moves_it_as_far_as_spirals_loop_does_in_the_mean_over_orders():
    rollouts = [
        make_rollout("a", 1.0, [0.0] * 3, roles=["writer", "checker", "writer"]),
        make_rollout("a", -0.5, [0.0], roles=["writer"]),
        make_rollout("b", 0.25, [0.0] * 2, roles=["checker", "checker"]),
        make_rollout("b", 2.0, [0.0], roles=["writer"]),
    ]
    start = {"writer": 0.5, "checker": -1.0}
    _, after = produce(rollouts, start, decay=0.8)
    orders = [one_rollout_at_a_time(order, start, 0.8) for order in itertools.permutations(rollouts)]
    for role in start:
        np.testing.assert_allclose(after[role], np.mean([b[role] for b in orders]), rtol=1e-5)


def test_it_counts_rollouts_and_not_rows():
    _, few = produce([make_rollout("a", 1.0, [0.0]), make_rollout("a", 0.0, [0.0])], decay=0.5)
    _, many = produce([make_rollout("a", 1.0, [0.0] * 9), make_rollout("a", 0.0, [0.0])], decay=0.5)
    assert few == many == {"policy": 0.375}


def test_no_rollout_is_compared_with_itself():
    """Other rewards in the batch leave this batch's baseline as it is: the order that is not biased."""
    rollouts = [make_rollout("a", 1.0, [0.0, 0.0]), make_rollout("a", 3.0, [0.0])]
    others = [dataclasses.replace(r, outcome={"reward": -r.reward}) for r in rollouts]
    (values, after), (same, elsewhere) = produce(rollouts, {"policy": 0.5}), produce(others, {"policy": 0.5})
    assert values.tolist() == same.tolist() == [0.5, 0.5, 0.5]
    assert after["policy"] > 0.5 > elsewhere["policy"]


def test_the_order_of_rollouts_does_not_matter():
    rollouts = [make_rollout("a", reward, [0.0] * calls, name=f"r{i}") for i, (reward, calls) in enumerate([(1.0, 1), (0.0, 3), (0.5, 2)])]
    (values, after), (other, same) = produce(rollouts, {"policy": 0.125}), produce(rollouts[::-1], {"policy": 0.125})
    assert by_rollout(rollouts, values) == by_rollout(rollouts[::-1], other)
    np.testing.assert_allclose(after["policy"], same["policy"], rtol=1e-6)


def test_what_roles_earn_may_differ():
    """A zero-sum game: the loser earns the negative, and the mean of a role's calls is what it earned."""
    rollouts = [make_rollout("a", 1.0, [0.0] * 3, roles=["first", "second", "first"])] * 2
    _, after = produce(rollouts, decay=0.5, steps="batch", earned=lambda r: [1.0, -1.0, 0.5])
    assert after == {"first": 0.375, "second": -0.5}
    with pytest.raises(ValueError, match="rollout 'r' has 3 calls, but 2 numbers"):
        produce(rollouts, earned=lambda r: [1.0, -1.0])


def test_states_of_several_batches_are_one_running_mean_and_json():
    batch = [make_rollout("a", 1.0, [0.0]), make_rollout("a", 0.0, [0.0, 0.0])]
    state = None
    for _ in range(3):
        _, state = produce(batch, state, decay=0.5, steps="batch")
        state = json.loads(json.dumps(state))
    assert state == {"policy": 0.5 * (1 - 0.5**3)}


def test_the_advantage_that_reads_it():
    rollouts = [make_rollout("a", 1.0, [0.0, 0.0], roles=["writer", "checker"]), make_rollout("a", 0.0, [0.0], roles=["writer"])]
    evidence, _ = role_baselines(None, {"writer": 0.25, "checker": -1.0}, rollouts, KEY, multiple=4)
    table = make_table(*rollouts, size=4)
    advantage = role_baseline(table, identical(table, evidence), evidence)
    assert np.asarray(advantage).tolist() == [0.75, 2.0, -0.25, 0.0]


def test_failed_rollouts_and_empty_batches():
    good, failed = make_rollout("a", 1.0, [0.0]), make_rollout("a", -9.0, [0.0], roles=["other"], status="failed")
    values, after = produce([failed, good], {"policy": 2.0}, decay=0.5)
    assert (values.tolist(), after) == ([2.0], {"policy": 1.5})
    evidence, after = role_baselines(None, {"policy": 0.5}, [failed], KEY, multiple=2)
    assert (np.asarray(evidence.role_baseline).tolist(), after) == ([0.0, 0.0], {"policy": 0.5})


@pytest.mark.parametrize("decay", [-0.1, 1.5])
def test_a_decay_out_of_range_gets_a_sentence(decay):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        produce([make_rollout("a", 1.0)], decay=decay)


def test_settings_are_fixed_as_a_producer_wants_them():
    producer = functools.partial(role_baselines, decay=0.5, multiple=8)
    evidence, _ = producer(None, None, [make_rollout("a", 1.0)], KEY)
    assert evidence.role_baseline is not None and evidence.role_baseline.shape == (8,)
