"""GDPO against a loop over groups in float64."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl.advantages.multi_reward import gdpo
from lightningrl.segments import EPSILON
from lightningrl.table import Credit, Evidence
from tests.batches import SIZE, batches, by_rollout, make_rollout, make_table, poison_table

WEIGHTS = (1.0, 0.5, 0.0)
VARIANTS = {
    "ours": {},
    "calls": {"batch_count": "transitions"},
    "verl": {"eps": 1e-6, "singleton": "raw", "degenerate": "formula", "batch_count": "tokens", "batch_eps": 0.0},
    "trl": {"eps": 1e-4, "degenerate": "formula", "batch_eps": 1e-4},
    "raw, without shift": {"singleton": "raw", "scale": "none"},
}
METHODS = {name: functools.partial(gdpo, weights=WEIGHTS, **settings) for name, settings in VARIANTS.items()}
JITTED = {name: jax.jit(lambda t, f=f: f(t, Credit(value=t.reward, kind="return"), Evidence())) for name, f in METHODS.items()}
NAMES = pytest.mark.parametrize("name", list(METHODS))


def with_outcomes(rollouts):
    """Two outcomes more, functions of the rollout alone; the third has weight 0."""
    return [
        dataclasses.replace(r, outcome={"reward": r.reward, "style": float(len(r.transitions) % 3), "unused": 7.0 * r.reward})
        for r in rollouts
    ]


def loop(rollouts, name):
    setting = {"eps": EPSILON, "singleton": "zero", "degenerate": "zero", "batch_count": "rollouts", "batch_eps": EPSILON, "scale": "std"}
    setting |= VARIANTS[name]
    totals, silent = [], []
    for rollout in rollouts:
        peers = [r for r in rollouts if r.group == rollout.group]
        total, quiet = 0.0, True
        for weight, key in zip(WEIGHTS, ("reward", "style", "unused"), strict=True):
            x = [r.outcome[key] for r in peers]
            if len(peers) == 1:
                total += weight * (x[0] if setting["singleton"] == "raw" else 0.0)
                quiet &= setting["singleton"] == "zero"
            elif len(set(x)) > 1:
                spread = np.std(x, ddof=1) + setting["eps"] if setting["scale"] == "std" else 1.0
                total += weight * (rollout.outcome[key] - np.mean(x)) / spread
                quiet &= weight == 0.0
        totals.append(total)
        silent.append(quiet)
    entries = [(i, t) for i, r in enumerate(rollouts) for t in r.transitions]
    weight = {
        "rollouts": [1.0 / len(rollouts[i].transitions) for i, _ in entries],
        "transitions": [float(t.trainable) for _, t in entries],
        "tokens": [float(t.trainable) * len(t.response_ids) for _, t in entries],
    }[setting["batch_count"]]
    values = [totals[i] for i, _ in entries]
    count = sum(weight)
    counted = [x for x, w in zip(values, weight, strict=True) if w > 0]
    if not counted or np.ptp(counted) < 1e-5:
        return None
    mean = sum(w * x for x, w in zip(values, weight, strict=True)) / count
    spread = np.sqrt(sum(w * (x - mean) ** 2 for x, w in zip(values, weight, strict=True)) / (count - 1)) if count > 1 else 0.0
    if spread < 1e-3:
        return None
    quiet = [silent[i] and setting["degenerate"] == "zero" for i, _ in entries]
    return [0.0 if w == 0 or q else (x - mean) / (spread + setting["batch_eps"]) for x, w, q in zip(values, weight, quiet, strict=True)]


@pytest.mark.slow
@NAMES
@settings(max_examples=15, deadline=None)
@given(rollouts=batches(integers=True))
def test_is_that_of_a_loop(name, rollouts):
    rollouts = with_outcomes(rollouts)
    actual = JITTED[name](make_table(*rollouts, size=SIZE))
    assert actual.dtype == jnp.float32
    assert np.isfinite(actual).all()
    expected = loop(rollouts, name)
    if expected is not None:  # else all of the batch is the same but for rounding
        np.testing.assert_allclose(actual[: len(expected)], expected, rtol=1e-5, atol=1e-6)
        assert (np.asarray(actual)[len(expected) :] == 0).all()


@pytest.mark.slow
@NAMES
@settings(max_examples=8, deadline=None)
@given(rollouts=batches(integers=True), data=st.data())
def test_the_order_of_rollouts_does_not_matter(name, rollouts, data):
    anchors = [make_rollout("z", 1.0, name="z0"), make_rollout("z", 0.0, name="z1")]
    rollouts = with_outcomes([*anchors, *rollouts])
    one, other = (
        by_rollout(order, np.asarray(JITTED[name](make_table(*order, size=SIZE))))
        for order in (rollouts, data.draw(st.permutations(rollouts)))
    )
    for rollout in one:
        np.testing.assert_allclose(one[rollout], other[rollout], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@NAMES
def test_nan_in_padding_reaches_nothing(name):
    rollouts = with_outcomes([make_rollout("a", 1.0, [0.0, 0.0]), make_rollout("a", 0.0), make_rollout("b", 2.0), make_rollout("b", 0.0)])
    table = make_table(*rollouts, size=SIZE)
    spoiled = poison_table(table)
    np.testing.assert_array_equal(JITTED[name](spoiled), JITTED[name](table))

    def total(outcome):
        return jnp.sum(JITTED[name](dataclasses.replace(spoiled, outcome=outcome)) ** 2)

    assert np.isfinite(jax.grad(total)(spoiled.outcome)).all()


@NAMES
def test_constant_groups_are_exactly_zero_unless_the_formula_is_asked_for(name):
    """Group b has nothing to say; the token-weighted mean of the batch is not 0, and a library shifts b by it."""
    rollouts = with_outcomes(
        [make_rollout("a", 1.0, lengths=[3]), make_rollout("a", 0.0), *(make_rollout("b", 0.1, lengths=[n]) for n in (1, 2, 3))]
    )
    out = np.asarray(JITTED[name](make_table(*rollouts, size=SIZE)))
    assert (out[:2] != 0).all()
    assert (out[2:5] == 0).all() == (name != "verl")
    all_same = make_table(*with_outcomes([make_rollout("a", 0.1) for _ in range(7)]), size=SIZE)
    if VARIANTS[name].get("degenerate") != "formula":
        assert JITTED[name](all_same).tolist() == [0.0] * SIZE


@pytest.mark.slow
def test_every_reward_has_its_say():
    """Sums of 1, 1, 0 and 0: GRPO sees two kinds of rollouts; a reward that half get and one that one in four gets are told apart."""
    outcomes = [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (1.0, 0.0)]
    rollouts = [dataclasses.replace(make_rollout("a", r), outcome={"reward": r, "rare": s}) for r, s in outcomes]
    table = make_table(*rollouts)
    out = gdpo(table, Credit(value=table.outcome[:, 0], kind="return"), Evidence())
    assert len(set(np.round(np.asarray(out), 4).tolist())) == 3


@pytest.mark.slow
def test_what_is_wrong_is_said():
    table = make_table(make_rollout("a", 1.0), make_rollout("a", 0.0))
    earned = Credit(value=table.outcome[:, 0], kind="return")
    with pytest.raises(ValueError, match="there are 2 weights and 1 outcomes"):
        gdpo(table, earned, Evidence(), weights=(1.0, 1.0))
    with pytest.raises(ValueError, match="gdpo has no batch_count 'rows'"):
        gdpo(table, earned, Evidence(), batch_count="rows")
    with pytest.raises(ValueError, match="gdpo takes a baseline off"):
        gdpo(table, dataclasses.replace(earned, kind="advantage"), Evidence())
