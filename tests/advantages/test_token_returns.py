"""GAE, λ-returns, V-trace and REINFORCE++ over tokens against loops in float64."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from lightningrl import advantages, credit
from lightningrl.advantages import token_returns as spreads
from lightningrl.segments import EPSILON
from lightningrl.table import Evidence
from tests.advantages.token_sequences import poison_tokens, shuffled, token_evidence, token_sequences
from tests.batches import EDGES, SIZE, batches, make_rollout, make_table, make_tokens, poison, poison_table

GAMMA, LAMBDA, BETA = 0.5, 0.25, 0.125


def backwards(sequence, value, error, factor):
    """xₖ = error(k, Vₖ₊₁, xₖ₊₁) for k from the end; the oracle of every recursion here."""
    result, following, after = {}, 0.0, 0.0
    for token in reversed(sequence):
        after = error(token, following) + factor(token) * after
        following = value[token.edge]
        result[token.edge] = after
    return result


def gae_loop(sequence, tokens, evidence):
    v = evidence.token_value.astype(np.float64)
    return backwards(sequence, v, lambda t, nxt: t.reward + GAMMA * nxt - v[t.edge], lambda t: GAMMA * LAMBDA)


def lambda_loop(sequence, tokens, evidence):
    v = evidence.token_value.astype(np.float64)
    return backwards(sequence, v, lambda t, nxt: t.reward + GAMMA * (1 - LAMBDA) * nxt, lambda t: GAMMA * LAMBDA)


def v_trace_parts(sequence, tokens, evidence):
    v = evidence.token_value.astype(np.float64)
    rho = np.exp(tokens.old_logp.astype(np.float64) - tokens.behaviour_logp)
    errors = backwards(
        sequence,
        v,
        lambda t, nxt: min(1.5, rho[t.edge]) * (t.reward + GAMMA * nxt - v[t.edge]),
        lambda t: GAMMA * LAMBDA * min(0.75, rho[t.edge]),
    )
    return v, rho, errors


def v_trace_loop(sequence, tokens, evidence):
    v, rho, errors = v_trace_parts(sequence, tokens, evidence)
    following = [v[t.edge] + LAMBDA * errors[t.edge] for t in sequence[1:]] + [0.0]
    return {t.edge: min(1.25, rho[t.edge]) * (t.reward + GAMMA * q - v[t.edge]) for t, q in zip(sequence, following, strict=False)}


def v_trace_target_loop(sequence, tokens, evidence):
    v, _, errors = v_trace_parts(sequence, tokens, evidence)
    return {t.edge: v[t.edge] + errors[t.edge] for t in sequence}


def reinforce_loop(sequence, tokens, evidence):
    kl = tokens.old_logp.astype(np.float64) - tokens.ref_logp
    return backwards(sequence, kl, lambda t, _: t.reward - BETA * kl[t.edge], lambda t: GAMMA)


def whitened(values):
    x = np.array(list(values.values()))
    if len(x) == 0 or np.ptp(x) < 1e-5:
        return dict.fromkeys(values, 0.0)
    return {e: (v - x.mean()) / (x.std(ddof=1) + EPSILON) for e, v in values.items()}


SPREADS = {
    "token_gae": (functools.partial(spreads.token_gae, gamma=GAMMA, lambda_=LAMBDA), gae_loop),
    "token_lambda_return": (functools.partial(spreads.token_lambda_return, gamma=GAMMA, lambda_=LAMBDA), lambda_loop),
    "v_trace": (
        functools.partial(spreads.v_trace, gamma=GAMMA, lambda_=LAMBDA, clip_rho=1.5, clip_c=0.75, clip_pg_rho=1.25),
        v_trace_loop,
    ),
    "v_trace_target": (
        functools.partial(spreads.v_trace_target, gamma=GAMMA, lambda_=LAMBDA, clip_rho=1.5, clip_c=0.75),
        v_trace_target_loop,
    ),
    "reinforce_plus_plus": (functools.partial(spreads.reinforce_plus_plus, gamma=GAMMA, kl_coef=BETA), reinforce_loop),
}
NOTHING = np.full(SIZE, np.nan, np.float32)  # none of these reads an advantage
JITTED = {name: jax.jit(f) for name, (f, _) in SPREADS.items()}
NAMES = pytest.mark.parametrize("name", list(SPREADS))


@pytest.mark.slow
@NAMES
@settings(max_examples=12, deadline=None)
@given(rollouts=batches(integers=True))
def test_is_that_of_a_loop(name, rollouts):
    table = make_table(*rollouts, size=SIZE)
    tokens, _ = shuffled(make_tokens(table, EDGES))
    evidence = token_evidence(tokens)
    per_edge = {}
    for sequence in token_sequences(table, tokens).values():
        per_edge |= SPREADS[name][1](sequence, tokens, evidence)
    if name == "reinforce_plus_plus":
        per_edge = whitened(per_edge)
    expected = np.array([per_edge.get(e, 0.0) for e in range(EDGES)])
    actual = JITTED[name](table, tokens, NOTHING, evidence)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert (np.asarray(actual)[~tokens.mask] == 0).all()


def ragged():
    """Calls that are not trained at the start, in the middle and at the end, where the outcome is paid."""
    return make_table(
        make_rollout("a", 1.0, [0.5, 0.0, 0.25, 2.0], lengths=[2, 1, 3, 1], trainable=[True, False, True, False]),
        make_rollout("a", 0.0, [1.0, 0.5], lengths=[2, 3], trainable=[False, True]),
        make_rollout("b", 4.0, [0.5], lengths=[2], trainable=[False]),
        size=SIZE,
    )


@pytest.mark.slow
@NAMES
def test_packing_does_not_matter(name):
    """The edges in another order, among more padding, or cut into micro-batches: the same number for the same token."""
    table = ragged()
    tokens = make_tokens(table, 24)
    evidence = token_evidence(tokens)
    plain = np.asarray(SPREADS[name][0](table, tokens, NOTHING, evidence))
    moved, order = shuffled(tokens)
    there = jax.tree.map(lambda x: x[order], evidence)
    np.testing.assert_allclose(SPREADS[name][0](table, moved, NOTHING, there), plain[order], rtol=1e-6, atol=1e-7)
    cut = lambda tree: jax.tree.map(lambda x: x.reshape(4, 6), tree)  # noqa: E731
    np.testing.assert_allclose(SPREADS[name][0](table, cut(tokens), NOTHING, cut(evidence)), plain.reshape(4, 6), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@NAMES
def test_nan_without_a_loss_reaches_nothing(name):
    table = ragged()
    tokens = make_tokens(table, EDGES)
    evidence = token_evidence(tokens)
    spoiled = JITTED[name](poison_table(table), *(lambda t, e: (t, NOTHING, e))(*poison_tokens(tokens, evidence)))
    np.testing.assert_array_equal(spoiled, JITTED[name](table, tokens, NOTHING, evidence))

    def total(outcome, tokens, evidence):
        return jnp.sum(SPREADS[name][0](dataclasses.replace(poison_table(table), outcome=outcome), tokens, NOTHING, evidence) ** 2)

    gradient = jax.jit(jax.grad(total))(np.where(table.valid[:, None], table.outcome, np.nan), *poison_tokens(tokens, evidence))
    assert np.isfinite(gradient).all()


class ByHandTest(chex.TestCase):
    """Two calls of two tokens, the call between them not trained; rewards 1, 2, 4, outcome 8."""

    table = make_table(make_rollout("a", 8.0, [1.0, 2.0, 4.0], lengths=[2, 1, 2], trainable=[True, False, True]))
    tokens = make_tokens(table)
    advantage = np.zeros(3, np.float32)
    evidence = Evidence(token_value=np.array([2, 4, 99, 8, 16], np.float32))

    @chex.variants(with_jit=True, without_jit=True)
    def test_by_hand(self):
        gae = functools.partial(spreads.token_gae, gamma=0.5, lambda_=0.5)
        run = lambda f: self.variant(f)(self.table, self.tokens, self.advantage, self.evidence).tolist()  # noqa: E731
        # errors 0, 3 + 4 - 4, 0, 12 - 16; γλ = ¼
        self.assertEqual(run(gae), [0.6875, 2.75, 0, -1, -4])
        returns = functools.partial(spreads.token_lambda_return, gamma=1.0, lambda_=1.0)
        self.assertEqual(run(returns), [15, 15, 0, 12, 12])
        self.assertEqual(run(functools.partial(spreads.token_gae, gamma=1.0, lambda_=1.0)), [13, 11, 0, 4, -4])


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(rollouts=batches(integers=True))
def test_three_ways_to_the_same_number(rollouts):
    """GAE + V is the λ-return; V-trace with ratios of 1 and λ = 1 is GAE."""
    table = make_table(*rollouts, size=SIZE)
    tokens = make_tokens(table, EDGES)
    evidence = token_evidence(tokens)
    gae = JITTED["token_gae"](table, tokens, NOTHING, evidence)
    value = np.where(tokens.mask, evidence.token_value, 0)
    np.testing.assert_allclose(gae + value, JITTED["token_lambda_return"](table, tokens, NOTHING, evidence), rtol=1e-5, atol=1e-5)
    on_policy = V_TRACE_OF_ONES(table, tokens, NOTHING, evidence, rho=np.ones(EDGES, np.float32))
    np.testing.assert_allclose(on_policy, GAE_OF_ONES(table, tokens, NOTHING, evidence), rtol=1e-5, atol=1e-5)


V_TRACE_OF_ONES = jax.jit(functools.partial(spreads.v_trace, gamma=GAMMA, lambda_=1.0))
GAE_OF_ONES = jax.jit(functools.partial(spreads.token_gae, gamma=GAMMA, lambda_=1.0))


@pytest.mark.slow
def test_a_batch_without_a_loss_is_zero():
    table = make_table(make_rollout("a", 1.0, [0.0, 0.0], trainable=[False, False]))
    tokens = make_tokens(table, 4)
    for spread, _ in SPREADS.values():
        assert spread(table, tokens, np.zeros(2, np.float32), token_evidence(tokens)).tolist() == [0.0] * 4


@pytest.mark.slow
def test_reinforce_plus_plus_of_equal_returns_is_exactly_zero():
    table = make_table(*(make_rollout("a", 0.1, lengths=[n]) for n in (1, 2, 4)))
    assert spreads.reinforce_plus_plus(table, make_tokens(table), np.zeros(3, np.float32), Evidence()).tolist() == [0.0] * 7


BASELINE = jax.jit(spreads.reinforce_plus_plus_baseline, static_argnames=("degenerate", "eps"))


@pytest.mark.slow
@pytest.mark.parametrize("degenerate", ["zero", "formula"])
@settings(max_examples=12, deadline=None)
@given(rollouts=batches(integers=True))
def test_the_baseline_form_is_that_of_a_loop(degenerate, rollouts):
    table = make_table(*rollouts, size=SIZE)
    tokens = make_tokens(table, EDGES)
    advantage = np.asarray(advantages.group_norm(table, credit.identical(table, Evidence()), Evidence(), scale="none"))
    sequences = [t for s in token_sequences(table, tokens).values() for t in s]
    per_edge = whitened({t.edge: float(advantage[t.transition]) for t in sequences})
    silent = {t.group for t in sequences if not np.any(advantage[np.logical_and(table.group == t.group, table.valid)])}
    if degenerate == "zero":
        per_edge |= {t.edge: 0.0 for t in sequences if t.group in silent}
    actual = BASELINE(table, poison(tokens, tokens.mask), np.where(table.valid, advantage, np.nan), Evidence(), degenerate=degenerate)
    np.testing.assert_allclose(actual, [per_edge.get(e, 0.0) for e in range(EDGES)], rtol=1e-5, atol=1e-6)


def test_whiten_tokens_by_hand():
    values, mask = np.array([1, 3, np.nan, 5], np.float32), np.array([True, True, False, True])
    np.testing.assert_allclose(spreads.whiten_tokens(values, mask, eps=0.0), [-1, 0, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(spreads.whiten_tokens(values, mask, eps=2.0), [-0.5, 0, 0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(spreads.whiten_tokens(values, mask, ddof=0.0, eps=0.0)[3], np.sqrt(1.5), rtol=1e-6)
    assert spreads.whiten_tokens(np.full(7, 0.1, np.float32), np.ones(7, bool), eps=0.0).tolist() == [0.0] * 7


@pytest.mark.slow
def test_the_critic_gets_no_gradient_and_evidence_is_asked_for():
    table, tokens, advantage = ByHandTest.table, ByHandTest.tokens, ByHandTest.advantage
    for name in ("token_gae", "token_lambda_return", "v_trace", "v_trace_target"):
        spread = SPREADS[name][0]
        gradient = jax.grad(lambda v, f=spread: jnp.sum(f(table, tokens, advantage, Evidence(token_value=v))))(jnp.ones(5))
        assert gradient.tolist() == [0.0] * 5
        with pytest.raises(ValueError, match=f"{name} needs evidence.token_value"):
            spread(table, tokens, advantage, Evidence())
    with pytest.raises(ValueError, match="no degenerate 'raw'"):
        spreads.reinforce_plus_plus_baseline(table, tokens, advantage, Evidence(), degenerate="raw")
