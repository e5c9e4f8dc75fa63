"""Each process has the one difficulty that it is named for."""

from __future__ import annotations

import functools

import jax
import numpy as np

from lightningrl.lab import truth
from lightningrl.lab.difficulties import PROCESSES, stacked
from lightningrl.lab.process import ACTIONS, STATES, TURNS, Process
from tests.lab.enumeration import Ways, every_rollout, means, policy

UNIFORM = np.zeros((STATES, ACTIONS), np.float32)
ALL = list(PROCESSES)

process_of = functools.lru_cache(lambda name: PROCESSES[name]())


@functools.lru_cache
def ways_of(name: str) -> Ways:
    return every_rollout(process_of(name), policy(UNIFORM))


@functools.lru_cache
def values_of(name: str):
    return jax.tree.map(np.asarray, jax.jit(truth.policy_values)(process_of(name), UNIFORM))


def calls_with_chance(name: str) -> list[tuple[int, int, int, float]]:
    """(turn, state, action, chance) of every call that is made under the uniform policy."""
    _, chance = means(ways_of(name), ways_of(name).to_go)
    return [(*map(int, place), float(chance[tuple(place)])) for place in np.argwhere(chance > 0)]


def sizes(name: str, which) -> np.ndarray:
    """|A| of the calls that `which(process, turn, state, action)` picks."""
    process, advantage = process_of(name), values_of(name).advantage
    picked = [abs(advantage[t, s, a]) for t, s, a, _ in calls_with_chance(name) if which(process, t, s, a)]
    assert picked
    return np.array(picked)


def lengths(name: str) -> set[int]:
    return set(ways_of(name).made.sum(1).tolist())


def deterministic(process: Process) -> bool:
    return bool(np.isin(process.next_state, (0.0, 1.0)).all())


def test_delayed_reward():
    """Nothing is paid before the end, every call matters, and each as much as any other."""
    process = process_of("delayed_reward")
    assert not process.reward.any() and deterministic(process) and lengths("delayed_reward") == {4}
    q = values_of("delayed_reward").q
    gaps = [q[t, s].max() - q[t, s].min() for t, s, _, _ in calls_with_chance("delayed_reward")]
    np.testing.assert_allclose(gaps, 0.25, atol=1e-6)


def test_distractor_turn():
    """The two calls in the middle lead elsewhere, are long, and have an advantage of exactly nothing; the others decide."""
    process = process_of("distractor_turn")
    assert lengths("distractor_turn") == {4}
    np.testing.assert_allclose(sizes("distractor_turn", lambda p, t, s, a: t in (1, 2)), 0.0, atol=1e-7)
    assert (sizes("distractor_turn", lambda p, t, s, a: t in (0, 3)) > 0.1).all()
    middle = [(s, a) for t, s, a, _ in calls_with_chance("distractor_turn") if t in (1, 2)]
    assert all(process.tokens[call] == 3 for call in middle)
    assert all(len({process.next_state[s, a].argmax() for a in range(ACTIONS)}) == ACTIONS for s, _ in middle)


def test_mistake_and_recovery():
    """Rollouts that succeed hold a call that made things worse and one that repaired them."""
    process, advantage = process_of("mistake_and_recovery"), values_of("mistake_and_recovery").advantage
    ways = ways_of("mistake_and_recovery")
    of_calls = np.where(ways.made, advantage[np.arange(TURNS), ways.state, ways.action], 0.0)
    mistaken = np.cumsum(of_calls < -0.05, 1) > 0
    repaired = (mistaken & (of_calls > 0.05)).any(1)
    won = ways.outcome == process.outcome.max()
    assert ways.chance[won & repaired].sum() > 0.5 * ways.chance[won].sum() > 0


def test_redundant_call():
    """To look up again what is known leaves the state as it is; many successes hold such a call, and it never helped."""
    process, values = process_of("redundant_call"), values_of("redundant_call")
    again = {(s, a) for s in range(STATES) for a in range(ACTIONS) if not process.terminal[s] and process.next_state[s, a, s] == 1}
    assert len(again) == 4
    for t, s, a, _ in calls_with_chance("redundant_call"):
        if (s, a) in again:
            np.testing.assert_allclose(values.q[t, s, a], values.v[t + 1, s], atol=1e-6)
            assert values.q[t, s, a] <= max(values.q[t, s]) - 0.02
    ways = ways_of("redundant_call")
    wasted = np.any([ways.made & (ways.state == s) & (ways.action == a) for s, a in again], (0, 2))
    won = ways.outcome == 1
    assert ways.chance[won & wasted].sum() > 0.2 * ways.chance[won].sum() > 0


def test_one_to_blame():
    """Three roles act; what the checker does is worth ten times what the planner's and the writer's calls are."""
    assert {int(process_of("one_to_blame").role[s]) for _, s, _, _ in calls_with_chance("one_to_blame")} == {0, 1, 2}
    checker = sizes("one_to_blame", lambda p, t, s, a: p.role[s] == 2).mean()
    others = sizes("one_to_blame", lambda p, t, s, a: p.role[s] != 2).mean()
    assert checker > 10 * others


def test_stochastic_tools():
    """No call's return is certain, and chance moves it more than all that one call can do."""
    process = process_of("stochastic_tools")
    called = [s for _, s, _, _ in calls_with_chance("stochastic_tools")]
    assert all((np.sort(process.next_state[s, a])[-2:] > 0).all() for s in called for a in range(ACTIONS))
    ways = ways_of("stochastic_tools")
    q, chance = means(ways, ways.to_go)
    squares, _ = means(ways, ways.to_go**2)
    spread = np.sqrt(np.sum(chance * (squares - q**2)) / chance.sum())
    signal = np.sqrt(np.sum(chance * values_of("stochastic_tools").advantage ** 2) / chance.sum())
    assert spread > 2 * signal


def test_unequal_lengths():
    """Rollouts of one call of one token and of six calls of three, and the long way is the better one."""
    process = process_of("unequal_lengths")
    assert lengths("unequal_lengths") == {1, 2, 3, 4, 5, 6}
    best = jax.tree.map(np.asarray, jax.jit(truth.optimal_values)(process))
    assert best.q[0, 0].argmax() == 1  # careful work
    np.testing.assert_allclose(best.q[0, 0], [0.4, 1.0, 0.2], rtol=1e-6)
    assert values_of("unequal_lengths").q[0, 0].argmax() == 1  # already where everything is done at random: no trap
    ways = ways_of("unequal_lengths")
    tokens = np.where(ways.made, process.tokens[ways.state, ways.action], 0).sum(1)
    assert (tokens.min(), tokens.max()) == (1, 18)


def test_key_used_late():
    """The first call decides what a later one has to be, those between do nothing, and what is shown tells no keys apart."""
    process, values = process_of("key_used_late"), values_of("key_used_late")
    np.testing.assert_allclose(sizes("key_used_late", lambda p, t, s, a: t in (1, 2)), 0.0, atol=1e-7)
    assert values.q[0, 0].max() - values.q[0, 0].min() > 0.1
    locks = sorted({s for t, s, _, _ in calls_with_chance("key_used_late") if t == 3})
    assert len(locks) == 3 and len({int(process.observation[s]) for s in locks}) == 1
    assert [int(values.q[3, s].argmax()) for s in locks] == [0, 1, 2]


def test_one_difficulty_at_a_time():
    """What the others are named for is absent: lengths, hidden states, chance of tools, several tasks."""
    for name in ALL:
        process = process_of(name)
        shown = {int(process.observation[s]) for _, s, _, _ in calls_with_chance(name)}
        states = {s for _, s, _, _ in calls_with_chance(name)}
        assert (len(shown) < len(states)) == (name == "key_used_late")
        assert ((process.start > 0).sum() > 1) == (name == "stochastic_tools")
        assert (len({int(process.role[s]) for s in states}) > 1) == (name == "one_to_blame")
        assert bool(process.reward.any()) == (name == "mistake_and_recovery")


def test_stacked():
    processes = stacked(("key_used_late", "delayed_reward"))
    np.testing.assert_array_equal(processes.outcome[1], process_of("delayed_reward").outcome)
    assert {x.shape[0] for x in jax.tree.leaves(processes)} == {2}
