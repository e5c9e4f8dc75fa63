"""Bi-level GAE against a loop over turns and tokens in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from lightningrl.advantages.bilevel import bi_level_gae, bi_level_value_target
from lightningrl.advantages.token_returns import token_gae, whiten_tokens
from lightningrl.table import Evidence
from tests.advantages.token_sequences import poison_tokens, shuffled, token_evidence, token_sequences
from tests.batches import EDGES, SIZE, batches, make_rollout, make_table, make_tokens, poison_table

RATES = {"turn_gamma": 0.75, "turn_lambda": 0.5, "gamma": 0.5, "lambda_": 0.25}
TURN_VALUES = pytest.mark.parametrize("turn_value", ["last_token", "first_token"])
NOTHING = np.full(SIZE, np.nan, np.float32)
GAE = jax.jit(functools.partial(bi_level_gae, **RATES), static_argnames="turn_value")
TARGET = jax.jit(functools.partial(bi_level_value_target, **RATES), static_argnames="turn_value")


def loop(table, tokens, evidence, turn_value):
    v = evidence.token_value.astype(np.float64)
    result = {}
    for sequence in token_sequences(table, tokens).values():
        turns: dict[int, list] = {}
        for token in sequence:
            turns.setdefault(token.transition, []).append(token)
        following = after = 0.0
        for turn in reversed(turns.values()):
            here = v[turn[-1 if turn_value == "last_token" else 0].edge]
            after = turn[-1].reward + 0.75 * following - here + 0.75 * 0.5 * after
            following = here
            next_value = next_advantage = 0.0
            for token in reversed(turn):
                reward = after + here if token is turn[-1] else 0.0
                next_advantage = reward + 0.5 * next_value - v[token.edge] + 0.5 * 0.25 * next_advantage
                next_value = v[token.edge]
                result[token.edge] = next_advantage
    return np.array([result.get(e, 0.0) for e in range(len(tokens.mask))])


@pytest.mark.slow
@TURN_VALUES
@settings(max_examples=12, deadline=None)
@given(rollouts=batches(integers=True))
def test_is_that_of_a_loop(turn_value, rollouts):
    table = make_table(*rollouts, size=SIZE)
    tokens, _ = shuffled(make_tokens(table, EDGES))
    evidence = token_evidence(tokens)
    expected = loop(table, tokens, evidence, turn_value)
    actual = GAE(table, tokens, NOTHING, evidence, turn_value=turn_value)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    value = np.where(tokens.mask, evidence.token_value, 0)
    np.testing.assert_allclose(TARGET(table, tokens, NOTHING, evidence, turn_value=turn_value), expected + value, rtol=1e-5, atol=1e-6)


def ragged():
    return make_table(
        make_rollout("a", 1.0, [0.5, 0.0, 0.0], lengths=[2, 1, 3], trainable=[True, False, True]),
        make_rollout("a", 0.0, [0.0, 0.0], lengths=[2, 1]),
        size=SIZE,
    )


@pytest.mark.slow
@TURN_VALUES
def test_nan_without_a_loss_reaches_nothing(turn_value):
    table = ragged()
    tokens = make_tokens(table, EDGES)
    evidence = token_evidence(tokens)
    spoiled = GAE(poison_table(table), *(lambda t, e: (t, NOTHING, e))(*poison_tokens(tokens, evidence)), turn_value=turn_value)
    np.testing.assert_array_equal(spoiled, GAE(table, tokens, NOTHING, evidence, turn_value=turn_value))


@pytest.mark.slow
def test_packing_does_not_matter():
    table = ragged()
    tokens = make_tokens(table, 12)
    evidence = token_evidence(tokens)
    plain = np.asarray(bi_level_gae(table, tokens, NOTHING, evidence, whitened=True))
    cut = lambda tree: jax.tree.map(lambda x: x.reshape(3, 4), tree)  # noqa: E731
    np.testing.assert_array_equal(bi_level_gae(table, cut(tokens), NOTHING, cut(evidence), whitened=True), plain.reshape(3, 4))


@pytest.mark.slow
def test_a_turn_of_reward_0_is_a_turn():
    """By hand, rates 1: the last token of a turn gets the turn's advantage, the others the differences of value."""
    table = make_table(make_rollout("a", 8.0, [0.0, 0.0], lengths=[2, 2]))
    tokens = make_tokens(table)
    evidence = Evidence(token_value=np.array([1, 2, 4, 5], np.float32))
    rates = {"turn_gamma": 1.0, "turn_lambda": 0.0, "gamma": 1.0, "lambda_": 0.0}
    last = bi_level_gae(table, tokens, np.zeros(2, np.float32), evidence, **rates)
    assert last.tolist() == [1, 5 - 2, 1, 8 - 5]
    first = bi_level_gae(table, tokens, np.zeros(2, np.float32), evidence, **rates, turn_value="first_token")
    assert first.tolist() == [1, 4 - 2, 1, 8 - 5]


@pytest.mark.slow
@TURN_VALUES
def test_with_every_rate_1_it_is_token_gae(turn_value):
    """Then both are the rewards to come less the value."""
    table = ragged()
    tokens = make_tokens(table)
    evidence = token_evidence(tokens)
    ones = dict.fromkeys(RATES, 1.0)
    both = bi_level_gae(table, tokens, NOTHING, evidence, **ones, turn_value=turn_value)
    np.testing.assert_allclose(both, token_gae(table, tokens, NOTHING, evidence, gamma=1.0, lambda_=1.0), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_whitening_comes_last():
    table = ragged()
    tokens = make_tokens(table)
    evidence = token_evidence(tokens)
    plain = bi_level_gae(table, tokens, NOTHING, evidence)
    whitened = bi_level_gae(table, tokens, NOTHING, evidence, whitened=True)
    assert whitened.tolist() == whiten_tokens(plain, tokens.mask).tolist()


@pytest.mark.slow
def test_the_critic_gets_no_gradient_and_what_is_wrong_is_said():
    table = ragged()
    tokens = make_tokens(table)
    gradient = jax.grad(lambda v: jnp.sum(bi_level_gae(table, tokens, NOTHING, Evidence(token_value=v)) ** 2))(jnp.ones(len(tokens.mask)))
    assert not np.any(gradient)
    with pytest.raises(ValueError, match="bi_level_gae needs evidence.token_value"):
        bi_level_gae(table, tokens, NOTHING, Evidence())
    with pytest.raises(ValueError, match="no turn_value 'eos': choose one of last_token, first_token"):
        bi_level_gae(table, tokens, NOTHING, token_evidence(tokens), turn_value="eos")
