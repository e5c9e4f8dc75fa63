"""Scripted judges and potentials: where their numbers stand in the table, and what is refused."""

from __future__ import annotations

import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings

from lightningrl.credit import judged, potential_difference
from lightningrl.errors import UserError
from lightningrl.evidence.judges import judge_rollouts, potentials
from lightningrl.types import Rollout
from tests.batches import batches, make_rollout, make_table

KEY = jax.random.key(0)


def by_call(rollout: Rollout) -> list[float]:
    """A score that belongs to a rollout and a turn."""
    return [10.0 * rollout.reward + t for t in range(len(rollout.transitions))]


def judge_of(score):
    return lambda rollouts: [score(rollout) for rollout in rollouts]


def produce(rollouts, judge, aux=None, **settings):
    evidence, totals = judge_rollouts(None, aux, rollouts, KEY, judge=judge, **settings)
    return np.asarray(evidence.judge), totals


@settings(max_examples=15, deadline=None)
@given(rollouts=batches(integers=True))
def test_scores_stand_in_the_order_of_the_table(rollouts):
    values, totals = produce(rollouts, judge_of(by_call))
    assert values.dtype == np.float32
    assert values.tolist() == [x for r in rollouts for x in by_call(r)]
    assert totals == {"judge_groups": len({r.group for r in rollouts}), "judge_abstained": 0}


def test_a_judge_sees_whole_groups_one_after_another():
    rollouts = [make_rollout("b", 1.0, name="0"), make_rollout("a", 1.0, name="1"), make_rollout("b", 0.0, [0.0] * 2, name="2")]
    seen = []

    def judge(group):
        seen.append([r.id for r in group])
        return [0.5 * i for i in range(len(group))]

    values, _ = produce(rollouts, judge, multiple=8)
    assert seen == [["0", "2"], ["1"]]
    assert values.tolist() == [0.0, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0]


def test_threads_change_nothing():
    """Four groups that can only be judged together, and whose order of finishing is reversed: the same scores in the same places."""
    rollouts = [make_rollout(f"g{i}", float(i), [0.0] * (i + 1), name=str(i)) for i in range(4)]
    together, done = threading.Barrier(4), [threading.Event() for _ in range(5)]
    done[4].set()

    def judge(group):
        together.wait(timeout=10)
        i = int(group[0].id)
        assert done[i + 1].wait(timeout=10)
        done[i].set()
        return judge_of(by_call)(group)

    values, totals = produce(rollouts, judge, concurrency=4)
    assert values.tolist() == produce(rollouts, judge_of(by_call))[0].tolist()
    assert totals["judge_groups"] == 4


def test_no_more_groups_at_a_time_than_asked_for():
    lock, now, most = threading.Lock(), [0], [0]

    def judge(group):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.01)
        with lock:
            now[0] -= 1
        return [0.0]

    produce([make_rollout(f"g{i}", 0.0) for i in range(12)], judge, concurrency=3)
    assert most[0] <= 3


def test_the_first_group_that_fails_is_the_one_that_is_named():
    def judge(group):
        if group[0].group == "a":
            threading.Event().wait(0.05)
        raise UserError(f"no answer for {group[0].group}")

    with pytest.raises(UserError, match="no answer for a"):
        produce([make_rollout("a", 0.0), make_rollout("b", 0.0)], judge, concurrency=2)


def test_one_score_is_for_all_calls_and_its_credit_is_that_of_the_judge():
    rollouts = [make_rollout("a", 0.0, [0.0] * 3), make_rollout("a", 0.0, [0.0])]
    evidence, _ = judge_rollouts(None, None, rollouts, KEY, judge=lambda group: [np.float32(1.0), 0], multiple=5)
    assert np.asarray(evidence.judge).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]
    credit = np.asarray(judged(make_table(*rollouts, size=5), evidence).value)
    np.testing.assert_allclose(credit, np.array([1.0, 1.0, 1.0, -1.0, 0.0]) / np.sqrt(2), rtol=1e-5)


def test_a_group_that_a_judge_abstains_from_earns_exactly_nothing_and_is_counted():
    rollouts = [make_rollout("a", 1.0, [0.0] * 2), make_rollout("a", 0.0), make_rollout("b", 1.0), make_rollout("b", 0.0)]
    evidence, totals = judge_rollouts(None, None, rollouts, KEY, judge=lambda group: None if group[0].group == "a" else [1.0, 0.0])
    assert np.asarray(judged(make_table(*rollouts), evidence).value)[:3].tolist() == [0.0, 0.0, 0.0]
    assert np.asarray(evidence.judge).tolist() == [0.0, 0.0, 0.0, 1.0, 0.0]
    assert totals == {"judge_groups": 2, "judge_abstained": 1}
    _, more = produce(rollouts, judge_of(by_call), totals)
    assert more == {"judge_groups": 4, "judge_abstained": 1}


def test_failed_rollouts_are_not_judged():
    rollouts = [make_rollout("a", 1.0, name="good"), make_rollout("a", 0.0, status="failed", name="bad")]
    values, _ = produce(rollouts, lambda group: [len(group) + 0.5] * len(group))
    assert values.tolist() == [1.5]
    values, totals = produce(rollouts[1:], judge_of(by_call), multiple=2)
    assert (values.tolist(), totals["judge_groups"]) == ([0.0, 0.0], 0)


@pytest.mark.parametrize(
    "scores, sentence",
    [
        ([1.0], "1 scores for the 2 rollouts of group 'a', whose first is rollout 'x'"),
        ([1.0, [1.0, 2.0, 3.0]], "3 scores for rollout 'y' of 2 calls"),
        ([float("nan"), 1.0], "nan for rollout 'x': it should give finite numbers"),
        ([1.0, [0.0, float("inf")]], "inf for rollout 'y'"),
        ([1.0, ["good", "bad"]], "'good' for rollout 'y'"),
        ([None, 1.0], "None for rollout 'x'"),
    ],
)
def test_bad_scores_get_a_sentence_that_names_the_rollout(scores, sentence):
    with pytest.raises(UserError) as error:
        produce([make_rollout("a", 0.0, name="x"), make_rollout("a", 0.0, [0.0, 0.0], name="y")], lambda group: scores)
    assert sentence in str(error.value)


# Potentials


def progress(rollout: Rollout) -> list[float]:
    return [0.5 * t + len(rollout.group) for t in range(len(rollout.transitions) + 1)]


@settings(max_examples=10, deadline=None)
@given(rollouts=batches())
def test_potentials_are_those_before_and_after_each_call(rollouts):
    evidence, state = potentials(None, {}, rollouts, KEY, potential=progress)
    phi = [progress(r) for r in rollouts]
    assert np.asarray(evidence.potential).tolist() == [[p[t], p[t + 1]] for p in phi for t in range(len(p) - 1)]
    assert evidence.potential.dtype == np.float32 and state == {}


def test_shaping_by_them_only_takes_the_first_state_off():
    """What Ng, Harada and Russell prove: returns are those of before, less Φ of the state."""
    rollouts = [make_rollout("a", 1.0, [0.0, 0.25]), make_rollout("a", 0.0, [0.5])]
    evidence, _ = potentials(None, None, rollouts, KEY, potential=progress, multiple=4)
    credit = np.asarray(potential_difference(make_table(*rollouts, size=4), evidence).value)
    np.testing.assert_allclose(credit, [1.25 - 1.0, 1.25 - 1.5, 0.5 - 1.0, 0.0], atol=1e-6)


@pytest.mark.parametrize(
    "phi, sentence",
    [([0.0, 1.0], "2 numbers for rollout 'x' of 2 calls: there should be 3"), ([0.0, float("nan"), 1.0], "nan for rollout 'x'")],
)
def test_bad_potentials_get_a_sentence_that_names_the_rollout(phi, sentence):
    with pytest.raises(UserError) as error:
        potentials(None, None, [make_rollout("a", 0.0, [0.0, 0.0], name="x")], KEY, potential=lambda rollout: phi)
    assert sentence in str(error.value)
