"""Information gain on recorded rollouts: which prompts are asked, what they are worth, and that learning the answers shows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
import pytest

from lightningrl.credit.likelihood import igpo
from lightningrl.evidence.answers import answer_logps, answer_prompts, init_answers, true_answer
from lightningrl.evidence.scorer import next_turn_ids
from lightningrl.model.params import Params
from lightningrl.packing.rows import pack
from lightningrl.sharding import make_mesh
from lightningrl.table import Evidence, UnitCounts
from lightningrl.tabulate import table_from_rollouts
from lightningrl.train import EdgeBatch, TrainStep
from lightningrl.types import Rollout, Task, Transition
from lightningrl.warm_start import IMITATION
from tests.evidence.test_scorer import CONFIG, LOGPS, ROWS, one_row, recorded, second_draft, tokenizer, weights

KEY = jax.random.key(0)
CALLS = sum(len(r.transitions) for r in recorded())
ANSWERING = ("writer", "rewriter")


def produced(rollouts: Any, params: Any = None, logps: Any = LOGPS, **settings: Any) -> tuple[Evidence, dict[str, int]]:
    params = weights() if params is None else params
    return answer_logps(params, init_answers(), rollouts, KEY, logps=logps, tokenizer=tokenizer(), **settings)


def ids(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


def ask(prompt: np.ndarray, answer: list[int]) -> Transition:
    response = np.array(answer, np.int32)
    return dataclasses.replace(
        recorded()[0].transitions[0], prompt_ids=prompt, response_ids=response, logprobs=np.zeros(len(answer), np.float32)
    )


def text_of(prompt: np.ndarray) -> str:
    return tokenizer().decode(prompt)


def test_prompts_of_a_writer_a_checker_and_a_rewriter() -> None:
    """As the recorded agent speaks: the rewriter goes on in the writer's conversation, the checker starts one of its own."""
    rollout = second_draft()
    write, _, rewrite, _ = rollout.transitions
    opening = next_turn_ids(tokenizer())
    again = lambda t: np.concatenate([t.prompt_ids, t.response_ids, opening])  # noqa: E731
    expected = [
        (write.prompt_ids, again(write)),
        (again(write), rewrite.prompt_ids),
        (rewrite.prompt_ids, again(rewrite)),
        (again(rewrite), again(rewrite)),
    ]
    pairs = answer_prompts(rollout, tokenizer=tokenizer(), roles=ANSWERING)
    for pair, wanted in zip(pairs, expected, strict=True):
        for prompt, other in zip(pair, wanted, strict=True):
            np.testing.assert_array_equal(prompt, other)
    everybody = answer_prompts(rollout, tokenizer=tokenizer())
    for t, pair in zip(rollout.transitions, everybody, strict=True):
        np.testing.assert_array_equal(pair[0], t.prompt_ids)
        np.testing.assert_array_equal(pair[1], again(t))
    assert text_of(everybody[1][1]).endswith("<|im_start|>assistant\nINCORRECT<|im_end|><|im_start|>assistant\n")


def test_within_a_conversation_gains_add_up() -> None:
    for rollout in recorded():
        pairs = answer_prompts(rollout, tokenizer=tokenizer(), roles=ANSWERING)
        for (_, after), (before, _) in itertools.pairwise(pairs):
            np.testing.assert_array_equal(after, before)


def conversation(*calls: tuple[str, str, str]) -> Rollout:
    """Calls of (role, prompt, response); a prompt that starts with + goes on from the last call of its conversation."""
    made: list[Transition] = []
    for turn, (role, prompt, response) in enumerate(calls):
        before = np.concatenate([made[-1].prompt_ids, made[-1].response_ids]) if prompt.startswith("+") else np.zeros(0, np.int32)
        prompt_ids = np.concatenate([before, ids(prompt.lstrip("+"))]).astype(np.int32)
        made.append(dataclasses.replace(ask(prompt_ids, ids(response)), role=role, turn=turn))
    return dataclasses.replace(recorded()[0], transitions=tuple(made))


def test_a_call_that_goes_on_shows_what_the_one_before_brought_about() -> None:
    rollout = conversation(("a", "ask", "call<|im_end|>"), ("a", "+ result", "cut off"), ("a", "new", "end<|im_end|>"))
    first, second, third = answer_prompts(rollout, tokenizer=tokenizer())
    assert text_of(first[1]) == "askcall<|im_end|> result"
    assert text_of(second[1]) == "askcall<|im_end|> resultcut off<|im_end|><|im_start|>assistant\n"  # its turn is ended for it
    assert text_of(third[0]) == "new" and text_of(third[1]) == "newend<|im_end|><|im_start|>assistant\n"


def test_who_speaks_before_anybody_answers_gains_nothing() -> None:
    rollout = conversation(("plan", "ask", "so<|im_end|>"), ("plan", "+ more", "thus<|im_end|>"), ("act", "do", "done<|im_end|>"))
    pairs = answer_prompts(rollout, tokenizer=tokenizer(), roles=("act",))
    for t, (before, after) in zip(rollout.transitions[:2], pairs[:2], strict=True):
        np.testing.assert_array_equal(before, t.prompt_ids)
        np.testing.assert_array_equal(after, t.prompt_ids)
    assert text_of(pairs[2][1]) == "dodone<|im_end|><|im_start|>assistant\n"


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"ended": False}, {"preface": "SELECT"}, {"roles": ANSWERING}])
def test_is_the_mean_of_the_answers_tokens(settings: dict[str, Any]) -> None:
    some = recorded()[::5]
    made, totals = produced(some, multiple=16, **settings)
    calls = sum(len(r.transitions) for r in some)
    expected = []
    for rollout in some:
        answer = ids(rollout.task.target["gold"]) + ([tokenizer().eos_token_id] if settings.get("ended", True) else [])
        for pair in answer_prompts(rollout, tokenizer=tokenizer(), roles=settings.get("roles")):
            prompts = [np.concatenate([p, ids(settings.get("preface", ""))]).astype(np.int32) for p in pair]
            expected.append([one_row(weights(), ask(p, answer)).mean() for p in prompts])
    assert made.answer_logp is not None and made.answer_logp.dtype == np.float32
    assert made.answer_logp.shape == (-(-calls // 16) * 16, 2)
    np.testing.assert_allclose(made.answer_logp[:calls], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(made.answer_logp[calls:], 0.0)
    assert totals == {"prompts": 2 * calls, "too_long": 0}


@pytest.mark.slow
def test_learning_the_answers_shows() -> None:
    """A few supervised updates on the answers, at the recorded writers' prompts, raise them there and elsewhere."""
    before = np.asarray(produced(recorded(), roles=ANSWERING)[0].answer_logp)
    shown = [
        ask(r.transitions[0].prompt_ids, [*ids(true_answer(r.task)), tokenizer().eos_token_id])
        for r in {r.group: r for r in recorded()}.values()
    ]
    packed = pack(shown, range(3), ROWS)
    zeros = np.zeros(packed.edges.mask.shape, np.float32)
    counts = UnitCounts(sequence_tokens=zeros, rollout_tokens=zeros, group_tokens=zeros)
    edges = EdgeBatch(tokens=packed.edges, counts=counts, advantage=zeros, old_value=zeros, value_target=zeros)
    teacher = TrainStep(CONFIG, IMITATION, optax.adam(1e-2), make_mesh())
    state = teacher.init(weights())
    for _ in range(10):
        state, _ = teacher.update(state, packed.rows, edges)
    after = np.asarray(produced(recorded(), state.params, roles=ANSWERING)[0].answer_logp)
    assert after.shape == (CALLS, 2)
    assert np.all(after > before) and np.all(after < 0)


def test_a_state_without_room_for_the_answer_is_no_gain() -> None:
    rollout = second_draft()
    whole = np.asarray(produced([rollout], roles=ANSWERING)[0].answer_logp)
    room = (
        len(rollout.transitions[2].prompt_ids) + len(ids(true_answer(rollout.task))) + 1
    )  # the first rewriter's state fits, none after it

    def tight(params: Params, asked: Sequence[Transition]) -> list[np.ndarray | None]:
        return [x if len(t.prompt_ids) <= room else None for t, x in zip(asked, LOGPS(params, asked), strict=True)]

    made, totals = produced([rollout], logps=tight, roles=ANSWERING)
    expected = whole.copy()
    expected[2, 1] = expected[3:, :] = whole[2, 0]
    np.testing.assert_allclose(made.answer_logp, expected, rtol=1e-5)
    assert totals["too_long"] == 3
    room = 0
    np.testing.assert_array_equal(produced([rollout], logps=tight)[0].answer_logp, np.zeros((4, 2)))


def test_totals_add_up_and_only_runs_that_ended_count() -> None:
    calls = len(recorded()[0].transitions)
    made, totals = produced([recorded()[0], dataclasses.replace(recorded()[1], status="failed")])
    assert np.shape(made.answer_logp) == (calls, 2)
    _, again = answer_logps(weights(), totals, recorded()[:1], KEY, logps=LOGPS, tokenizer=tokenizer())
    assert again["prompts"] == 4 * calls


def test_the_true_answer_is_the_target() -> None:
    assert true_answer(Task("t", {}, "42")) == "42"
    assert true_answer(Task("t", {}, {"gold": "SELECT 1", "kind": "x"})) == "SELECT 1"
    for target in (None, 42, "", {"answer": "x"}, {"gold": 3}):
        with pytest.raises(ValueError, match="task 't'"):
            true_answer(Task("t", {}, target))
    with pytest.raises(ValueError, match="is empty"):
        produced(recorded()[:1], answer_of=lambda task: "")


def test_credit_takes_it() -> None:
    table = table_from_rollouts(recorded(), size=CALLS)
    made, _ = produced(recorded(), roles=ANSWERING)
    value = np.asarray(jax.jit(igpo)(table, made).value)
    assert np.all(np.isfinite(value)) and np.any(value != 0)
