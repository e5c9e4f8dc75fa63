"""The study's numbers: equal steps, an unbiased estimator that is seen to be one, and the same bits when it is repeated."""

from __future__ import annotations

import copy
import dataclasses
import functools

import numpy as np
import pytest

from lightningrl.lab.difficulties import stacked
from lightningrl.lab.intervals import METRICS, difference, draw_seeds, intervals, regrets
from lightningrl.lab.pairs import PAIRS
from lightningrl.lab.process import TURNS
from lightningrl.lab.producers import ESTIMATES, producer_errors
from lightningrl.lab.study import Settings, Study, _against, _correlation

pytestmark = pytest.mark.slow

NAMES = ("delayed_reward", "unequal_lengths")
SETTINGS = Settings(seeds=2, batches=4, iterations=2, steps=96)


@functools.lru_cache
def study() -> Study:
    return Study(stacked(NAMES), SETTINGS)


@functools.lru_cache
def measured(name: str):
    return study().measure(PAIRS[name])


@functools.lru_cache
def learned(name: str):
    return study().learn(PAIRS[name])


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("spo_tree + whiten", "vineppo + whiten", "identical + remax")]
EVERY_KIND = pytest.mark.parametrize("name", ["identical + group_norm", "gae + whiten", *SLOW])


@EVERY_KIND
def test_every_way_to_sample_takes_the_same_steps(name):
    """Exactly on average, extra rollouts and earlier batches counted: see what was really taken."""
    pair = PAIRS[name]
    plan = SETTINGS.plan(pair.kind, "greedy_reward" in pair.needs)
    groups = SETTINGS.steps / np.asarray(study().cost(study().logits, plan))
    assert (1 <= groups).all() and (groups <= plan.groups).all()
    # Sixteen batches, of which each has a few rollouts if every state of theirs is branched from.
    tolerance = 0.25 if pair.kind == "branches" else 0.12
    np.testing.assert_allclose(measured(name)["steps"].mean(), SETTINGS.steps, rtol=tolerance)
    np.testing.assert_allclose(learned(name)["steps"].mean(), SETTINGS.iterations * SETTINGS.steps, rtol=tolerance)


def test_too_few_steps_for_a_group_are_refused():
    with pytest.raises(ValueError, match="96 are"):
        Settings(steps=60)
    assert Settings(steps=96, group_size=8).plan("groups").groups * 8 >= 96
    with pytest.raises(ValueError, match="not enough"):
        Settings(steps=96, restarts=3)


def test_no_rollout_is_so_short_that_the_steps_cannot_be_taken():
    for kind in ("groups", "trees"):
        plan = SETTINGS.plan(kind)
        assert plan.rollouts == SETTINGS.steps
    plan = SETTINGS.plan("branches")
    assert plan.rollouts * (1 + plan.restarts) == SETTINGS.steps
    assert plan.rollouts * TURNS > SETTINGS.steps


def test_returns_are_exact_and_start_with_the_policies_that_are_measured():
    returns = learned("identical + group_norm")["returns"]
    assert returns.shape == (2, 2, SETTINGS.iterations + 1)
    np.testing.assert_array_equal(returns[..., 0], learned("gae + whiten")["returns"][..., 0])
    assert (returns[..., 1:] != learned("gae + whiten")["returns"][..., 1:]).all()
    assert (returns <= study().best()[:, None, None] + 1e-6).all()


@EVERY_KIND
def test_repeated_to_the_last_bit(name):
    for one, other in ((measured(name), study().measure(PAIRS[name])), (learned(name), study().learn(PAIRS[name]))):
        assert one.keys() == other.keys()
        for key, x in one.items():
            np.testing.assert_array_equal(x, other[key])


def test_a_study_that_is_compiled_anew_gives_the_same_bits():
    again = Study(stacked(NAMES), SETTINGS).learn(PAIRS["gae + whiten"])
    np.testing.assert_array_equal(again["returns"], learned("gae + whiten")["returns"])


def test_against_knows_bias_from_noise():
    """Estimates 2 g + b + noise with b at right angles to g: the bias is |b| / |2 g + b|, whatever the noise."""
    rng = np.random.default_rng(0)
    true = np.zeros((1, 1, 2, 2))
    true[..., 0, 0] = 3.0
    noise = rng.normal(size=(4000, 1, 1, 2, 2))
    found = _against(2 * true + np.array([[0, 0], [4.5, 0]]) + noise, true)
    np.testing.assert_allclose(METRICS["bias"][1](found), 4.5 / np.hypot(6, 4.5), rtol=0.02)
    np.testing.assert_allclose(found["variance"], 4.0, rtol=0.05)
    unbiased = _against(2 * true + noise, true)
    assert abs(unbiased["left"][0, 0]) < 0.01
    few = [_against(2 * true + rng.normal(size=(4, 1, 1, 2, 2)), true)["left"][0, 0] for _ in range(2000)]
    assert abs(np.mean(few)) < 5 * np.std(few) / np.sqrt(2000)


def test_a_gradient_that_points_backwards_is_all_bias():
    true = np.ones((1, 1, 1, 2))
    found = _against(-true + np.array([[[[[0.1, 0]]]], [[[[-0.1, 0]]]]]), true)
    np.testing.assert_allclose(METRICS["bias"][1](found), 1.0, rtol=0.02)
    assert found["cosine"][0, 0] < -0.9
    np.testing.assert_array_equal(_against(np.zeros((2, 1, 1, 1, 2)), true)["cosine"], 0.0)


def test_an_unbiased_estimator_measures_as_one():
    """REINFORCE without a baseline, every call weighing the same, in rollouts of one length: E[ĝ] is ∇J, up to its scale."""
    longer = copy.copy(study())  # with what it has compiled
    longer.settings = dataclasses.replace(SETTINGS, batches=64)
    found = longer.measure(PAIRS["identical + unchanged"])
    settled = NAMES.index("delayed_reward")
    left, expected, variance = (found[key][settled] for key in ("left", "expected", "variance"))
    assert (np.abs(left) < 6 * variance / 64 / np.sqrt(10)).all()
    assert (expected > 0).all()


def test_correlation_is_that_of_all_calls():
    x, y = np.random.default_rng(0).normal(size=(2, 50))
    sums = {"n": np.full(1, 50.0), "x": x.sum(), "y": y.sum(), "xx": x @ x, "yy": y @ y, "xy": x @ y}
    np.testing.assert_allclose(_correlation(sums), np.corrcoef(x, y)[0, 1], rtol=1e-9)
    constant = {**sums, "x": 50.0, "xx": 50.0, "xy": y.sum()}
    assert _correlation(constant) == 0.0


def test_regrets():
    returns = np.array([[[0.2, 0.6, 1.0]]])
    found = regrets(returns, np.array([1.0]))
    np.testing.assert_allclose(found["regret"], [[0.25]])
    np.testing.assert_allclose(found["final_regret"], [[0.0]], atol=1e-12)
    np.testing.assert_allclose(regrets(np.full((1, 1, 3), 0.2), np.array([1.0]))["regret"], [[1.0]])


def test_intervals_hold_the_mean_and_pair_the_seeds():
    rng = np.random.default_rng(0)
    shared, own = rng.normal(size=(2, 200)) * 5, rng.normal(size=(2, 200)) * 0.1
    draws = draw_seeds(200, seed=1)
    np.testing.assert_array_equal(draws, draw_seeds(200, seed=1))
    ours, theirs = {"regret": shared + own + 1.0}, {"regret": shared}
    each, whole = intervals(ours, "regret", draws)
    assert len(each) == 2
    for point, low, high in (*each, whole):
        assert low < point < high
    error = ours["regret"][0].std() / np.sqrt(200)
    np.testing.assert_allclose(each[0][2] - each[0][1], 2 * 1.96 * error, rtol=0.1)
    for point, low, high in difference(ours, theirs, "regret", draws):
        assert 0.95 < low < point < high < 1.05


def test_what_restarts_say_comes_nearer_with_more_of_them():
    chosen = [e for e in ESTIMATES if e.name in ("restarts, 1 from every state", "restarts, 8 from every state", "RUDDER's return model")]
    found = producer_errors(study(), 3, chosen)
    one, many, model = (found[e.name] for e in chosen)
    np.testing.assert_allclose(np.sqrt(np.mean(one["error"] ** 2) / np.mean(many["error"] ** 2)), np.sqrt(8), rtol=0.15)
    np.testing.assert_allclose(many["steps"].mean() / one["steps"].mean(), 8, rtol=0.1)
    assert not model["steps"].any() and (model["error"] > 0).all()
