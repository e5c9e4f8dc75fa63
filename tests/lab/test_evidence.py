"""What producers say: the exact ones against sums over every rollout, the others against what they would say of very much data."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningrl import advantages, credit
from lightningrl.lab import truth
from lightningrl.lab.difficulties import PROCESSES
from lightningrl.lab.evidence import PRODUCERS, Memory, no_memory, remember
from lightningrl.lab.exact import BETA, EXACT
from lightningrl.lab.process import ACTIONS, RESPONSE, STATES, TURNS
from lightningrl.lab.sampling import Plan
from lightningrl.lab.update import make_batch, make_evidence
from lightningrl.table import Evidence
from tests.lab.enumeration import every_rollout, means, policy

pytestmark = pytest.mark.slow

LOGITS = np.random.default_rng(7).normal(size=(STATES, ACTIONS)).astype(np.float32)
REFERENCE = np.random.default_rng(8).normal(size=(STATES, ACTIONS)).astype(np.float32)
PLAN = Plan("groups", groups=128, group_size=8)  # one for all tests: what is compiled for one serves the others


@functools.lru_cache
def batch_of(name: str):
    make = jax.jit(make_batch, static_argnames="plan")
    return make(PROCESSES[name](), LOGITS, REFERENCE, jax.random.key(1), jnp.float32(PLAN.groups), plan=PLAN)


@jax.jit
def _every_producer(process, memory, batch):
    """All at once, which is compiled quicker than one by one."""
    key = jax.random.key(2)
    make = lambda need: make_evidence(process, LOGITS, REFERENCE, memory, batch, key, needs=(need,), plan=PLAN)  # noqa: E731
    return {need: make(need) for need in {**PRODUCERS, **EXACT}}


@functools.lru_cache
def _made(name: str, taught: bool):
    memory = memory_of(name) if taught else no_memory()
    return jax.tree.map(np.asarray, _every_producer(PROCESSES[name](), memory, batch_of(name)))


def evidence_of(name: str, *needs: str, taught: bool = False):
    """What producers say, and the steps that it took them."""
    found = [_made(name, taught)[need] for need in needs]
    fields = [field.name for field in dataclasses.fields(Evidence)]
    made = {f: getattr(evidence, f) for evidence, _ in found for f in fields if getattr(evidence, f) is not None}
    return Evidence(**made), float(sum(steps for _, steps in found))


@functools.lru_cache
def memory_of(name: str) -> Memory:
    batch = batch_of(name)
    return jax.jit(remember)(no_memory(), batch.table, batch.rollouts, 0.0)


def values_of(name: str, values=truth.policy_values):
    """V before and Q of each call of the batch, f32[N]."""
    found, r = jax.tree.map(np.asarray, (jax.jit(values)(PROCESSES[name](), LOGITS), batch_of(name).rollouts))
    turns = np.arange(TURNS)
    return tuple(np.where(r.made, x, 0).ravel() for x in (found.v[turns, r.state], found.q[turns, r.state, r.action]))


def valid_of(name: str) -> np.ndarray:
    return np.asarray(batch_of(name).table.valid)


def test_exact_values_are_those_of_the_truth():
    name = "mistake_and_recovery"
    v, q = values_of(name)
    made, steps = evidence_of(name, "exact_value", "exact_token_value", "exact_branch_value", "exact_potential", "exact_predicted_return")
    assert steps == 0
    np.testing.assert_allclose(made.value, v, rtol=1e-6)
    tokens = made.token_value.reshape(-1, RESPONSE)
    np.testing.assert_allclose(tokens, np.stack([v, q, q], 1), rtol=1e-6)
    np.testing.assert_allclose(made.branch_value[:, 0], v, rtol=1e-6)
    np.testing.assert_allclose(made.potential, made.branch_value, rtol=1e-6)
    np.testing.assert_allclose(made.predicted_return, values_of(name, truth.outcome_values)[1], rtol=1e-6)


@pytest.mark.parametrize("name", ["delayed_reward", "key_used_late", "mistake_and_recovery"])
def test_vineppo_with_exact_values_is_the_true_advantage_where_tools_are_certain(name):
    made, _ = evidence_of(name, "exact_branch_value")
    found = np.asarray(jax.jit(credit.vineppo)(batch_of(name).table, made).value)
    np.testing.assert_allclose(found, batch_of(name).true_advantage, atol=1e-5)


def test_hindsight_by_bayes_rule():
    """h(a | s, Z) from all rollouts; and its credit, (1 - π/h) Z, has the mean Q - V over them (arXiv 1912.02503, theorem 2)."""
    name, pi = "stochastic_tools", policy(LOGITS)
    ways = every_rollout(PROCESSES[name](), pi)
    made, _ = evidence_of(name, "exact_hindsight")
    r = jax.tree.map(np.asarray, batch_of(name).rollouts)
    to_go = np.asarray(jax.jit(credit.reward_to_go)(batch_of(name).table, Evidence()).value).reshape(r.made.shape)
    paid = np.round(ways.to_go, 4)
    of_z = {z: means(ways, paid == z) for z in np.unique(paid[ways.made])}
    likely = {z: share * chance for z, (share, chance) in of_z.items()}  # P(s, a, Z = z) at each turn
    for i, turn in np.argwhere(r.made)[::7]:
        of = likely[np.round(float(to_go[i, turn]), 4)][turn, r.state[i, turn]]
        h = np.exp(made.hindsight_logp.reshape(r.made.shape)[i, turn])
        np.testing.assert_allclose(h, of[r.action[i, turn]] / of.sum(), rtol=2e-4)

    q, chance = means(ways, ways.to_go)
    mean, everywhere = np.zeros_like(q), chance.any(-1, keepdims=True)
    for z, (share, _) in of_z.items():
        h = likely[z] / np.maximum(likely[z].sum(-1, keepdims=True), 1e-300)
        mean += share * np.where(h > 0, (1 - pi / np.where(h > 0, h, 1.0)) * z, 0.0)
        everywhere = everywhere & ((z == 0) | (share > 0).all(-1, keepdims=True) | ~(share > 0).any(-1, keepdims=True))
    # The theorem needs every return to be possible after every action of the state, but for 0, which is no credit.
    assert everywhere.any()
    v = (pi * q).sum(-1, keepdims=True)
    np.testing.assert_allclose(np.where(everywhere, mean, 0), np.where(everywhere, q - v, 0), atol=1e-9)


def test_exact_coalitions():
    """E[R | these calls were made], from all rollouts."""
    name = "distractor_turn"
    ways = every_rollout(PROCESSES[name](), policy(LOGITS))
    made, _ = evidence_of(name, "exact_coalition")
    r = jax.tree.map(np.asarray, batch_of(name).rollouts)
    for rollout, subset in ((0, 0), (1, 0b0101), (2, 0b1010), (3, 0b1111)):
        turns = [t for t in range(4) if subset >> t & 1]
        alike = ((ways.state == r.state[rollout]) & (ways.action == r.action[rollout]))[:, turns].all(1)
        mean = ways.chance[alike] @ ways.outcome[alike] / ways.chance[alike].sum()
        np.testing.assert_allclose(made.coalition[rollout, subset], mean, rtol=1e-5)


def test_information_gain_is_of_the_chance_of_success():
    name = "stochastic_tools"
    made, _ = evidence_of(name, "exact_answer_logp")
    valid = valid_of(name)
    np.testing.assert_allclose(np.exp(made.answer_logp[valid, 0]), values_of(name, truth.outcome_values)[0][valid], rtol=1e-4, atol=2e-6)
    assert (made.answer_logp <= 0).all()


@pytest.mark.parametrize(("need", "logits"), [("exact_implicit_reward", REFERENCE), ("exact_implicit_reward_of_policy", LOGITS)])
def test_implicit_rewards_sum_to_the_return_less_the_soft_value_of_the_start(need, logits):
    """Where tools are certain: Σ β log π_φ/π_ref = R - β log E[exp(R/β)], the expectation over all rollouts of the reference."""
    name = "mistake_and_recovery"
    process = PROCESSES[name]()
    made, _ = evidence_of(name, need)
    r = jax.tree.map(np.asarray, batch_of(name).rollouts)
    total = BETA * np.where(r.made[..., None], (made.prm_logp - made.prm_ref_logp).reshape(*r.made.shape, RESPONSE), 0).sum((1, 2))
    paid = np.where(r.made, r.reward, 0).sum(1) + r.outcome
    ways = every_rollout(process, policy(logits))
    soft = BETA * np.log(ways.chance @ np.exp(ways.paid / BETA))
    np.testing.assert_allclose(total, paid - soft, atol=1e-4)


def test_a_critic_converges_to_the_mean_return_of_a_state():
    """Of states that are met at one turn only, which is V."""
    name = "delayed_reward"
    made, steps = evidence_of(name, "value", "token_value", taught=True)
    v, q = values_of(name)
    assert steps == 0
    valid = valid_of(name)
    np.testing.assert_allclose(made.value[valid], v[valid], atol=0.06)
    np.testing.assert_allclose(made.token_value.reshape(-1, RESPONSE)[valid, 1], q[valid], atol=0.1)
    untaught, _ = evidence_of(name, "value", "token_value", "role_baseline")
    assert not untaught.value.any() and not untaught.token_value.any() and not untaught.role_baseline.any()


def test_memory_fades():
    name = "delayed_reward"
    batch = batch_of(name)
    once = jax.jit(remember)(no_memory(), batch.table, batch.rollouts, 0.5)
    twice = jax.jit(remember)(once, batch.table, batch.rollouts, 0.5)
    np.testing.assert_allclose(twice.count, 1.5 * np.asarray(once.count), rtol=1e-6)
    np.testing.assert_allclose(twice.total, 1.5 * np.asarray(once.total), rtol=1e-5)
    np.testing.assert_allclose(once.role_baseline[0], np.asarray(batch.rollouts.outcome).mean(), rtol=1e-5)


def test_return_models_learn_the_mean_outcome_of_a_call():
    name = "delayed_reward"
    r = batch_of(name).rollouts
    made, _ = evidence_of(name, "predicted_return")
    exact, _ = evidence_of(name, "exact_predicted_return")
    counts = np.zeros((STATES, ACTIONS))
    np.add.at(counts, (np.asarray(r.state).ravel(), np.asarray(r.action).ravel()), np.asarray(r.made).ravel())
    often = np.asarray(r.made).ravel() & (counts[np.asarray(r.state), np.asarray(r.action)].ravel() > 100)
    assert often.mean() > 0.3
    np.testing.assert_allclose(made.predicted_return[often], exact.predicted_return[often], atol=0.08)


def test_contributions_sum_to_the_outcome_where_outcomes_are_sums():
    name = "delayed_reward"
    made, _ = evidence_of(name, "contributions")
    r = batch_of(name).rollouts
    np.testing.assert_allclose(made.predicted_return.reshape(-1, TURNS)[:, 3], r.outcome, atol=0.05)


def test_coalitions_are_means_of_the_rollouts_that_made_the_calls():
    name = "distractor_turn"
    made, _ = evidence_of(name, "coalition")
    r = jax.tree.map(np.asarray, batch_of(name).rollouts)
    calls = [set(zip(s[m].tolist(), a[m].tolist(), strict=True)) for s, a, m in zip(r.state, r.action, r.made, strict=True)]
    for rollout in (0, 5, 17):
        for subset in range(2**4):
            wanted = {(int(r.state[rollout, t]), int(r.action[rollout, t])) for t in range(4) if subset >> t & 1}
            mean = np.mean([outcome for has, outcome in zip(calls, r.outcome, strict=True) if wanted <= has])
            np.testing.assert_allclose(made.coalition[rollout, subset], mean, rtol=1e-5)


def test_hindsight_by_counting_comes_near_bayes_rule():
    name = "key_used_late"
    made, _ = evidence_of(name, "hindsight")
    exact, _ = evidence_of(name, "exact_hindsight")
    difference = np.abs(np.exp(made.hindsight_logp) - np.exp(exact.hindsight_logp))[np.asarray(batch_of(name).table.valid)]
    assert difference.mean() < 0.03 and np.quantile(difference, 0.99) < 0.15
    np.testing.assert_allclose(made.response_logp, exact.response_logp, rtol=1e-6)


def test_the_judge_is_wrong_in_a_fifth_of_all_calls_and_not_by_the_batchs_own_chances():
    name = "delayed_reward"
    made, _ = evidence_of(name, "judge")
    batch = batch_of(name)
    valid = np.asarray(batch.table.valid)
    right = np.asarray(batch.rollouts.action).ravel()[valid] == 0
    wrong = (made.judge[valid] > 0) != right
    assert abs(wrong.mean() - 0.2) < 0.02
    for action in range(ACTIONS):
        of_action = np.asarray(batch.rollouts.action).ravel()[valid] == action
        assert abs(wrong[of_action].mean() - 0.2) < 0.04


def test_branch_values_are_unbiased_and_counted():
    name = "mistake_and_recovery"
    made, steps = evidence_of(name, "branch_value")
    exact, _ = evidence_of(name, "exact_branch_value")
    valid = np.asarray(batch_of(name).table.valid)
    error = (made.branch_value - exact.branch_value)[valid, 0]
    assert abs(error.mean()) < 5 * error.std() / np.sqrt(valid.sum())
    assert steps >= PLAN.restarts * valid.sum()
    # Were the restarts' chances those of the batch, a call that is about to succeed would look as if its state had been good.
    assert abs(np.corrcoef(error, np.asarray(batch_of(name).true_advantage)[valid])[0, 1]) < 0.05


def test_greedy_and_sum_pi2():
    name = "stochastic_tools"
    made, steps = evidence_of(name, "greedy_reward", "sum_pi2")
    table = jax.tree.map(np.asarray, batch_of(name).table)
    assert PLAN.groups <= steps <= PLAN.groups * TURNS
    assert set(np.unique(made.greedy_reward[table.valid])) <= {0.0, 1.0}
    for group in range(PLAN.groups):
        assert len(np.unique(made.greedy_reward[table.valid & (table.group == group)])) == 1
    state = np.asarray(batch_of(name).rollouts.state).ravel()
    np.testing.assert_allclose(made.sum_pi2.reshape(-1, RESPONSE)[:, 0], (policy(LOGITS) ** 2).sum(-1)[state], rtol=1e-5)
    assert (made.sum_pi2.reshape(-1, RESPONSE)[:, 1:] == 1).all()


def test_everything_is_finite_also_at_padding():
    for need, (evidence, steps) in _made("unequal_lengths", True).items():
        filled = jax.tree.leaves(evidence)
        assert filled and all(np.isfinite(x).all() for x in filled), need
        assert (steps > 0) == (need in ("branch_value", "greedy_reward"))


def test_prime_with_a_perfect_model_ranks_calls_by_their_advantage():
    """One step of the maths from model to credit: the tokens' advantages go with the true ones, within a state."""
    name = "delayed_reward"
    batch = batch_of(name)
    made, _ = evidence_of(name, "exact_implicit_reward_of_policy")
    nothing = jnp.zeros(batch.table.valid.shape)
    spread = np.asarray(jax.jit(advantages.istar)(batch.table, batch.tokens, nothing, made)).reshape(-1, RESPONSE)[:, 0]
    valid = valid_of(name)
    assert np.corrcoef(spread[valid], np.asarray(batch.true_advantage)[valid])[0, 1] > 0.6


def test_no_producer_calls_lapack():
    """Batched calls of it wait for the threads of the pool that they run in: two at once, from two pairs on two cores, never end."""
    text = _every_producer.lower(PROCESSES["delayed_reward"](), no_memory(), batch_of("delayed_reward")).as_text()
    assert "while" in text and "lapack" not in text
