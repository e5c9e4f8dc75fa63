"""Every assigner against a loop over rollouts in float64, and against its invariants."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl import credit
from lightningrl.table import Evidence
from tests.batches import SIZE, batches, by_rollout, make_rollout, make_table, poison_table, with_padding

GAMMA, LAMBDA = 0.5, 0.25


def identical_loop(rollout, values):
    return [rollout.reward] * len(rollout.transitions)


def identical_with_intermediate_loop(rollout, values):
    return [rollout.reward + sum(t.reward for t in rollout.transitions)] * len(rollout.transitions)


def intermediate_loop(rollout, values):
    return [t.reward + rollout.reward for t in rollout.transitions]


def reward_to_go_loop(rollout, values):
    rewards = [t.reward for t in rollout.transitions]
    rewards[-1] += rollout.reward
    return [sum(GAMMA ** (s - t) * rewards[s] for s in range(t, len(rewards))) for t in range(len(rewards))]


def gae_and_values_loop(rollout, values):
    """Backwards over the calls; one that is not trained is worth what comes, and neither discounts an error nor makes one."""
    rewards = [t.reward for t in rollout.transitions]
    rewards[-1] += rollout.reward
    value, advantage, made = 0.0, 0.0, []
    for transition, reward, said in reversed(list(zip(rollout.transitions, rewards, values, strict=True))):
        comes = reward + GAMMA * value
        if transition.trainable:
            advantage, value = comes - said + GAMMA * LAMBDA * advantage, said
        else:
            advantage, value = GAMMA * advantage, comes
        made.append((advantage, value))
    return made[::-1]


def gae_loop(rollout, values):
    return [advantage for advantage, _ in gae_and_values_loop(rollout, values)]


def gae_value_target_loop(rollout, values):
    return [advantage + value for advantage, value in gae_and_values_loop(rollout, values)]


def lambda_return_loop(rollout, values):
    """Backwards over the calls, by the recursion in returns; the critic does not say what one that is not trained is worth."""
    rewards = [t.reward for t in rollout.transitions]
    rewards[-1] += rollout.reward
    value, total, made = 0.0, 0.0, []
    for transition, reward, said in reversed(list(zip(rollout.transitions, rewards, values, strict=True))):
        mixed = (1 - LAMBDA) * value + LAMBDA * total if transition.trainable else total
        total, value = reward + GAMMA * mixed, said if transition.trainable else reward + GAMMA * value
        made.append(total)
    return made[::-1]


def value_of(assigner):
    return lambda table, evidence: assigner(table, evidence).value


ASSIGNERS = {
    "identical": (value_of(credit.identical), identical_loop),
    "identical with intermediate": (
        value_of(functools.partial(credit.identical, include_intermediate=True)),
        identical_with_intermediate_loop,
    ),
    "intermediate": (value_of(credit.intermediate), intermediate_loop),
    "reward_to_go": (value_of(functools.partial(credit.reward_to_go, gamma=GAMMA)), reward_to_go_loop),
    "gae": (value_of(functools.partial(credit.gae, gamma=GAMMA, lambda_=LAMBDA)), gae_loop),
    "lambda_return": (value_of(functools.partial(credit.lambda_return, gamma=GAMMA, lambda_=LAMBDA)), lambda_return_loop),
    "gae_value_target": (functools.partial(credit.gae_value_target, gamma=GAMMA, lambda_=LAMBDA), gae_value_target_loop),
}
WHOLE_RETURN = jax.jit(functools.partial(credit.identical, include_intermediate=True))
UNDISCOUNTED = jax.jit(functools.partial(credit.reward_to_go, gamma=1.0))
GAE_OF_ONES = jax.jit(functools.partial(credit.gae, gamma=1.0, lambda_=1.0))
TARGET_OF_ONES = jax.jit(functools.partial(credit.gae_value_target, gamma=1.0, lambda_=1.0))
ONE_STEP = jax.jit(functools.partial(credit.gae, gamma=1.0, lambda_=0.0))
TURN_REWARDS = jax.jit(credit.turn_rewards)
JITTED = {name: jax.jit(assigner) for name, (assigner, _) in ASSIGNERS.items()}
NAMES = pytest.mark.parametrize("name", list(ASSIGNERS))


def evidence_of(table, seed=0):
    value = np.random.default_rng(seed).uniform(-1, 1, table.valid.shape).astype(np.float32)
    return Evidence(value=np.where(table.valid, value, 0).astype(np.float32))


@pytest.mark.slow
@NAMES
@settings(max_examples=30, deadline=None)
@given(rollouts=batches())
def test_is_that_of_a_loop(name, rollouts):
    table = make_table(*rollouts, size=SIZE)
    evidence = evidence_of(table)
    actual = JITTED[name](table, evidence)
    assert actual.dtype == jnp.float32
    values = by_rollout(rollouts, evidence.value)
    expected = [x for r in rollouts for x in ASSIGNERS[name][1](r, values[r.id])]
    np.testing.assert_allclose(actual[: len(expected)], expected, rtol=1e-5, atol=1e-6)
    assert (np.asarray(actual)[len(expected) :] == 0).all()


@pytest.mark.slow
@NAMES
@settings(max_examples=15, deadline=None)
@given(rollouts=batches(), data=st.data())
def test_the_order_of_rollouts_does_not_matter(name, rollouts, data):
    def credits(order):
        table = make_table(*order, size=SIZE)
        value = np.zeros(SIZE, np.float32)
        row = 0
        for rollout in order:
            for transition in rollout.transitions:
                value[row] = 0.25 * transition.turn - 0.125 * int(rollout.id[1:])
                row += 1
        return by_rollout(order, np.asarray(JITTED[name](table, Evidence(value=value))))

    assert credits(rollouts) == credits(data.draw(st.permutations(rollouts)))


@pytest.mark.slow
@NAMES
def test_nan_in_padding_reaches_nothing(name):
    rollouts = [make_rollout("a", 1.0, [0.5, 0.0, 0.25]), make_rollout("a", 0.0, [0.0])]
    table = with_padding(rollouts, 4)
    poisoned = poison_table(table)
    value = np.where(table.valid, np.float32(0.5), np.float32(np.nan))
    clean, spoiled = (JITTED[name](t, Evidence(value=v)) for t, v in ((table, np.nan_to_num(value)), (poisoned, value)))
    assert clean.tolist() == spoiled.tolist()

    def total(reward, outcome):
        replaced = dataclasses.replace(poisoned, reward=reward, outcome=outcome)
        return jnp.sum(JITTED[name](replaced, Evidence(value=value)))

    for gradient in jax.grad(total, argnums=(0, 1))(poisoned.reward, poisoned.outcome):
        assert np.isfinite(gradient).all()


@NAMES
def test_more_padding_changes_nothing(name):
    rollouts = [make_rollout("a", 1.0, [0.5, 0.0, 0.25]), make_rollout("b", 0.5, [0.0, 1.0])]
    short, long = with_padding(rollouts, 0), with_padding(rollouts, 7)
    value = evidence_of(short).value
    without = JITTED[name](short, Evidence(value=value))
    padded = JITTED[name](long, Evidence(value=np.concatenate([value, np.zeros(7, np.float32)])))
    assert padded.tolist() == [*without.tolist(), *[0.0] * 7]


class ByHandTest(chex.TestCase):
    """One rollout of three calls, intermediate rewards 1, 0, 4, outcome 8."""

    table = make_table(make_rollout("a", 8.0, [1.0, 0.0, 4.0]), size=4)

    @chex.variants(with_jit=True, without_jit=True)
    def test_by_hand(self):
        evidence = Evidence(value=np.array([2, 4, 8, 0], np.float32))
        results = {
            "identical": [8, 8, 8, 0],
            "identical with intermediate": [13, 13, 13, 0],
            "intermediate": [9, 8, 12, 0],
            "reward_to_go": [4, 6, 12, 0],
            "gae": [1 + 4 / 64, 0.5, 4, 0],  # errors 1, 0, 4 and γλ = ⅛
            "lambda_return": [3 + 4 / 64, 4.5, 12, 0],
            "gae_value_target": [3 + 4 / 64, 4.5, 12, 0],
        }
        for name, expected in results.items():
            self.assertEqual(self.variant(ASSIGNERS[name][0])(self.table, evidence).tolist(), expected)


def test_kinds():
    table, evidence = ByHandTest.table, Evidence(value=np.zeros(4, np.float32))
    kinds = {f.__name__: f(table, evidence).kind for f in (credit.identical, credit.intermediate, credit.reward_to_go)}
    assert kinds == {"identical": "return", "intermediate": "return", "reward_to_go": "return"}
    assert jax.jit(credit.gae)(table, evidence).kind == "advantage"
    assert jax.jit(credit.lambda_return)(table, evidence).kind == "return"


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(rollouts=batches(integers=True))
def test_undiscounted_reward_to_go_of_the_first_call_is_the_whole_return(rollouts):
    table = make_table(*rollouts, size=SIZE)
    to_go = UNDISCOUNTED(table, Evidence()).value
    whole = WHOLE_RETURN(table, Evidence()).value
    first = np.logical_and(table.turn == 0, table.valid)
    assert to_go[first].tolist() == whole[first].tolist()


@settings(max_examples=20, deadline=None)
@given(rollouts=batches(integers=True))
def test_gae_telescopes(rollouts):
    """γ = λ = 1: the return minus the value; λ = 0: the one-step error. Exact on small integers, where every call is trained."""
    table = make_table(*rollouts, size=SIZE)
    table = dataclasses.replace(table, trainable=table.valid)
    evidence = Evidence(value=np.where(table.valid, table.turn * 2 - 3, 0).astype(np.float32))
    to_go = UNDISCOUNTED(table, evidence).value
    assert GAE_OF_ONES(table, evidence).value.tolist() == (to_go - evidence.value).tolist()
    target = TARGET_OF_ONES(table, evidence)
    assert target.tolist() == to_go.tolist()
    zero = Evidence(value=np.zeros(SIZE, np.float32))
    assert ONE_STEP(table, zero).value.tolist() == TURN_REWARDS(table).tolist()


def test_gae_carries_across_calls_that_are_not_trained():
    """A checker between two trained calls is no state that anybody valued: V there is 1 + γ·4 = 3, and λ is not taken for it."""
    table = make_table(make_rollout("a", 8.0, [0.0, 1.0, 0.0], trainable=[True, False, True]))
    for unread in (0.0, 99.0):
        evidence = Evidence(value=np.array([1, unread, 4], np.float32))
        made = credit.gae(table, evidence, gamma=0.5, lambda_=0.5).value
        assert made.tolist() == [1.0, 2.0, 4.0]  # δ₀ = 0 + ½·3 - 1, and A₀ = ½ + ½·½·(½·4)
        assert credit.gae_value_target(table, evidence, gamma=0.5, lambda_=0.5).tolist() == [2.0, 5.0, 8.0]
    right = Evidence(value=np.array([1, 0, 1], np.float32))
    sparse = make_table(make_rollout("a", 1.0, [0.0, 0.0, 0.0], trainable=[True, False, True]))
    for lambda_ in (0.0, 0.9, 1.0):
        assert credit.gae(sparse, right, gamma=1.0, lambda_=lambda_).value.tolist() == [0.0, 0.0, 0.0]


def test_gae_of_a_rollout_that_ends_with_a_call_that_is_not_trained():
    table = make_table(make_rollout("a", 8.0, [0.0, 1.0], trainable=[True, False]))
    made = credit.gae(table, Evidence(value=np.array([2, 77], np.float32)), gamma=0.5, lambda_=0.5)
    assert made.value.tolist() == [0.5 * 9 - 2, 0.0]


def test_gae_stops_the_gradient_and_asks_for_its_evidence():
    table = ByHandTest.table
    gradient = jax.grad(lambda v: jnp.sum(credit.gae(table, Evidence(value=v)).value))(jnp.ones(4))
    assert gradient.tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="gae needs evidence.value"):
        credit.gae(table, Evidence())
