"""RUDDER, SPA, attention and Shapley values against loops in float64, and their sums."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl.credit.redistribution import attention_based, rudder, spa
from lightningrl.credit.shapley import leave_one_call_out, shapley, shapley_sampled
from lightningrl.table import Evidence
from tests.batches import SIZE, batches, by_rollout, make_rollout, make_table
from tests.credit.checks import check_loop, check_order, check_padding, named, per_call

TURNS = 3  # fewer than the longest drawn rollout has
KEY = jax.random.key(0)


def evidence_of(rollouts, size):
    coalition = np.full((9, 2**TURNS), np.nan, np.float32)  # subsets with turns that a rollout lacks stay NaN
    for i, rollout in enumerate(rollouts):
        width = 2 ** min(TURNS, len(rollout.transitions))
        coalition[i, :width] = np.random.default_rng([2, int(rollout.id[1:])]).uniform(-1, 1, width)
    return Evidence(predicted_return=per_call(rollouts, size), attention=per_call(rollouts, size, low=0.1, seed=1), coalition=coalition)


def change_loop(rollouts):
    prediction, row = evidence_of(rollouts, SIZE).predicted_return.astype(np.float64), 0
    for rollout in rollouts:
        mine = prediction[row : row + len(rollout.transitions)]
        yield rollout, np.diff(mine, prepend=0.0)
        row += len(rollout.transitions)


def rudder_loop(rollouts):
    return np.concatenate([c + (r.reward - c.sum()) / len(c) for r, c in change_loop(rollouts)])


def spa_loop(rollouts):
    return np.concatenate([2 * c + 0.5 * np.array([t.reward for t in r.transitions]) for r, c in change_loop(rollouts)])


def attention_loop(rollouts):
    attention, result, row = evidence_of(rollouts, SIZE).attention.astype(np.float64), [], 0
    for r in rollouts:
        mine = attention[row : row + len(r.transitions)]
        last = np.arange(len(mine)) == len(mine) - 1
        result.append(r.reward * (0.75 * mine / mine.sum() + 0.25 * last))
        row += len(mine)
    return np.concatenate(result)


def shapley_loop(rollouts):
    """The mean over all orders, which is another road to it than the sum over subsets."""
    result = []
    for r, value in zip(rollouts, evidence_of(rollouts, SIZE).coalition.astype(np.float64), strict=False):
        players = min(TURNS, len(r.transitions))
        credit, orders = [0.0] * len(r.transitions), list(itertools.permutations(range(players)))
        for order in orders:
            before = 0
            for t in order:
                credit[t] += (value[before + 2**t] - value[before]) / len(orders)
                before += 2**t
        result += credit
    return result


def left_out_loop(rollouts):
    result = []
    for r, value in zip(rollouts, evidence_of(rollouts, SIZE).coalition.astype(np.float64), strict=False):
        players = min(TURNS, len(r.transitions))
        result += [value[2**players - 1] - value[2**players - 1 - 2**t] if t < players else 0.0 for t in range(len(r.transitions))]
    return result


ASSIGNERS: dict[str, tuple[Any, ...]] = {
    "rudder": (rudder, rudder_loop),
    "spa": (functools.partial(spa, progress_weight=2.0, reward_weight=0.5), spa_loop),
    "attention": (functools.partial(attention_based, beta=0.75), attention_loop),
    "shapley": (shapley, shapley_loop),
    "leave_one_call_out": (leave_one_call_out, left_out_loop),
}
JITTED = {name: jax.jit(assigner) for name, (assigner, _) in ASSIGNERS.items()}
SAMPLED = jax.jit(functools.partial(shapley_sampled, key=KEY, permutations=3))
MANY = jax.jit(functools.partial(shapley_sampled, key=KEY, permutations=4000))
NAMES = pytest.mark.parametrize("name", list(ASSIGNERS))
FEW = named(make_rollout("a", 1.0, [0.5, 0.0, 0.25]), make_rollout("a", 0.0, [0.25, 1.0]), make_rollout("b", 2.0, [0.0] * 4))


@pytest.mark.slow
@NAMES
@settings(max_examples=15, deadline=None)
@given(rollouts=batches())
def test_is_that_of_a_loop(name, rollouts):
    check_loop(JITTED[name], rollouts, evidence_of, ASSIGNERS[name][1](rollouts))


@NAMES
@settings(max_examples=6, deadline=None)
@given(rollouts=batches(), data=st.data())
def test_the_order_of_rollouts_does_not_matter(name, rollouts, data):
    check_order(JITTED[name], rollouts, data.draw(st.permutations(rollouts)), evidence_of)


@pytest.mark.slow
@NAMES
def test_padding_reaches_nothing(name):
    check_padding(JITTED[name], FEW, evidence_of)


@settings(max_examples=15, deadline=None)
@given(rollouts=batches())
def test_sums(rollouts):
    """Redistributions sum to the outcome, whatever the model says; Shapley values to v(all) - v(none), sampled ones too."""
    table, evidence = make_table(*rollouts, size=SIZE), evidence_of(rollouts, SIZE)

    def sums(assign):
        credits = by_rollout(rollouts, np.asarray(assign(table, evidence).value))
        return [sum(credits[r.id]) for r in rollouts]

    for name in ("rudder", "attention"):
        np.testing.assert_allclose(sums(JITTED[name]), [r.reward for r in rollouts], rtol=1e-5, atol=2e-6)
    worth = [v[2 ** min(TURNS, len(r.transitions)) - 1] - v[0] for r, v in zip(rollouts, evidence.coalition, strict=False)]
    for assign in (JITTED["shapley"], SAMPLED):
        np.testing.assert_allclose(sums(assign), worth, rtol=1e-5, atol=2e-6)


@pytest.mark.slow
def test_sampled_orders_come_to_the_exact_values():
    """4000 orders of values in ±1: a standard error below 2 / √4000 = 0.03; five of them."""
    table, evidence = make_table(*FEW), evidence_of(FEW, 9)
    np.testing.assert_allclose(MANY(table, evidence).value, shapley(table, evidence).value, atol=0.15)
    np.testing.assert_allclose(MANY(table, evidence).value[5:8], shapley_loop(FEW)[5:8], atol=0.15)


@pytest.mark.slow
def test_by_hand():
    """Outcome 6. Predictions 1, 4, 3 miss 3, so each call gets 1 more than its change 1, 3, -1; attention 1, 1, 2 of 4."""
    table = make_table(make_rollout("a", 6.0, [9.0, 9.0, 9.0]), size=4)
    evidence = Evidence(predicted_return=np.array([1, 4, 3, 0], np.float32), attention=np.array([1, 1, 2, 0], np.float32))
    np.testing.assert_allclose(rudder(table, evidence).value, [2, 4, 0, 0], atol=1e-6)
    assert spa(table, evidence).value.tolist() == [1, 3, -1, 0]
    assert attention_based(table, evidence).value.tolist() == [1.5, 1.5, 3, 0]
    assert attention_based(table, evidence, beta=0.0).value.tolist() == [0, 0, 6, 0]
    none = Evidence(attention=np.zeros(4, np.float32))
    np.testing.assert_allclose(attention_based(table, none).value, [2, 2, 2, 0], rtol=1e-6)
    assert {f(table, evidence).kind for f in (rudder, spa, attention_based)} == {"return"}


@pytest.mark.slow
def test_shapley_by_hand():
    """The glove game: call 2 and one of calls 0 and 1 are needed. 1/6, 1/6, 4/6; left out alone, only call 2 is missed."""
    table = make_table(make_rollout("a", 1.0, [0.0] * 3), size=4)
    coalition = np.array([[0, 0, 0, 0, 0, 1, 1, 1]], np.float32)
    np.testing.assert_allclose(shapley(table, Evidence(coalition=coalition)).value, [1 / 6, 1 / 6, 4 / 6, 0], rtol=1e-5)
    assert leave_one_call_out(table, Evidence(coalition=coalition)).value.tolist() == [0, 0, 1, 0]
    assert shapley(table, Evidence(coalition=coalition)).kind == "return"


def test_ten_calls():
    """An additive game gives every call its own worth."""
    worth = np.arange(1, 11)
    coalition = (((np.arange(1024)[:, None] >> np.arange(10)) & 1) @ worth).astype(np.float32)[None]
    table = make_table(make_rollout("a", 55.0, [0.0] * 10))
    np.testing.assert_allclose(JITTED["shapley"](table, Evidence(coalition=coalition)).value, worth, rtol=1e-5)


def test_sampled_marginals_are_averaged():
    table = make_table(make_rollout("a", 1.0, [0.0] * 2), size=3)
    marginals = np.array([[1, 0, np.nan], [0, 3, np.nan]], np.float32)
    assert shapley_sampled(table, Evidence(), marginals=marginals).value.tolist() == [0.5, 1.5, 0]
    for key, given_ in ((None, None), (KEY, marginals)):
        with pytest.raises(ValueError, match="either a key to draw orders with or sampled marginals"):
            shapley_sampled(table, Evidence(), key=key, marginals=given_)


def test_missing_and_misshapen_evidence_is_named():
    table = make_table(make_rollout("a", 1.0))
    for assign, field in ((rudder, "predicted_return"), (spa, "predicted_return"), (attention_based, "attention"), (shapley, "coalition")):
        with pytest.raises(ValueError, match=f"{assign.__name__} needs evidence.{field}"):
            assign(table, Evidence())
    for width in (1, 6, 2048):
        with pytest.raises(ValueError, match="shapley needs 2\\^M coalitions"):
            shapley(table, Evidence(coalition=np.zeros((1, width), np.float32)))
