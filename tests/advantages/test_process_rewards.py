"""PRIME and iStar against loops over rollouts in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from lightningrl.advantages.process_rewards import istar, prime
from lightningrl.advantages.token_returns import whiten_tokens
from lightningrl.segments import EPSILON
from lightningrl.table import Evidence
from tests.advantages.token_sequences import poison_tokens, shuffled, token_evidence, token_sequences
from tests.batches import EDGES, SIZE, batches, make_rollout, make_table, make_tokens, poison_table

BETA, GAMMA, COEF = 0.5, 0.75, 2.0
SPREADS = {
    "prime": functools.partial(prime, beta=BETA, gamma=GAMMA),
    "istar": functools.partial(istar, beta=BETA, coef=COEF),
    "istar, transitions": functools.partial(istar, beta=BETA, coef=COEF, count="transitions", ddof=0.0),
}
JITTED = {name: jax.jit(f) for name, f in SPREADS.items()}
NAMES = pytest.mark.parametrize("name", list(SPREADS))
ADVANTAGE = np.linspace(-1, 1, SIZE).astype(np.float32)


def prime_loop(sequences, reward):
    result = {}
    mean = {i: np.mean([reward[t.edge] for t in s]) for i, s in sequences.items() if s}
    for i, s in sequences.items():
        others = [mean[j] for j, other in sequences.items() if other and s and j != i and other[0].group == s[0].group]
        after = 0.0
        for token in reversed(s):
            after = (reward[token.edge] - np.mean(others) + GAMMA * after) if others else 0.0
            result[token.edge] = after + ADVANTAGE[token.transition]
    return result


def istar_loop(sequences, reward, count):
    turns: dict[int, list] = {}
    for token in (t for s in sequences.values() for t in s):
        turns.setdefault(token.transition, []).append(token)
    steps = {n: sum(reward[t.edge] for t in turn) for n, turn in turns.items()}
    result = {}
    for n, turn in turns.items():
        mine = [m for m, other in turns.items() if other[0].group == turn[0].group]
        of_rollout = {m: sum(turns[o][0].rollout == turns[m][0].rollout for o in mine) for m in mine}
        weight = {m: 1.0 if count == "transitions" else 1.0 / of_rollout[m] for m in mine}
        total = sum(weight.values())
        relative = 0.0
        if len({turns[m][0].rollout for m in mine}) > 1:
            mean = sum(weight[m] * steps[m] for m in mine) / total
            variance = sum(weight[m] * (steps[m] - mean) ** 2 for m in mine) / (total - (0 if count == "transitions" else 1))
            relative = (steps[n] - mean) / (np.sqrt(variance) + EPSILON)
        result |= {t.edge: ADVANTAGE[n] + COEF * relative for t in turn}
    return result


@pytest.mark.slow
@NAMES
@settings(max_examples=12, deadline=None)
@given(rollouts=batches(integers=True))
def test_is_that_of_a_loop(name, rollouts):
    table = make_table(*rollouts, size=SIZE)
    tokens, _ = shuffled(make_tokens(table, EDGES))
    evidence = token_evidence(tokens)
    reward = BETA * (evidence.prm_logp.astype(np.float64) - evidence.prm_ref_logp)
    sequences = token_sequences(table, tokens)
    result = (
        prime_loop(sequences, reward) if name == "prime" else istar_loop(sequences, reward, "transitions" if "," in name else "rollouts")
    )
    actual = JITTED[name](table, tokens, ADVANTAGE, evidence)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, [result.get(e, 0.0) for e in range(EDGES)], rtol=1e-5, atol=1e-6)


def ragged():
    return make_table(
        make_rollout("a", 1.0, [0.5, 0.0, 0.25], lengths=[2, 1, 3], trainable=[True, False, True]),
        make_rollout("a", 0.0, [0.0, 0.5], lengths=[3, 2]),
        make_rollout("a", 0.0, [0.0], lengths=[3], trainable=[False]),
        make_rollout("b", 2.0, [0.0, 0.0], lengths=[2, 1]),
        size=SIZE,
    )


@pytest.mark.slow
@NAMES
def test_nan_without_a_loss_reaches_nothing(name):
    table = ragged()
    tokens = make_tokens(table, EDGES)
    evidence = token_evidence(tokens)
    spoiled_tokens, spoiled = poison_tokens(tokens, evidence)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(advantage):
        result = SPREADS[name](poison_table(table), spoiled_tokens, advantage, spoiled)
        return jnp.sum(result**2), result

    (_, result), gradient = jax.jit(total)(np.where(table.valid, ADVANTAGE, np.nan).astype(np.float32))
    np.testing.assert_allclose(result, JITTED[name](table, tokens, ADVANTAGE, evidence), rtol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.slow
@NAMES
def test_packing_does_not_matter(name):
    table = ragged()
    tokens = make_tokens(table, 18)
    evidence = token_evidence(tokens)
    plain = np.asarray(SPREADS[name](table, tokens, ADVANTAGE, evidence))
    cut = lambda tree: jax.tree.map(lambda x: x.reshape(3, 6), tree)  # noqa: E731
    np.testing.assert_allclose(SPREADS[name](table, cut(tokens), ADVANTAGE, cut(evidence)), plain.reshape(3, 6), rtol=1e-6)


@pytest.mark.slow
@NAMES
def test_without_a_comparison_only_the_outcome_speaks(name):
    """A group of one, and a group in which every token and step earned the same: the advantage, to the bit."""
    table = make_table(
        *(make_rollout("a", 0.0, [0.0] * n) for n in (1, 3, 7)), make_rollout("b", 0.0, [0.0, 0.0], lengths=[2, 1]), size=SIZE
    )
    tokens = make_tokens(table)
    same = np.where(np.asarray(table.group)[tokens.transition] == 0, np.float32(0.1), np.arange(len(tokens.mask), dtype=np.float32))
    evidence = Evidence(prm_logp=same, prm_ref_logp=np.zeros_like(same))
    assert JITTED[name](table, tokens, ADVANTAGE, evidence).tolist() == ADVANTAGE[tokens.transition].tolist()


@pytest.mark.slow
def test_by_hand():
    table = make_table(make_rollout("a", 0.0, lengths=[2]), make_rollout("a", 0.0, lengths=[1]))
    tokens = make_tokens(table)
    evidence = Evidence(prm_logp=np.array([2, 4, 1], np.float32), prm_ref_logp=np.zeros(3, np.float32))
    zero = np.zeros(2, np.float32)
    assert prime(table, tokens, zero, evidence, beta=1.0).tolist() == [1 + 3, 3, 1 - 3]
    np.testing.assert_allclose(istar(table, tokens, zero, evidence, beta=1.0, eps=0.0), np.array([1, 1, -1]) / np.sqrt(2), rtol=1e-6)
    far = Evidence(prm_logp=np.array([1000, 0, 0], np.float32), prm_ref_logp=np.zeros(3, np.float32))
    assert prime(table, tokens, zero, far, beta=1.0).tolist() == [20, 0, -10]


@pytest.mark.slow
def test_prime_whitens_last():
    table = ragged()
    tokens = make_tokens(table)
    evidence = token_evidence(tokens)
    plain = prime(table, tokens, ADVANTAGE, evidence)
    assert prime(table, tokens, ADVANTAGE, evidence, whitened=True).tolist() == whiten_tokens(plain, tokens.mask).tolist()


@pytest.mark.slow
def test_what_is_missing_or_unknown_is_said():
    table = ragged()
    tokens = make_tokens(table)
    some = np.zeros(len(tokens.mask), np.float32)
    for spread in (prime, istar):
        with pytest.raises(ValueError, match=f"{spread.__name__} needs evidence.prm_logp"):
            spread(table, tokens, ADVANTAGE, Evidence())
        with pytest.raises(ValueError, match=f"{spread.__name__} needs evidence.prm_ref_logp"):
            spread(table, tokens, ADVANTAGE, Evidence(prm_logp=some))
    with pytest.raises(ValueError, match="istar cannot count 'tokens'"):
        istar(table, tokens, ADVANTAGE, token_evidence(tokens), count="tokens")
