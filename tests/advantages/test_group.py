"""Group baselines against a loop over rollouts in float64, and against their invariants."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl import advantages, credit, normalize
from lightningrl.segments import EPSILON
from lightningrl.table import Credit, Evidence
from tests.batches import SIZE, batches, by_rollout, make_rollout, make_table, poison_table

SETTINGS = ("center", "scale", "ddof", "eps", "singleton", "degenerate")
identical, intermediate = jax.jit(credit.identical), jax.jit(credit.intermediate)
group_norm = jax.jit(advantages.group_norm, static_argnames=("count", *SETTINGS[1:]))
leave_one_out = jax.jit(advantages.leave_one_out, static_argnames=("count", "singleton"))
group_normalize = jax.jit(normalize.group_normalize, static_argnames=SETTINGS)

METHODS: dict[str, Callable[..., Any]] = {
    "group_norm": functools.partial(group_norm, eps=EPSILON),
    "group_norm, population": functools.partial(group_norm, ddof=0.0),
    "group_norm, transitions": functools.partial(group_norm, count="transitions"),
    "dr_grpo": functools.partial(group_norm, scale="none"),
    "leave_one_out": leave_one_out,
    "leave_one_out, transitions": functools.partial(leave_one_out, count="transitions"),
}
JITTED = {name: jax.jit(lambda t, e, f=f: f(t, intermediate(t, e), e)) for name, f in METHODS.items()}
NAMES = pytest.mark.parametrize("name", list(METHODS))


def loop(rollouts, name):
    """The advantage of every transition, written from the definitions."""
    counted = []  # (rollout index, group, value, weight)
    for index, rollout in enumerate(rollouts):
        for transition in rollout.transitions:
            weight = 1.0 / len(rollout.transitions)
            if "transitions" in name:
                weight = float(transition.trainable)
            counted.append((index, rollout.group, transition.reward + rollout.reward, weight))
    result = []
    for index, group, value, weight in counted:
        mine = [(i, x, w) for i, g, x, w in counted if g == group and w > 0]
        total = sum(w for _, _, w in mine)
        if weight == 0 or len({i for i, _, _ in mine}) == 1 or len({x for _, x, _ in mine}) == 1:
            result.append(0.0)
        elif "leave_one_out" in name:
            others = [(x, w) for i, x, w in mine if i != index]
            result.append(value - sum(x * w for x, w in others) / sum(w for _, w in others))
        else:
            mean = sum(x * w for _, x, w in mine) / total
            ddof = 0 if "population" in name else 1
            deviation = np.sqrt(sum(w * (x - mean) ** 2 for _, x, w in mine) / (total - ddof))
            result.append((value - mean) / (1.0 if name == "dr_grpo" else deviation + EPSILON))
    return np.array(result, np.float64)


@pytest.mark.slow
@NAMES
@settings(max_examples=30, deadline=None)
@given(rollouts=batches(integers=True))
def test_is_that_of_a_loop(name, rollouts):
    actual = JITTED[name](make_table(*rollouts, size=SIZE), Evidence())
    assert actual.dtype == jnp.float32
    expected = loop(rollouts, name)
    np.testing.assert_allclose(actual[: len(expected)], expected, rtol=2e-5, atol=2e-6)
    assert (np.asarray(actual)[len(expected) :] == 0).all()


@pytest.mark.slow
@NAMES
@settings(max_examples=20, deadline=None)
@given(rollouts=batches(integers=True), data=st.data())
def test_the_order_of_rollouts_does_not_matter(name, rollouts, data):
    def normalized(order):
        return by_rollout(order, np.asarray(JITTED[name](make_table(*order, size=SIZE), Evidence())))

    one, other = normalized(rollouts), normalized(data.draw(st.permutations(rollouts)))
    for rollout in one:
        np.testing.assert_allclose(one[rollout], other[rollout], rtol=1e-5, atol=1e-6)


@NAMES
@settings(max_examples=20, deadline=None)
@given(rollouts=batches(integers=True), by=st.integers(-8, 8))
def test_a_constant_added_to_every_reward_changes_nothing(name, rollouts, by):
    table = make_table(*rollouts, size=SIZE)
    shifted = dataclasses.replace(table, outcome=table.outcome + np.float32(by))
    np.testing.assert_allclose(JITTED[name](shifted, Evidence()), JITTED[name](table, Evidence()), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@NAMES
def test_nan_in_padding_reaches_nothing(name):
    rollouts = [make_rollout("a", 1.0, [0.5, 0.0]), make_rollout("a", 0.0), make_rollout("b", 1.0), make_rollout("b", 1.0)]
    table = make_table(*rollouts, size=SIZE)
    values = np.where(table.valid, intermediate(table, Evidence()).value, np.nan).astype(np.float32)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(values, table):
        result = METHODS[name](table, Credit(value=values, kind="return"), Evidence())
        return jnp.sum(result**2), result

    (_, result), gradient = jax.jit(total)(values, poison_table(table))
    np.testing.assert_allclose(result, JITTED[name](table, Evidence()), rtol=1e-6)
    assert np.isfinite(gradient).all()


class ByHandTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_one_success_in_four(self):
        """The figures that every GRPO implementation shows: 1.5 with ddof 1, √3 with ddof 0."""
        table = make_table(*(make_rollout("a", outcome) for outcome in (1.0, 0.0, 0.0, 0.0)))
        earned = identical(table, Evidence())
        for ddof, expected in ((1.0, 1.5), (0.0, np.sqrt(3.0))):
            norm = self.variant(functools.partial(advantages.group_norm, ddof=ddof, eps=0.0))
            np.testing.assert_allclose(norm(table, earned, Evidence()), [expected] + [-expected / 3] * 3, rtol=1e-6)
        out = self.variant(advantages.leave_one_out)(table, earned, Evidence())
        np.testing.assert_allclose(out, [1.0, -1 / 3, -1 / 3, -1 / 3], rtol=1e-6)


def normalize(values, ids, **kwargs):
    values = np.array(values, np.float32)
    return np.asarray(group_normalize(values, np.array(ids, np.int32), np.ones_like(values), **kwargs))


def test_epsilon_is_added_to_the_deviation():
    """Two values ±1 have σ = √2 with ddof 1: with ε = √2 the advantage halves."""
    half = normalize([1, -1], [0, 0], eps=float(np.sqrt(2)))
    np.testing.assert_allclose(half, normalize([1, -1], [0, 0], eps=0.0) / 2, rtol=1e-6)


def test_rules_for_groups_of_one_and_constant_groups():
    values, ids = [0.75, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], [0, 1, 1, 1, 1, 1, 1, 1]
    assert normalize(values, ids).tolist() == [0.0] * 8
    assert normalize(values, ids, singleton="raw").tolist() == [0.75] + [0.0] * 7
    assert normalize(values, ids, center="leave_one_out", scale="none").tolist() == [0.0] * 8


def test_the_rule_for_constant_groups_is_needed():
    """Groups of 2 to 24 rewards of 0.1: by the formula some get an advantage out of rounding; by the rule none does."""
    ids = np.repeat(np.arange(2, 25), np.arange(2, 25))
    values = np.full(len(ids), 0.1)
    assert np.abs(normalize(values, ids, eps=1e-9, degenerate="formula")).max() > 0.1
    assert normalize(values, ids, eps=1e-9).tolist() == [0.0] * len(ids)


def test_centers_and_scales():
    assert normalize([4, 2, 0], [0, 0, 0], scale="none").tolist() == [2, 0, -2]
    assert normalize([4, 2, 0], [0, 0, 0], center="none", eps=0.0).tolist() == [2, 1, 0]
    assert normalize([4, 2, 0], [0, 0, 0], center="leave_one_out", scale="none").tolist() == [3, 0, -3]


def test_a_group_of_one_is_one_rollout_however_many_calls_it_made():
    """Nine different credits within one rollout say nothing about other ways to do the task."""
    table = make_table(make_rollout("a", 1.0, list(range(9))), size=SIZE)
    for method in JITTED.values():
        assert method(table, Evidence()).tolist() == [0.0] * SIZE


def test_leave_one_out_leaves_out_whole_rollouts():
    """The baseline of a call contains no other call of its rollout."""
    table = make_table(make_rollout("a", 0.0, [1.0, 3.0]), make_rollout("a", 0.0, [8.0, 4.0]))
    assert leave_one_out(table, intermediate(table, Evidence()), Evidence()).tolist() == [-5.0, -3.0, 6.0, 2.0]


def test_unit_weights_are_exact_for_any_number_of_calls():
    """1/n n times is not 1 in float32 for every n; groups of one are still recognised."""
    for calls in (3, 31, 37):
        table = make_table(make_rollout("a", 1.0, [float(t) for t in range(calls)]), make_rollout("b", 0.5), size=SIZE)
        for singleton, expected in (("zero", [0.0]), ("raw", [0.5])):
            norm = group_norm(table, intermediate(table, Evidence()), Evidence(), singleton=singleton)
            assert norm[calls : calls + 1].tolist() == expected
            assert norm[:calls].tolist() == [0.0 if singleton == "zero" else 1.0 + t for t in range(calls)]


def test_settings_and_kinds_are_checked():
    table = make_table(make_rollout("a", 1.0))
    earned = identical(table, Evidence())
    for setting, choices in (
        ("center", "mean, leave_one_out, none"),
        ("scale", "std, none"),
        ("singleton", "zero, raw"),
        ("degenerate", "zero, formula"),
    ):
        with pytest.raises(ValueError, match=f"has no {setting} 'median': choose one of {choices}"):
            normalize([1], [0], **{setting: "median"})
    with pytest.raises(ValueError, match="cannot count 'tokens': choose one of rollouts, transitions"):
        group_norm(table, earned, Evidence(), count="tokens")
    advantage = dataclasses.replace(earned, kind="advantage")
    for name, method in (("group_norm", group_norm), ("leave_one_out", leave_one_out)):
        with pytest.raises(ValueError, match=f"{name} takes a baseline off, but this credit is already an advantage"):
            method(table, advantage, Evidence())
