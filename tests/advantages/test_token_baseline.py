"""The optimal token baseline against a loop over positions in float64."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from lightningrl.advantages.token_baseline import multi_turn_optimal_token_baseline, optimal_token_baseline
from lightningrl.table import Evidence
from tests.advantages.token_sequences import poison_tokens, shuffled, token_evidence, token_sequences
from tests.batches import EDGES, SIZE, batches, make_rollout, make_table, make_tokens, poison_table

FORMS = {"call": optimal_token_baseline, "rollout": multi_turn_optimal_token_baseline}
JITTED = {name: jax.jit(f, static_argnames=("singleton", "tail")) for name, f in FORMS.items()}
EVERY_FORM = pytest.mark.parametrize("form", list(FORMS))
NOTHING = np.full(SIZE, np.nan, np.float32)


def loop(table, tokens, evidence, form, singleton, tail, rho):
    old, squares = tokens.old_logp.astype(np.float64), evidence.sum_pi2.astype(np.float64)
    cells: dict[tuple, list] = {}
    for rollout, sequence in token_sequences(table, tokens).items():
        to_go = {t.edge: sum(s.reward for s in sequence[i:]) for i, t in enumerate(sequence)}
        energy, position, call = 0.0, 0, None
        for token in sequence:
            if form == "call" and token.transition != call:
                energy, position, call = 0.0, 0, token.transition
            energy += (1 - 2 * np.exp(old[token.edge]) + squares[token.edge]) * rho[token.edge] ** 2
            turn = token.turn if form == "call" else 0
            cells.setdefault((token.group, turn, position), []).append((rollout, token.edge, to_go[token.edge], energy))
            position += 1
    rollouts_of = {
        g: {r for r in range(len(table.valid)) if np.any((table.group == g) & (table.rollout == r) & table.valid)} for g, *_ in cells
    }
    result = {}
    for (group, *_), members in cells.items():
        returns = {g for _, _, g, _ in members}
        for _, edge, g, _ in members:
            if len(rollouts_of[group]) == 1:
                result[edge] = g if singleton == "raw" else 0.0
            elif len(members) == 1:
                result[edge] = g if tail == "raw" else 0.0
            elif len(returns) == 1:
                result[edge] = 0.0
            else:
                result[edge] = g - sum(g * w for *_, g, w in members) / sum(w for *_, w in members)
    return np.array([result.get(e, 0.0) for e in range(len(tokens.mask))])


@pytest.mark.slow
@EVERY_FORM
@settings(max_examples=12, deadline=None)
@given(rollouts=batches(integers=True))
def test_is_that_of_a_loop(form, rollouts):
    table = make_table(*rollouts, size=SIZE)
    tokens, _ = shuffled(make_tokens(table, EDGES))
    evidence = token_evidence(tokens)
    rho = np.random.default_rng(0).uniform(0.5, 2, EDGES).astype(np.float32)
    for singleton, tail in itertools.product(("zero", "raw"), ("zero", "raw")):
        actual = JITTED[form](table, tokens, NOTHING, evidence, rho=rho, singleton=singleton, tail=tail)
        assert actual.dtype == jnp.float32
        expected = loop(table, tokens, evidence, form, singleton, tail, rho)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def ragged():
    return make_table(
        make_rollout("a", 1.0, [0.5, 0.0, 0.25], lengths=[2, 1, 3], trainable=[True, False, True]),
        make_rollout("a", 0.0, [0.0, 0.5], lengths=[3, 2]),
        make_rollout("b", 2.0, [0.0], lengths=[2]),
        size=SIZE,
    )


@pytest.mark.slow
@EVERY_FORM
def test_nan_without_a_loss_reaches_nothing(form):
    table = ragged()
    tokens = make_tokens(table, EDGES)
    evidence = token_evidence(tokens)
    rho = np.where(tokens.mask, 1.0, np.nan).astype(np.float32)
    spoiled_tokens, spoiled = poison_tokens(tokens, evidence)
    result = JITTED[form](poison_table(table), spoiled_tokens, NOTHING, spoiled, rho=rho)
    np.testing.assert_array_equal(result, JITTED[form](table, tokens, NOTHING, evidence))

    def total(outcome):
        spoiled_table = dataclasses.replace(poison_table(table), outcome=outcome)
        return jnp.sum(FORMS[form](spoiled_table, spoiled_tokens, NOTHING, spoiled) ** 2)

    assert np.isfinite(jax.jit(jax.grad(total))(np.where(table.valid[:, None], table.outcome, np.nan))).all()


@pytest.mark.slow
@EVERY_FORM
def test_packing_does_not_matter(form):
    table = ragged()
    tokens = make_tokens(table, 15)
    evidence = token_evidence(tokens)
    plain = np.asarray(FORMS[form](table, tokens, NOTHING, evidence))
    cut = lambda tree: jax.tree.map(lambda x: x.reshape(3, 5), tree)  # noqa: E731
    np.testing.assert_array_equal(FORMS[form](table, cut(tokens), NOTHING, cut(evidence)), plain.reshape(3, 5))


@pytest.mark.slow
@EVERY_FORM
def test_equal_rewards_are_exactly_zero_and_so_is_a_group_of_one(form):
    table = make_table(*(make_rollout("a", 0.1, lengths=[n]) for n in (2, 3, 3)), make_rollout("b", 0.7), size=SIZE)
    tokens = make_tokens(table)
    out = FORMS[form](table, tokens, NOTHING, token_evidence(tokens), tail="zero")
    assert out.tolist() == [0.0] * 9


@pytest.mark.slow
@EVERY_FORM
def test_sure_tokens_have_no_say(form):
    """Two rollouts of one token: the baseline is the reward of the one that was unsure; with W 0 throughout there is none."""
    table = make_table(make_rollout("a", 1.0), make_rollout("a", 0.0))
    tokens = dataclasses.replace(make_tokens(table), old_logp=np.array([0, np.log(0.5)], np.float32))
    advantage = np.zeros(2, np.float32)
    out = FORMS[form](table, tokens, advantage, Evidence(sum_pi2=np.array([1, 0.5], np.float32)))
    assert out.tolist() == [1, 0]
    sure = dataclasses.replace(tokens, old_logp=np.zeros(2, np.float32))
    assert FORMS[form](table, sure, advantage, Evidence(sum_pi2=np.ones(2, np.float32))).tolist() == [1, 0]


@pytest.mark.slow
def test_with_one_call_the_two_forms_are_the_same():
    table = make_table(*(make_rollout("a", x, lengths=[n]) for x, n in ((1, 2), (0, 4), (3, 3))))
    tokens = make_tokens(table)
    one, other = (f(table, tokens, NOTHING[:3], token_evidence(tokens)) for f in FORMS.values())
    np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@EVERY_FORM
def test_what_is_missing_or_unknown_is_said(form):
    table = ragged()
    tokens = make_tokens(table)
    call = functools.partial(FORMS[form], table, tokens, NOTHING)
    with pytest.raises(ValueError, match="needs evidence.sum_pi2"):
        call(Evidence())
    with pytest.raises(ValueError, match="no tail 'drop': choose one of raw, zero"):
        call(token_evidence(tokens), tail="drop")
    with pytest.raises(ValueError, match="no singleton 'drop'"):
        call(token_evidence(tokens), singleton="drop")
