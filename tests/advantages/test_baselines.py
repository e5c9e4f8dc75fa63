"""ReMax, OPO, GPG, MaxRL and role baselines against loops over rollouts in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl import credit
from lightningrl.advantages import baselines
from lightningrl.segments import EPSILON
from lightningrl.table import Credit, Evidence
from tests.batches import SIZE, batches, by_rollout, make_rollout, make_table, poison, poison_table

ROLES = 2
METHODS = {
    "remax": baselines.remax,
    "role_baseline": baselines.role_baseline,
    "opo": baselines.opo,
    "gpg": baselines.gpg,
    "gpg, verl": functools.partial(baselines.gpg, informative="nonzero", scale="std"),
    "maxrl": baselines.maxrl,
    "maxrl, eps": functools.partial(baselines.maxrl, eps=0.5),
    "accepted": functools.partial(baselines.accepted, threshold=1.0),
}
JITTED = {name: jax.jit(lambda t, e, f=f: f(t, credit.intermediate(t, e), e)) for name, f in METHODS.items()}
RAE = jax.jit(baselines.rae_update, static_argnames=("steps",))
NAMES = pytest.mark.parametrize("name", list(METHODS))


def evidence_of(rollouts, size=SIZE):
    """A baseline that depends on the rollout and turn only, so that the order of rollouts shows."""
    values = np.zeros(size, np.float32)
    row = 0
    for rollout in rollouts:
        for transition in rollout.transitions:
            values[row] = 0.25 * transition.turn - 0.5 * (len(rollout.id) + len(rollout.transitions))
            row += 1
    return Evidence(greedy_reward=values, role_baseline=2 * values)


def loop(rollouts, evidence, name):
    entries = [
        (i, r.group, t.reward + r.reward, 1.0 / len(r.transitions), len(t.response_ids))
        for i, r in enumerate(rollouts)
        for t in r.transitions
    ]
    if name in ("remax", "role_baseline"):
        b = evidence.greedy_reward if name == "remax" else evidence.role_baseline
        return [x - float(b[n]) for n, (_, _, x, _, _) in enumerate(entries)]
    if name == "accepted":
        return [float(x >= 1.0) for _, _, x, _, _ in entries]
    of_group = {g: [e for e in entries if e[1] == g] for _, g, *_ in entries}
    flat = {g: len({e[0] for e in es}) == 1 or len({e[2] for e in es}) == 1 for g, es in of_group.items()}
    result = []
    for _, g, x, _, _ in entries:
        members = of_group[g]
        mean = sum(e[2] * e[3] for e in members) / sum(e[3] for e in members)
        if flat[g]:
            result.append(0.0)
        elif name == "opo":
            result.append(x - sum(e[2] * e[4] for e in members) / sum(e[4] for e in members))
        elif name == "gpg":
            informative = sum(e[3] for e in entries if not flat[e[1]])
            result.append(len(rollouts) / informative * (x - mean))
        elif name == "gpg, verl":
            total = sum(e[3] for e in members)
            informative = sum(e[3] for e in entries if e[2] != 0)
            spread = np.sqrt(sum(e[3] * (e[2] - mean) ** 2 for e in members) / (total - 1))
            result.append(len(rollouts) / informative * (x - mean) / (spread + EPSILON))
        else:
            result.append((x - mean) / (mean + (0.5 if "eps" in name else 0.0)) if mean > 1e-6 else 0.0)
    return result


@pytest.mark.slow
@NAMES
@settings(max_examples=15, deadline=None)
@given(rollouts=batches(integers=True))
def test_is_that_of_a_loop(name, rollouts):
    if "maxrl" in name:  # a mean near 0 is a matter of rounding there
        rollouts = [r for r in rollouts if all(t.reward + r.reward >= 0 for t in r.transitions)] or [make_rollout("a", 1.0)]
    evidence = evidence_of(rollouts)
    actual = JITTED[name](make_table(*rollouts, size=SIZE), evidence)
    assert actual.dtype == jnp.float32
    expected = loop(rollouts, evidence, name)
    np.testing.assert_allclose(actual[: len(expected)], expected, rtol=2e-5, atol=1e-5)
    assert (np.asarray(actual)[len(expected) :] == 0).all()


@pytest.mark.slow
@NAMES
@settings(max_examples=8, deadline=None)
@given(rollouts=batches(integers=True), data=st.data())
def test_the_order_of_rollouts_does_not_matter(name, rollouts, data):
    rollouts = [make_rollout("z", 3.0, name="z0"), make_rollout("z", 1.0, name="z1"), *rollouts]
    if "maxrl" in name:
        rollouts = [r for r in rollouts if all(t.reward + r.reward >= 0 for t in r.transitions)]
    result = lambda order: by_rollout(order, np.asarray(JITTED[name](make_table(*order, size=SIZE), evidence_of(order, SIZE))))  # noqa: E731
    one, other = result(rollouts), result(data.draw(st.permutations(rollouts)))
    for rollout in one:
        np.testing.assert_allclose(one[rollout], other[rollout], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@NAMES
def test_nan_in_padding_reaches_nothing(name):
    rollouts = [make_rollout("a", 1.0, [0.5, 0.0]), make_rollout("a", 0.0), make_rollout("b", 1.0), make_rollout("b", 1.0)]
    table = make_table(*rollouts, size=SIZE)
    evidence = evidence_of(rollouts)
    values = np.where(table.valid, credit.intermediate(table, evidence).value, np.nan).astype(np.float32)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(values, table, evidence):
        result = METHODS[name](table, Credit(value=values, kind="return"), evidence)
        return jnp.sum(result**2), result

    (_, result), gradient = jax.jit(total)(values, poison_table(table), poison(evidence, table.valid))
    np.testing.assert_allclose(result, JITTED[name](table, evidence), rtol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opo", "gpg", "gpg, verl", "maxrl"])
def test_constant_groups_and_groups_of_one_are_exactly_zero(name):
    constant = [make_rollout("a", 0.1, [0.0] * (1 + i % 3)) for i in range(7)]
    table = make_table(*constant, make_rollout("b", 0.7), size=SIZE)
    assert JITTED[name](table, Evidence()).tolist() == [0.0] * SIZE


@pytest.mark.slow
def test_by_hand():
    table = make_table(*(make_rollout("a", x, lengths=[n]) for x, n in ((1, 3), (0, 1))), make_rollout("b", 1), make_rollout("b", 1))
    assert JITTED["opo"](table, Evidence()).tolist() == [0.25, -0.75, 0, 0]
    assert JITTED["gpg"](table, Evidence()).tolist() == [1, -1, 0, 0]  # α = 4 / 2
    np.testing.assert_allclose(JITTED["gpg, verl"](table, Evidence()), np.array([1, -1, 0, 0]) * (4 / 3) / np.sqrt(2), rtol=1e-5)
    assert JITTED["maxrl"](table, Evidence()).tolist() == [1, -1, 0, 0]
    assert JITTED["accepted"](table, Evidence()).tolist() == [1, 0, 1, 1]
    negative = make_table(make_rollout("a", -1), make_rollout("a", -3))
    assert JITTED["maxrl"](negative, Evidence()).tolist() == [0, 0]


@NAMES
def test_a_baseline_is_taken_off_once(name):
    table = make_table(make_rollout("a", 1.0), make_rollout("a", 0.0))
    with pytest.raises(ValueError, match="already an advantage and may only be scaled"):
        METHODS[name](table, Credit(value=np.ones(2, np.float32), kind="advantage"), Evidence())


def test_what_is_missing_or_unknown_is_said():
    table = make_table(make_rollout("a", 1.0), make_rollout("a", 0.0))
    earned = credit.identical(table, Evidence())
    with pytest.raises(ValueError, match="remax needs evidence.greedy_reward"):
        baselines.remax(table, earned, Evidence())
    with pytest.raises(ValueError, match="role_baseline needs evidence.role_baseline"):
        baselines.role_baseline(table, earned, Evidence())
    with pytest.raises(ValueError, match="gpg has no informative 'all': choose one of groups, nonzero"):
        baselines.gpg(table, earned, Evidence(), informative="all")
    with pytest.raises(ValueError, match="rae_update has no steps 'one'"):
        baselines.rae_update(np.zeros(1, np.float32), table, 0.5, steps="one")


@pytest.mark.parametrize("steps", ["batch", "rollouts"])
@settings(max_examples=15, deadline=None)
@given(rollouts=batches(integers=True))
def test_rae_moves_towards_the_mean_over_rollouts(steps, rollouts):
    table = make_table(*rollouts, size=SIZE)
    names = sorted({t.role for r in rollouts for t in r.transitions})
    before = np.array([0.5, -1.0], np.float32)
    expected = before.astype(np.float64)
    for index, role in enumerate(names):
        earned = [r.reward for r in rollouts if any(t.role == role for t in r.transitions)]
        decay = 0.75 if steps == "batch" else 0.75 ** len(earned)
        expected[index] = decay * expected[index] + (1 - decay) * np.mean(earned)
    np.testing.assert_allclose(RAE(before, poison_table(table), 0.75, steps=steps), expected, rtol=1e-5, atol=1e-6)


def test_rae_in_steps_of_rollouts_is_the_running_mean_of_equal_rewards():
    table = make_table(*(make_rollout("a", 2.0, [0.0] * n) for n in (1, 3, 2)), size=8)
    b = 0.0
    for _ in range(3):
        b = 0.5 * b + 0.5 * 2.0
    assert RAE(np.zeros(1, np.float32), table, 0.5, steps="rollouts").tolist() == [b]
    values = np.where(table.valid, 4.0, np.nan).astype(np.float32)
    assert RAE(np.zeros(1, np.float32), table, 0.5, values=values).tolist() == [2.0]
