"""Log-probs of responses against one row at a time; prompts against what the gateway would have rendered."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transformers import PreTrainedTokenizerFast

from lightningrl.evidence.scorer import (
    by_response,
    edge_logps,
    message_ids,
    next_turn_ids,
    opening_ids,
    padded,
    response_logps,
    table_calls,
    with_message,
)
from lightningrl.gateway.protocol import Message
from lightningrl.gateway.rendering import Renderer
from lightningrl.model import decoder
from lightningrl.model.config import ModelConfig
from lightningrl.model.params import Params, shapes
from lightningrl.packing.rows import RowSettings, pack
from lightningrl.recipes import get_recipe
from lightningrl.runtime.store import Store
from lightningrl.sharding import make_mesh
from lightningrl.tabulate import table_from_rollouts
from lightningrl.train import TrainStep
from lightningrl.types import Rollout, Transition
from tests.batches import make_rollout

RECORDED = pathlib.Path(__file__).parents[2] / "notebooks" / "recorded"
CONFIG = ModelConfig(
    vocab_size=1024,
    hidden_size=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
    max_positions=256,
    qk_norm=True,
)
ROWS = RowSettings((128,), 1024, 256)


@functools.cache
def recorded() -> tuple[Rollout, ...]:
    """Sixteen rollouts of the text-to-SQL agent in three groups: those of short calls, as rows take the longer to compile for."""
    with tempfile.TemporaryDirectory() as folder:  # opening a store writes beside it
        path = pathlib.Path(shutil.copy(RECORDED / "rollouts.sqlite", folder))
        with Store(path) as store:
            every = [store.read_rollout(id_) for id_ in store.places()]
    return tuple(r for r in every if all(len(t.prompt_ids) + len(t.response_ids) <= 100 for t in r.transitions))


@functools.cache
def tokenizer() -> Any:
    return PreTrainedTokenizerFast.from_pretrained(RECORDED / "policy", local_files_only=True)


@functools.cache
def weights(seed: int = 0) -> Params:
    """Untrained, but far from uniform: log-probs of a token differ by several nats."""
    rng = np.random.default_rng(seed)
    draw = lambda p: 0.5 * rng.normal(size=p.shape) if len(p.shape) > 1 else np.ones(p.shape)  # noqa: E731
    return jax.tree.map(lambda p: jnp.asarray(draw(p), p.dtype), shapes(CONFIG))


@functools.cache
def step() -> TrainStep:
    return TrainStep(CONFIG, get_recipe("lightningrl"), optax.sgd(1.0), make_mesh())


LOGPS = functools.partial(response_logps, score=lambda *args: step().score(*args), rows=ROWS)


@jax.jit
def _row_logits(params: Params, tokens: Any, end: Any) -> Any:
    hidden = decoder.forward(params, CONFIG, tokens, jnp.arange(tokens.shape[1])[None], end)
    return decoder.logits(params, CONFIG, hidden)


def one_row(params: Params, t: Transition) -> np.ndarray:
    """log π of every response token, float64 after the logits: the transition alone in its row."""
    ids = np.concatenate([t.prompt_ids, t.response_ids])
    tokens, end = np.zeros((1, 128), np.int32), np.zeros((1, 128), np.int32)
    tokens[0, : len(ids)], end[0, : len(ids)] = ids, len(ids)
    logits = np.asarray(_row_logits(params, tokens, end), np.float64)[0] / (t.temperature or 1.0)
    result = []
    for k, token in enumerate(t.response_ids):
        at = logits[len(t.prompt_ids) + k - 1]
        result.append(at[token] - at.max() - np.log(np.sum(np.exp(at - at.max()))))
    return np.array(result)


def some_calls() -> list[Transition]:
    """Recorded calls at several temperatures, a greedy one among them, some twice."""
    transitions, _ = table_calls(recorded()[:8])
    tempered = [dataclasses.replace(t, temperature=(1.0, 0.7, 0.0)[i % 3]) for i, t in enumerate(transitions)]
    return tempered + tempered[:5]


def assert_close(result: Sequence[Any], expected: Sequence[Any]) -> None:
    assert len(result) == len(expected)
    for a, b in zip(result, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_is_that_of_one_row_after_another() -> None:
    transitions = some_calls()
    result = LOGPS(weights(), transitions)
    expected = [one_row(weights(), t) for t in transitions]
    assert_close(result, expected)
    assert all(r is not None and r.dtype == np.float32 for r in result)
    assert np.std(np.concatenate(expected)) > 1.0


def test_order_and_company_change_nothing() -> None:
    transitions = some_calls()
    expected = LOGPS(weights(), transitions)
    order = np.random.default_rng(0).permutation(len(transitions))
    moved = LOGPS(weights(), [transitions[i] for i in order])
    assert_close(moved, [expected[i] for i in order])
    other = functools.partial(response_logps, score=step().score, rows=RowSettings((64, 128), 512, 192), multiple=2)
    assert_close(other(weights(), transitions), expected)
    assert_close(LOGPS(weights(), transitions[3:4]), expected[3:4])


class Watched:
    """A score function that notes what it is asked."""

    def __init__(self) -> None:
        self.shapes: set[Any] = set()
        self.tokens = 0

    def __call__(self, params: Params, rows: Any, edges: Any) -> Any:
        self.shapes.add((tuple(r.tokens.shape for r in rows), edges.mask.shape))
        self.tokens += int(edges.mask.sum())
        return step().score(params, rows, edges)


def test_sees_one_shape_whatever_there_is_to_score() -> None:
    watched = Watched()
    transitions = some_calls()
    for count in (1, 7, len(transitions)):
        response_logps(weights(), transitions[:count], score=watched, rows=ROWS)
    assert watched.shapes == {(((4, 128),), (1, 256))}


def test_what_occurs_again_is_computed_once() -> None:
    watched, t = Watched(), recorded()[0].transitions[0]
    again = [t, dataclasses.replace(t, turn=5), dataclasses.replace(t, temperature=0.5), t]
    first, second, cold, third = response_logps(weights(), again, score=watched, rows=ROWS)
    assert watched.tokens == 2 * len(t.response_ids)
    assert first is not None and cold is not None
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, third)
    assert not np.allclose(first, cold)


def test_what_does_not_fit_is_none_and_what_is_empty_is_empty() -> None:
    t = recorded()[0].transitions[0]
    full = np.resize(t.prompt_ids, 128 - len(t.response_ids)).astype(np.int32)
    nothing = dataclasses.replace(t, response_ids=t.response_ids[:0], logprobs=t.logprobs[:0])
    asked = [dataclasses.replace(t, prompt_ids=np.append(full, full[0])), nothing, t, dataclasses.replace(t, prompt_ids=full)]
    long, empty, short, just = LOGPS(weights(), asked)
    assert long is None
    assert empty is not None and empty.shape == (0,)
    assert just is not None
    assert_close([short, just], [one_row(weights(), t), one_row(weights(), asked[3])])
    assert LOGPS(weights(), asked[:1]) == [None]
    assert LOGPS(weights(), []) == []


def test_an_empty_prompt_is_refused() -> None:
    t = recorded()[0].transitions[0]
    with pytest.raises(ValueError, match="prompt of response 1 is empty"):
        LOGPS(weights(), [t, dataclasses.replace(t, prompt_ids=t.prompt_ids[:0])])


def test_values_in_order_of_response_are_those_of_a_loop() -> None:
    transitions, _ = table_calls(recorded()[:4])
    packed = pack(transitions, range(len(transitions)), ROWS)
    values = np.random.default_rng(0).normal(size=packed.edges.mask.shape).astype(np.float32)
    lengths = [len(t.response_ids) for t in transitions]
    expected = np.zeros(sum(lengths))
    for b, e in np.argwhere(packed.edges.mask):
        n, k = packed.edges.transition[b, e], packed.edges.k[b, e]
        expected[sum(lengths[:n]) + k] = values[b, e]
    np.testing.assert_array_equal(by_response(packed.edges, values, lengths), expected.astype(np.float32))
    assert_close(
        [by_response(packed.edges, edge_logps(weights(), packed, score=step().score), lengths)],
        [np.concatenate(LOGPS(weights(), transitions))],
    )


def test_calls_are_those_of_the_table() -> None:
    rollouts = [make_rollout("a", 1.0, [0.1, 0.2, 0.3]), make_rollout("a", 0.0, status="failed"), make_rollout("b", 0.0, [0.4, 0.5])]
    shuffled = [dataclasses.replace(r, transitions=r.transitions[::-1]) for r in rollouts]
    transitions, owner = table_calls(shuffled)
    table = table_from_rollouts(shuffled, size=8)
    np.testing.assert_array_equal(np.float32([t.reward for t in transitions]), table.reward[:5])
    assert owner == table.rollout[:5].tolist()


def test_padding_is_zeros_up_to_a_multiple() -> None:
    assert padded(np.ones(5), 4).tolist() == [1] * 5 + [0] * 3
    assert padded(np.ones((4, 2)), 4).shape == (4, 2)
    assert padded(np.ones(0), 4).shape == (4,)


def test_rollouts_of_the_record_are_what_these_tests_need() -> None:
    """Here and in the tests of what asks the scorer: several groups, successes and failures, rollouts with a second draft."""
    assert len(recorded()) == 16 and len({r.group for r in recorded()}) == 3
    assert {r.reward for r in recorded()} == {0.0, 1.0} and all(r.status == "ok" for r in recorded())
    assert [t.role for t in second_draft().transitions] == ["writer", "checker", "rewriter", "checker"]


def second_draft() -> Rollout:
    """A rollout in which a query was written again."""
    return next(r for r in recorded() if len(r.transitions) == 4)


# ---- prompts


def test_pieces_of_prompts_are_what_the_gateway_renders() -> None:
    renderer = Renderer(tokenizer())
    hint = Message(role="user", content="The answer will be right.")
    opening = opening_ids(tokenizer())
    assert next_turn_ids(tokenizer()).tolist() == renderer.continuation([], ended=True)
    assert [*message_ids(tokenizer(), "user", hint.text), *opening] == renderer.continuation([hint], ended=True)
    for t in second_draft().transitions:
        if t.continues is None:
            messages = [Message.model_validate(m) for m in t.messages]
            assert with_message(t.prompt_ids, message_ids(tokenizer(), "user", hint.text), opening).tolist() == renderer.prompt(
                [*messages, hint], ()
            )


def test_a_prompt_that_opens_no_turn_is_refused() -> None:
    opening, message = opening_ids(tokenizer()), message_ids(tokenizer(), "user", "x")
    for prompt in (recorded()[0].transitions[0].prompt_ids[:-1], opening[:1], opening[:0]):
        with pytest.raises(ValueError, match="does not end with the opening"):
            with_message(prompt, message, opening)


class Rewriting:
    """A tokenizer whose template marks the last message."""

    eos_token, eos_token_id = "<end>", 0

    def apply_chat_template(self, messages: Sequence[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        return "".join(f"{m['content']}<end>" for m in messages[:-1]) + f"last: {messages[-1]['content']}"


def test_a_template_that_rewrites_the_past_is_refused() -> None:
    with pytest.raises(ValueError, match="writes earlier messages otherwise"):
        message_ids(Rewriting(), "user", "x")
    with pytest.raises(ValueError, match="does not close an assistant's turn"):
        next_turn_ids(Rewriting())
