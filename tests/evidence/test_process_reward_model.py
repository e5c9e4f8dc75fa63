"""The implicit process-reward model on recorded rollouts: its gradient is that of its loss, and it learns their outcomes."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lightningrl.advantages.process_rewards import prime
from lightningrl.batches import pack_updates
from lightningrl.checkpoint import Checkpoints
from lightningrl.config import FitConfig
from lightningrl.evidence.process_rewards import (
    Objective,
    implicit_scores,
    init_process_rewards,
    outcome_cross_entropy,
    process_reward_step,
    process_rewards,
    trajectory_dpo,
)
from lightningrl.evidence.scorer import edge_logps, response_logps, table_calls
from lightningrl.packing.rows import RowSettings, pack
from lightningrl.producers import Sources, make_producers
from lightningrl.recipes import RECIPES
from lightningrl.sharding import make_mesh
from lightningrl.table import Evidence
from lightningrl.tabulate import table_from_rollouts
from lightningrl.train import TrainStep, score_edges
from tests.evidence.test_scorer import CONFIG, recorded, weights
from tests.tiny import tiny_policy

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)
# The shortest of two groups, and rows as short: a gradient of longer rows takes long to compile. Six micro-batches of two rows.
RECORDED = [r for r in recorded() if all(len(t.prompt_ids) + len(t.response_ids) <= 64 for t in r.transitions)]
ROWS = RowSettings((64,), 128, 64)
BETA, RATE = 0.05, 0.1
CALLS, LENGTHS = sum(len(r.transitions) for r in RECORDED), [len(t.response_ids) for t in table_calls(RECORDED)[0]]
OUTCOMES = np.array([r.reward for r in RECORDED])
GROUPS = np.unique([r.group for r in RECORDED], return_inverse=True)[1]


@functools.cache
def learner() -> TrainStep:
    """Descent with momentum: its first step is along the gradient, and it has a state to keep."""
    return process_reward_step(CONFIG, optax.sgd(RATE, momentum=0.9), make_mesh())


def produced(aux: dict[str, Any], rollouts: Any = None, **settings: Any) -> tuple[Evidence, dict[str, Any]]:
    given = RECORDED if rollouts is None else rollouts
    ways = {"reference": weights(1), "beta": BETA, **settings}
    return process_rewards(weights(), aux, given, KEY, step=learner(), rows=ROWS, **ways)


def start() -> dict[str, Any]:
    return init_process_rewards(learner(), weights())


def scores_of(made: Evidence) -> np.ndarray:
    assert made.prm_logp is not None and made.prm_ref_logp is not None
    return implicit_scores(made.prm_logp, made.prm_ref_logp, RECORDED, beta=BETA)


# ---- objectives


def by_hand(objective: Objective, s: np.ndarray, y: np.ndarray, groups: np.ndarray) -> float:
    """From the papers, one term after another."""
    sigma = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    if objective is outcome_cross_entropy:
        return -sum(b * math.log(sigma(a)) + (1 - b) * math.log(1 - sigma(a)) for a, b in zip(s, y, strict=True)) / len(s)
    pairs = [(i, j) for i in range(len(s)) for j in range(len(s)) if groups[i] == groups[j] and y[i] > y[j]]
    return -sum(math.log(sigma(s[i] - s[j])) for i, j in pairs) / max(len(pairs), 1)


@pytest.mark.parametrize("objective", [outcome_cross_entropy, trajectory_dpo])
@pytest.mark.parametrize("graded", [False, True])
def test_objectives_are_those_of_a_loop_and_their_derivatives_of_differences(objective: Objective, graded: bool) -> None:
    rng = np.random.default_rng(0)
    s, groups = rng.normal(0, 2, 12), rng.integers(0, 3, 12)
    y = rng.uniform(0, 1, 12).round(1) if graded else rng.integers(0, 2, 12).astype(float)
    loss, slopes = objective(s, y, groups)
    np.testing.assert_allclose(loss, by_hand(objective, s, y, groups), rtol=1e-12)
    for i, step in enumerate(1e-5 * np.eye(12)):
        difference = (by_hand(objective, s + step, y, groups) - by_hand(objective, s - step, y, groups)) / 2e-5
        np.testing.assert_allclose(slopes[i], difference, atol=1e-9)


@pytest.mark.parametrize("objective", [outcome_cross_entropy, trajectory_dpo])
def test_objectives_bear_extreme_scores(objective: Objective) -> None:
    loss, slopes = objective(np.array([-1e4, 1e4]), np.array([1.0, 0.0]), np.zeros(2, int))
    np.testing.assert_allclose(loss, 1e4 if objective is outcome_cross_entropy else 2e4)
    np.testing.assert_allclose(slopes, [-0.5, 0.5] if objective is outcome_cross_entropy else [-1.0, 1.0])


def test_pairs_are_of_a_group() -> None:
    s, y = np.array([0.3, -0.2, 0.5, 0.1]), np.array([1.0, 0.0, 1.0, 1.0])
    loss, slopes = trajectory_dpo(s, y, np.array([0, 0, 1, 1]))
    np.testing.assert_allclose(loss, by_hand(trajectory_dpo, s[:2], y[:2], np.zeros(2, int)))
    assert slopes[2:].tolist() == [0.0, 0.0] and slopes[0] == -slopes[1] < 0
    alone, none = trajectory_dpo(s, y, np.arange(4))
    assert alone == 0.0 and none.tolist() == [0.0] * 4


def test_outcomes_outside_the_unit_interval_are_refused_by_cross_entropy() -> None:
    for bad in (-1.0, 1.5):
        with pytest.raises(ValueError, match=f"an outcome is {bad:g}"):
            outcome_cross_entropy(np.zeros(2), np.array([0.0, bad]), np.zeros(2, int))
    assert np.isfinite(trajectory_dpo(np.zeros(2), np.array([0.0, -1.0]), np.zeros(2, int))[0])


# ---- the producer


@functools.cache
def gradients() -> dict[Objective, Any]:
    """∇ of each loss itself, by jax, of every micro-batch at once."""
    transitions, owner = table_calls(RECORDED)
    packed = pack(transitions, range(CALLS), ROWS)
    rollout = jnp.asarray(owner)[packed.edges.transition]
    every = (jax.tree.map(lambda *x: jnp.stack(x), *packed.rows), jax.tree.map(jnp.asarray, packed.edges))
    reference = edge_logps(weights(1), packed, score=learner().score)
    y, pairs = jnp.asarray(OUTCOMES), (GROUPS[:, None] == GROUPS) & (OUTCOMES[:, None] > OUTCOMES)

    def loss(params: Any, chosen: Any) -> Any:
        logp = jax.lax.map(lambda b: score_edges(params, CONFIG, *b).logp, every)
        s = jnp.zeros(len(RECORDED)).at[rollout].add(BETA * jnp.where(packed.edges.mask, logp - reference, 0.0))
        cross_entropy = -jnp.mean(y * jax.nn.log_sigmoid(s) + (1 - y) * jax.nn.log_sigmoid(-s))
        dpo = -jnp.sum(jnp.where(pairs, jax.nn.log_sigmoid(s[:, None] - s), 0.0)) / pairs.sum()
        return jnp.where(chosen, cross_entropy, dpo)

    gradient = jax.jit(jax.grad(loss))  # of either, so that it is compiled once
    return {outcome_cross_entropy: gradient(weights(), True), trajectory_dpo: gradient(weights(), False)}


@pytest.mark.parametrize("objective", [outcome_cross_entropy, trajectory_dpo])
def test_the_step_follows_the_gradient_of_the_loss(objective: Objective) -> None:
    before = weights()
    _, aux = produced(start(), objective=objective)
    moved = jax.tree.map(lambda a, b: (np.asarray(a, np.float64) - np.asarray(b, np.float64)) / RATE, before, aux["params"])
    expected = gradients()[objective]
    largest = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(expected))
    assert largest > 1e-3
    # A weight of order 1 after a step is rounded at 1e-7, which is 1e-6 of the gradient.
    jax.tree.map(lambda m, g: np.testing.assert_allclose(m, g, rtol=0, atol=1e-4 * largest + 2e-6), moved, expected)


@pytest.mark.parametrize("objective", [outcome_cross_entropy, trajectory_dpo])
def test_it_learns_the_recorded_outcomes(objective: Objective) -> None:
    aux, losses = start(), []
    for _ in range(8):
        made, aux = produced(aux, objective=objective, reference=weights(), update_first=False)
        losses.append(objective(scores_of(made), OUTCOMES, GROUPS)[0])
    assert int(aux["step"]) == 8
    np.testing.assert_allclose(losses[0], math.log(2), rtol=1e-12)  # φ is the reference, bit for bit
    assert all(b < a for a, b in zip(losses, losses[1:], strict=False)), losses
    assert losses[-1] < 0.97 * losses[0], losses


def test_tokens_are_in_order_of_transition_and_k() -> None:
    made, _ = produced(start(), multiple=256, update_first=False)
    transitions, _ = table_calls(RECORDED)
    tokens = sum(LENGTHS)
    for logp, params in ((made.prm_logp, weights()), (made.prm_ref_logp, weights(1))):
        expected = np.concatenate(response_logps(params, transitions, score=learner().score, rows=ROWS))
        assert logp is not None and logp.dtype == np.float32 and logp.shape == (-(-tokens // 256) * 256,)
        np.testing.assert_allclose(logp[:tokens], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(logp[tokens:], 0.0)


def test_scores_are_those_of_a_loop() -> None:
    made, _ = produced(start(), multiple=256, update_first=False)
    expected, at = [], 0
    for rollout in RECORDED:
        end = at + sum(len(t.response_ids) for t in rollout.transitions)
        expected.append(BETA * sum(float(made.prm_logp[k]) - float(made.prm_ref_logp[k]) for k in range(at, end)))
        at = end
    np.testing.assert_allclose(scores_of(made), expected, rtol=1e-12)


def test_before_or_after_the_update() -> None:
    """What an updated φ says at once is what it says at the start of the next call; both have the same state, to the last bit."""
    early, aux = produced(start(), update_first=False)
    late, same = produced(start())
    jax.tree.map(np.testing.assert_array_equal, aux, same)
    following, _ = produced(aux, update_first=False)
    np.testing.assert_array_equal(late.prm_logp, following.prm_logp)
    np.testing.assert_array_equal(early.prm_ref_logp, late.prm_ref_logp)
    assert not np.array_equal(np.asarray(early.prm_logp), np.asarray(late.prm_logp))


def test_without_a_reference_it_is_the_policy_of_this_iteration() -> None:
    made, _ = produced(start(), reference=None, update_first=False)
    np.testing.assert_array_equal(made.prm_logp, made.prm_ref_logp)


def test_no_pairs_no_step() -> None:
    constant = [r for r in RECORDED if r.reward == 1.0]
    made, aux = produced(start(), constant, objective=trajectory_dpo)
    assert int(aux["step"]) == 0
    jax.tree.map(np.testing.assert_array_equal, aux["params"], weights())
    assert np.shape(made.prm_logp) == (sum(len(t.response_ids) for r in constant for t in r.transitions),)


def test_only_runs_that_ended_count() -> None:
    failed = dataclasses.replace(RECORDED[0], id="f", status="failed", outcome={"reward": 7.0})
    some, aux = produced(start(), [*RECORDED, failed])
    same, expected = produced(start())
    np.testing.assert_array_equal(some.prm_logp, same.prm_logp)
    jax.tree.map(np.testing.assert_array_equal, aux, expected)


def test_its_state_keeps_its_shape_and_comes_back_from_a_checkpoint(tmp_path: Any) -> None:
    aux = start()
    layout = jax.tree.map(lambda x: (x.shape, x.dtype), aux)
    _, aux = produced(aux)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), aux) == layout
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, aux, {})
    back, _ = checkpoints.restore(1, start())
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, back, aux)
    assert int(produced(back)[1]["step"]) == 2


def test_advantages_take_it_by_transition_and_k() -> None:
    """As the loop has to gather it, onto edges in the order of its own packing."""
    made, _ = produced(start())
    table = table_from_rollouts(RECORDED, size=CALLS)
    first = np.concatenate([[0], np.cumsum(LENGTHS)[:-1]])
    total = 0.0
    spread = jax.jit(prime)
    for batch in pack_updates(RECORDED, table, 1, ROWS, 1):
        place = np.where(batch.edges.mask, first[batch.edges.transition] + batch.edges.k, 0)
        on_edges = Evidence(prm_logp=np.asarray(made.prm_logp)[place], prm_ref_logp=np.asarray(made.prm_ref_logp)[place])
        ratios = np.where(batch.edges.mask, np.asarray(on_edges.prm_logp) - np.asarray(on_edges.prm_ref_logp), 0.0)
        total += float(ratios.sum(dtype=np.float64))
        advantage = np.asarray(spread(table, batch.edges, np.zeros(CALLS, np.float32), on_edges))
        assert np.all(np.isfinite(advantage)) and np.any(advantage != 0)
    np.testing.assert_allclose(BETA * total, scores_of(made).sum(), rtol=1e-5)


@pytest.mark.parametrize("name", ["prime", "istar"])
def test_each_recipe_learns_its_rewards_its_own_way(name: str) -> None:
    """PRIME's reference is where training started, iStar's the policy that sampled, whose rewards are from before the update."""
    spread = functools.partial(RECIPES[name].spread, beta=0.5)
    recipe = dataclasses.replace(RECIPES[name], spread=spread)
    start_of_run = dataclasses.replace(tiny_policy(), params=weights(1), config=CONFIG)
    step = TrainStep(CONFIG, recipe, optax.sgd(RATE, momentum=0.9), make_mesh())
    (producer,) = make_producers(Sources(recipe, FitConfig(), start_of_run, step, ROWS, 1))
    made, _ = producer.produce(weights(), producer.start(weights()), RECORDED, KEY)
    ways = {"prime": {"reference": weights(1)}, "istar": {"reference": None, "objective": trajectory_dpo, "update_first": False}}
    expected, _ = produced(start(), beta=0.5, **ways[name])
    np.testing.assert_array_equal(made.prm_logp, expected.prm_logp)
    np.testing.assert_array_equal(made.prm_ref_logp, expected.prm_ref_logp)
    assert np.array_equal(made.prm_logp, made.prm_ref_logp) == (name == "istar")  # which starts as a copy of the policy
