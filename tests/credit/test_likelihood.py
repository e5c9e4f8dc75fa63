"""Hindsight credit and information gain against loops in float64."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl.credit.likelihood import hcapo, hindsight, igpo
from lightningrl.table import Evidence
from tests.batches import SIZE, batches, make_rollout, make_table
from tests.credit.checks import check_loop, check_order, check_padding, flat, group_calls, named, per_call, relative_loop

GAMMA = 0.5


def evidence_of(rollouts, size):
    return Evidence(
        hindsight_logp=per_call(rollouts, size, low=-3, high=0),
        response_logp=per_call(rollouts, size, low=-3, high=0, seed=1),
        answer_logp=per_call(rollouts, size, 2, low=-3, high=0),
    )


def calls_of(rollouts):
    return [(i, t) for i, r in enumerate(rollouts) for t in range(len(r.transitions))]


def to_go(rollout, t):
    rewards = [call.reward for call in rollout.transitions]
    rewards[-1] += rollout.reward
    return sum(GAMMA ** (s - t) * rewards[s] for s in range(t, len(rewards)))


def log_ratios(rollouts, per_token):
    e = evidence_of(rollouts, SIZE)
    rows = zip(calls_of(rollouts), e.hindsight_logp.astype(np.float64), e.response_logp.astype(np.float64), strict=False)
    return {(i, t): (h - p) / (len(rollouts[i].transitions[t].response_ids) if per_token else 1) for (i, t), h, p in rows}


def hindsight_loop(rollouts, per_token=False):
    ratios = log_ratios(rollouts, per_token)
    return [(1 - np.exp(np.clip(-ratios[i, t], -1, 1))) * to_go(rollouts[i], t) for i, t in calls_of(rollouts)]


def hcapo_loop(rollouts):
    ratios, result = log_ratios(rollouts, True), {}
    for calls in group_calls(rollouts).values():
        units = [i for i, _ in calls]
        outcomes = relative_loop([rollouts[i].reward for i in units], [1 / len(rollouts[i].transitions) for i in units], units=units)
        refined = [np.clip(np.exp(ratios[i, t]), 0.5, 1.25) * to_go(rollouts[i], t) for i, t in calls]
        steps = relative_loop(refined, [1.0] * len(calls), units=units)
        result.update({c: a + 2 * b for c, a, b in zip(calls, outcomes, steps, strict=True)})
    return flat(rollouts, result)


def igpo_loop(rollouts):
    logp, result = dict(zip(calls_of(rollouts), evidence_of(rollouts, SIZE).answer_logp.astype(np.float64), strict=False)), {}
    for calls in group_calls(rollouts).values():
        last = [t == len(rollouts[i].transitions) - 1 for i, t in calls]
        rewards = [rollouts[c[0]].reward if end else np.exp(logp[c][1]) - np.exp(logp[c][0]) for c, end in zip(calls, last, strict=True)]
        relative = dict(zip(calls, relative_loop(rewards, [1.0] * len(calls), units=[i for i, _ in calls]), strict=True))
        for i, t in calls:
            result[i, t] = sum(GAMMA ** (s - t) * relative[i, s] for s in range(t, len(rollouts[i].transitions)))
    return flat(rollouts, result)


ASSIGNERS: dict[str, tuple[Any, ...]] = {
    "hindsight": (functools.partial(hindsight, gamma=GAMMA, max_log_ratio=1.0), hindsight_loop),
    "hindsight, per token": (
        functools.partial(hindsight, gamma=GAMMA, max_log_ratio=1.0, per_token=True),
        functools.partial(hindsight_loop, per_token=True),
    ),
    "hcapo": (functools.partial(hcapo, gamma=GAMMA, step_weight=2.0, ratio_low=0.5, ratio_high=1.25), hcapo_loop),
    "igpo": (functools.partial(igpo, gamma=GAMMA), igpo_loop),
}
JITTED = {name: jax.jit(assigner) for name, (assigner, _) in ASSIGNERS.items()}
NAMES = pytest.mark.parametrize("name", list(ASSIGNERS))


@pytest.mark.slow
@NAMES
@settings(max_examples=15, deadline=None)
@given(rollouts=batches(integers=True))
def test_is_that_of_a_loop(name, rollouts):
    check_loop(JITTED[name], rollouts, evidence_of, ASSIGNERS[name][1](rollouts), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@NAMES
@settings(max_examples=6, deadline=None)
@given(rollouts=batches(integers=True), data=st.data())
def test_the_order_of_rollouts_does_not_matter(name, rollouts, data):
    check_order(JITTED[name], rollouts, data.draw(st.permutations(rollouts)), evidence_of)


@pytest.mark.slow
@NAMES
def test_padding_reaches_nothing(name):
    check_padding(JITTED[name], named(make_rollout("a", 1.0, [0.5, 0.0, 0.25]), make_rollout("a", 0.0, [0.25, 1.0])), evidence_of)


def test_hindsight_by_hand():
    """Twice as likely in hindsight: half of Z. As likely: none. A quarter as likely: -3 Z. Impossible: clamped."""
    table = make_table(make_rollout("a", 2.0, [0.0] * 4), size=5)
    likelier = np.log(np.array([2, 1, 0.25, 1e-30, 1], np.float32))
    evidence = Evidence(hindsight_logp=likelier - 3, response_logp=np.full(5, -3, np.float32))
    credit = hindsight(table, evidence, max_log_ratio=2.0)
    np.testing.assert_allclose(credit.value, [1, 0, -6, 2 - 2 * np.exp(2), 0], rtol=1e-5, atol=1e-6)
    assert credit.kind == "advantage"


def test_igpo_by_hand():
    """The answer's probability goes from ¼ to ¾ in the first rollout and down again in the second; outcomes 1 and 0."""
    table = make_table(make_rollout("a", 1.0, [0.0, 0.0]), make_rollout("a", 0.0, [0.0, 0.0]))
    logp = np.log(np.array([[0.25, 0.75], [0.75, 0.9], [0.75, 0.25], [0.25, 0.1]], np.float32))
    credit = igpo(table, Evidence(answer_logp=logp), scale="none")
    np.testing.assert_allclose(credit.value, [0.25 + 0.75, 0.75, -0.75 - 0.25, -0.25], rtol=1e-5)
    assert credit.kind == "advantage"


def test_groups_of_one():
    table = make_table(make_rollout("a", 1.0, [0.0, 0.0]))
    evidence = evidence_of(named(make_rollout("a", 1.0, [0.0, 0.0])), 2)
    assert not igpo(table, evidence).value.any()
    assert not hcapo(table, evidence).value.any()


@pytest.mark.slow
def test_missing_evidence_is_named_and_gets_no_gradient():
    table = make_table(make_rollout("a", 1.0, [0.0, 0.0]), make_rollout("a", 0.0))
    with pytest.raises(ValueError, match="igpo needs evidence.answer_logp"):
        igpo(table, Evidence())
    for assign in (hindsight, hcapo):
        with pytest.raises(ValueError, match=f"{assign.__name__} needs evidence.hindsight_logp and evidence.response_logp"):
            assign(table, Evidence(response_logp=np.zeros(3, np.float32)))
        ones = np.ones(3, np.float32)
        gradient = jax.grad(lambda h, f=assign, p=ones: f(table, Evidence(hindsight_logp=h, response_logp=p)).value.sum())(2 * ones)
        assert not gradient.any()
