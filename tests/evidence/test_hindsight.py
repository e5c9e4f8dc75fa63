"""Hindsight on recorded rollouts: the prompts token by token, the log-probs against the loop's and against one row at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from lightningrl.batches import pack_updates, score
from lightningrl.credit.likelihood import hcapo, hindsight
from lightningrl.evidence.hindsight import hindsight_logps, hindsight_prompts, init_hindsight, right_or_wrong
from lightningrl.evidence.scorer import opening_ids, table_calls
from lightningrl.model.params import Params
from lightningrl.table import Evidence
from lightningrl.tabulate import table_from_rollouts
from lightningrl.types import Transition
from tests.evidence.test_scorer import LOGPS, ROWS, one_row, recorded, step, tokenizer, weights

KEY = jax.random.key(0)
CALLS = sum(len(r.transitions) for r in recorded())


def produced(rollouts: Any, logps: Any = LOGPS, **settings: Any) -> tuple[Evidence, dict[str, int]]:
    return hindsight_logps(weights(), init_hindsight(), rollouts, KEY, logps=logps, tokenizer=tokenizer(), **settings)


@functools.cache
def evidence() -> Evidence:
    return produced(recorded(), multiple=32)[0]


def test_the_prompt_is_the_policys_own_and_the_text() -> None:
    transitions, owner = table_calls(recorded())
    opening = opening_ids(tokenizer())
    prompts = hindsight_prompts(recorded(), tokenizer=tokenizer())
    for t, r, prompt in zip(transitions, owner, prompts, strict=True):
        cut = len(t.prompt_ids) - len(opening)
        np.testing.assert_array_equal(prompt[:cut], t.prompt_ids[:cut])
        np.testing.assert_array_equal(prompt[len(prompt) - len(opening) :], opening)
        word = "right" if recorded()[r].reward == 1.0 else "wrong"
        said = tokenizer().decode(prompt[cut : len(prompt) - len(opening)])
        assert said == f"<|im_start|>user\nThe answer will be {word}.<|im_end|>"


def test_says_what_it_is_told_to_say() -> None:
    say = lambda rollout: f"The reward will be {rollout.reward:g}."  # noqa: E731
    prompts = hindsight_prompts(recorded()[:2], tokenizer=tokenizer(), say=say, role="system")
    assert "<|im_start|>system\nThe reward will be 1.<|im_end|><|im_start|>assistant\n" in tokenizer().decode(prompts[0])
    assert [right_or_wrong(recorded()[0], right="a", wrong="b", threshold=t) for t in (1.0, 1.1)] == ["a", "b"]


def test_response_logp_is_what_the_loop_scores() -> None:
    table = table_from_rollouts(recorded(), size=128)
    batches, _ = score(step(), weights(), None, pack_updates(recorded(), table, 3, ROWS, 1))
    expected = np.zeros(128)
    for batch in batches:
        edges = jax.tree.map(np.asarray, batch.edges)
        np.add.at(expected, edges.transition[edges.mask], edges.old_logp[edges.mask])
    made = evidence()
    assert made.response_logp is not None and made.response_logp.shape == (-(-CALLS // 32) * 32,)
    np.testing.assert_allclose(made.response_logp, expected[: len(made.response_logp)], rtol=1e-5, atol=1e-5)


def test_hindsight_logp_is_that_of_the_response_after_the_told_prompt() -> None:
    made, prompts = evidence(), hindsight_prompts(recorded(), tokenizer=tokenizer())
    transitions, _ = table_calls(recorded())
    expected = [one_row(weights(), dataclasses.replace(t, prompt_ids=p)).sum() for t, p in zip(transitions, prompts, strict=True)]
    assert made.hindsight_logp is not None and made.hindsight_logp.dtype == np.float32
    np.testing.assert_allclose(made.hindsight_logp[:CALLS], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(made.hindsight_logp[CALLS:], 0.0)
    assert np.mean(np.abs(made.hindsight_logp - np.asarray(made.response_logp))[:CALLS] > 1e-3) > 0.9


def test_a_told_prompt_that_does_not_fit_says_nothing() -> None:
    """Where every call fits but not every told prompt."""
    transitions, _ = table_calls(recorded())
    longest = max(len(t.prompt_ids) + len(t.response_ids) for t in transitions)

    def tight(params: Params, asked: Sequence[Transition]) -> list[np.ndarray | None]:
        fits = [len(t.prompt_ids) + len(t.response_ids) <= longest for t in asked]
        return [logp if fit else None for fit, logp in zip(fits, LOGPS(params, asked), strict=True)]

    made, totals = produced(recorded(), tight)
    added = len(hindsight_prompts(recorded()[:1], tokenizer=tokenizer())[0]) - len(transitions[0].prompt_ids)
    long = np.array([len(t.prompt_ids) + len(t.response_ids) + added > longest for t in transitions])
    assert 0 < long.sum() < CALLS
    assert totals == {"calls": CALLS, "too_long": long.sum()}
    assert made.hindsight_logp is not None and made.response_logp is not None
    np.testing.assert_array_equal(made.hindsight_logp[long], made.response_logp[long])
    np.testing.assert_allclose(made.hindsight_logp, np.where(long, made.response_logp, np.asarray(evidence().hindsight_logp)[:CALLS]), 1e-5)
    table = table_from_rollouts(recorded(), size=CALLS)
    np.testing.assert_array_equal(np.asarray(hindsight(table, made).value)[long], 0.0)


def test_totals_add_up_and_only_runs_that_ended_count() -> None:
    failed = dataclasses.replace(recorded()[1], status="failed")
    first, totals = produced([recorded()[0], failed])
    calls = len(recorded()[0].transitions)
    assert np.shape(first.hindsight_logp) == (calls,)
    again = hindsight_logps(weights(), totals, recorded()[:1], KEY, logps=LOGPS, tokenizer=tokenizer())
    assert again[1]["calls"] == 2 * calls
    np.testing.assert_array_equal(again[0].hindsight_logp, first.hindsight_logp)


def test_a_prompt_of_another_kind_is_refused_by_name() -> None:
    bad = recorded()[0].transitions[1]
    calls = (recorded()[0].transitions[0], dataclasses.replace(bad, prompt_ids=bad.prompt_ids[:-1]))
    with pytest.raises(ValueError, match=f"call 1 of rollout '{recorded()[0].id}'"):
        produced([dataclasses.replace(recorded()[0], transitions=calls)])


@pytest.mark.slow
def test_credit_takes_it() -> None:
    table = table_from_rollouts(recorded(), size=len(np.asarray(evidence().response_logp)))
    outcome = table.outcome[:, 0]
    for assign in (hindsight, functools.partial(hindsight, per_token=True), hcapo):
        value = np.asarray(jax.jit(assign)(table, evidence()).value)
        assert np.all(np.isfinite(value)) and np.any(value != 0)
    np.testing.assert_array_equal(np.asarray(hindsight(table, evidence()).value)[outcome == 0], 0.0)
