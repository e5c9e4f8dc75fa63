"""Values, gradients and distributions against sums over every possible rollout, in float64."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from lightningrl.lab import truth
from lightningrl.lab.difficulties import PROCESSES
from lightningrl.lab.process import ACTIONS, LOWEST, RETURN_STEP, RETURNS, STATES, TURNS, make_process
from tests.lab.enumeration import Ways, every_rollout, exact, means, policy

EVERY_PROCESS = pytest.mark.parametrize("name", list(PROCESSES))
BETA = 0.25

process_of = functools.lru_cache(lambda name: PROCESSES[name]())


def logits_of(name: str) -> np.ndarray:
    seed = list(PROCESSES).index(name)
    return np.random.default_rng(seed).normal(size=(STATES, ACTIONS)).astype(np.float32)


@functools.lru_cache
def ways_of(name: str) -> Ways:
    return every_rollout(process_of(name), policy(logits_of(name)))


@jax.jit
def everything(process, logits):
    values = truth.policy_values(process, logits)
    return {
        "values": values,
        "outcome": truth.outcome_values(process, logits),
        "return": truth.expected_return(process, values),
        "best": truth.expected_return(process, truth.optimal_values(process)),
        "occupancy": truth.occupancy(process, logits),
        "gradient": truth.policy_gradient(process, logits),
        "distribution": truth.return_distribution(process, logits),
        "tilted": truth.tilted_log_ratio(process, logits, BETA),
        "calls": truth.calls_to_go(process, logits),
    }


@functools.lru_cache
def computed(name: str):
    return jax.tree.map(np.asarray, everything(process_of(name), logits_of(name)))


@EVERY_PROCESS
def test_return_and_occupancy(name):
    process, ways, found = process_of(name), ways_of(name), computed(name)
    np.testing.assert_allclose(found["return"], ways.chance @ ways.paid, rtol=1e-5)
    np.testing.assert_allclose(found["occupancy"], means(ways, ways.to_go)[1].sum(-1), atol=1e-6)
    np.testing.assert_allclose((process.start * found["calls"][0]).sum(), ways.chance @ ways.made.sum(1), rtol=1e-5)


@EVERY_PROCESS
def test_q_v_and_advantage(name):
    """At every call that some rollout makes: the mean of what is paid from there on, and less the mean over actions."""
    ways, values = ways_of(name), computed(name)["values"]
    q, chance = means(ways, ways.to_go)
    made = chance > 0
    assert made.any(-1).sum() >= 4
    np.testing.assert_allclose(values.q[made], q[made], atol=2e-6)
    v = (policy(logits_of(name)) * q).sum(-1)
    reached = made.all(-1)
    np.testing.assert_array_equal(reached, made.any(-1))
    np.testing.assert_allclose(values.v[:-1][reached], v[reached], atol=2e-6)
    np.testing.assert_allclose(values.advantage[reached], (q - v[..., None])[reached], atol=3e-6)
    outcome, _ = means(ways, ways.outcome[:, None])
    np.testing.assert_allclose(computed(name)["outcome"].q[made], outcome[made], atol=2e-6)


@EVERY_PROCESS
def test_policy_gradient(name):
    """∇J = Σ_τ p(τ) R(τ) Σ_t ∇ log π(aₜ | sₜ), with nothing of the policy gradient theorem in it."""
    ways, pi = ways_of(name), policy(logits_of(name))
    gradient = np.zeros((STATES, ACTIONS))
    for turn in range(TURNS):
        made = ways.made[:, turn]
        state, action, weight = ways.state[made, turn], ways.action[made, turn], (ways.chance * ways.paid)[made]
        np.add.at(gradient, (state, action), weight)
        np.add.at(gradient, state, -weight[:, None] * pi[state])
    np.testing.assert_allclose(computed(name)["gradient"], gradient, atol=1e-6)


@EVERY_PROCESS
def test_distribution_of_returns(name):
    ways, distribution = ways_of(name), computed(name)["distribution"]
    for place in range(RETURNS):
        z = LOWEST + RETURN_STEP * place
        share, chance = means(ways, np.abs(ways.to_go - z) < 1e-6)
        np.testing.assert_allclose(distribution[..., place][chance > 0], share[chance > 0], atol=1e-6)


@EVERY_PROCESS
def test_every_return_is_on_the_grid(name):
    place = (ways_of(name).to_go - LOWEST) / RETURN_STEP
    np.testing.assert_allclose(place, np.round(place), atol=1e-6)
    assert (np.round(place) >= 0).all() and (np.round(place) < RETURNS).all()


@EVERY_PROCESS
def test_tilted_log_ratio(name):
    """log E[exp(Z/β) | s, a] - log E[exp(Z/β) | s]; the tilted policy is a policy."""
    ways, pi = ways_of(name), policy(logits_of(name))
    mean, chance = means(ways, np.exp(ways.to_go / BETA))
    reached = chance.any(-1)
    expected = np.log(mean[reached]) - np.log((pi * mean).sum(-1)[reached])[:, None]
    found = computed(name)["tilted"]
    np.testing.assert_allclose(found[reached], expected, atol=1e-5)
    np.testing.assert_allclose((pi * np.exp(found)).sum(-1)[reached], 1.0, rtol=1e-5)


@EVERY_PROCESS
def test_the_best_return(name):
    """By looking ahead at every action and every way on, without a table of values."""
    process = process_of(name)
    ways, reward, outcome = (exact(x) for x in (process.next_state, process.reward, process.outcome))

    @functools.lru_cache(None)
    def ahead(state: int, turn: int) -> float:
        if turn == TURNS or process.terminal[state]:
            return outcome[state]
        return max(
            reward[state, a] + sum(ways[state, a, s] * ahead(int(s), turn + 1) for s in np.flatnonzero(ways[state, a]))
            for a in range(ACTIONS)
        )

    best = sum(exact(process.start)[s] * ahead(int(s), 0) for s in np.flatnonzero(process.start))
    np.testing.assert_allclose(computed(name)["best"], best, rtol=1e-5)
    assert best > computed(name)["return"] + 0.05


def test_bad_processes_get_a_sentence():
    good = {"task": ["done", "done", "failed"]}
    with pytest.raises(ValueError, match=r"sum to 0\.5"):
        make_process(good, start={"task": 0.5}, outcome={})
    with pytest.raises(ValueError, match="needs 3 actions"):
        make_process({"task": ["done"]}, start={"task": 1.0}, outcome={})
    with pytest.raises(ValueError, match=r"no multiple of 0\.05"):
        make_process(good, start={"task": 1.0}, outcome={"done": 0.33})
    with pytest.raises(ValueError, match="30 states"):
        make_process({str(i): [str(i + 1)] * 3 for i in range(29)}, start={"0": 1.0}, outcome={})
