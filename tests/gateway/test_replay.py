"""Runs that repeat the first calls of a recorded one: what is answered from the record, what is sampled, what diverges."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import openai
import pytest

from lightningrl.gateway import SamplingOverrides
from lightningrl.types import Replay, Rollout, Task, Transition
from tests.gateway.conftest import USER, Stage, ask, assert_continues, raw

SEARCH: Any = {
    "type": "function",
    "function": {"name": "search", "parameters": {"type": "object", "properties": {"query": {"type": "string"}}}},
}
CALL = '<tool_call>{"name": "search", "arguments": {"query": "Paris"}}</tool_call>'


def parent(transitions: Sequence[Transition], name: str = "parent") -> Rollout:
    return Rollout(name, Task("t", {}), "g", 0, 0, tuple(transitions), {"reward": 1.0})


def converse(stage: Stage, observations: Sequence[str], **options: Any) -> list[str]:
    """A conversation with one user message before each call; returns what the policy said."""
    messages: list[Any] = []
    for observation in observations:
        messages.append({"role": "user", "content": observation})
        request: dict[str, Any] = {"model": "policy", "messages": messages, **options}
        messages.append(stage.client().chat.completions.create(**request).choices[0].message.model_dump(exclude_none=True))
    return [message["content"] for message in messages[1::2]]


def recorded(stage: Stage, script: Any, *observations: str) -> Rollout:
    stage.play(script, rollout="parent")
    converse(stage, observations)
    return parent(stage.transitions())


def branch(stage: Stage, replay: Replay, script: Any, name: str = "branch", **options: Any) -> Stage:
    return stage.play(script, rollout=name, replay=replay, **options)


def assert_repeats(one: Transition, other: Transition) -> None:
    for field in ("prompt_ids", "response_ids", "logprobs"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field), strict=True)
    for field in ("role", "turn", "policy_version", "temperature", "finish_reason", "trainable", "continues", "messages", "text"):
        assert getattr(one, field) == getattr(other, field)


# What is repeated


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_the_first_calls_are_the_recorded_ones_and_the_rest_is_sampled(stage: Stage, calls: int) -> None:
    old = recorded(stage, ["A", "B", "C"], "x", "y", "z")
    branch(stage, Replay(old, calls), ["P", "Q", "R"])
    assert converse(stage, "xyz") == [*"ABC"[:calls], *"PQR"[: 3 - calls]]
    record = stage.record()
    assert (record.replayed, record.divergence) == (calls, "")
    assert len(stage.sampler.submitted) == 3 - calls
    for mine, theirs in zip(record.transitions[:calls], old.transitions, strict=False):
        assert_repeats(mine, theirs)
    if calls < 3:  # the state that it branches from is the parent's, token by token
        np.testing.assert_array_equal(record.transitions[calls].prompt_ids, old.transitions[calls].prompt_ids)
    for later, earlier in zip(record.transitions[1:], record.transitions, strict=False):
        assert_continues(later, earlier)


def test_log_probs_version_and_trainability_are_the_records_and_the_reward_is_not(stage: Stage) -> None:
    old = recorded(stage, ["A", "B"], "x", "y")
    old_call = dataclasses.replace(
        old.transitions[0], policy_version=3, logprobs=old.transitions[0].logprobs - 1, reward=0.5, trainable=False, temperature=0.5
    )
    branch(stage, Replay(parent([old_call, old.transitions[1]]), 1), ["P"])
    converse(stage, "xy")
    first, second = stage.transitions()
    assert_repeats(first, old_call)
    assert (first.reward, second.policy_version, second.trainable) == (0.0, 7, True)


def test_a_branch_samples_under_keys_of_its_own_and_a_repeated_branch_under_the_same(stage: Stage) -> None:
    old = recorded(stage, ["A", "B"], "x", "y")
    keys = []
    for name in ("parent", "one", "two", "one"):
        branch(stage, Replay(old, 1), ["P"], name)
        converse(stage, "xy")
        stage.record()
        keys.append(stage.sampler.submitted[0][2])
    assert len(set(keys)) == 3 and keys[1] == keys[3]


def test_a_response_that_was_cut_off_is_cut_off_again(stage: Stage) -> None:
    stage.play(["long story" + stage.sampler.CUT, "B"], rollout="parent")
    ask(stage, "x", max_tokens=64)
    old = parent(stage.transitions())
    branch(stage, Replay(old, 1), [])
    request: Any = {"model": "policy", "messages": [{"role": "user", "content": "x"}]}
    assert stage.client().chat.completions.create(**request).choices[0].finish_reason == "length"
    assert_repeats(stage.transitions()[0], old.transitions[0])


def test_tool_calls_have_the_ids_that_they_had(stage: Stage) -> None:
    answers: list[Any] = []
    rollouts: list[Rollout] = []
    for replay in (None, "parent"):
        options = {"rollout": "branch", "replay": Replay(rollouts[0], 1)} if replay else {"rollout": "parent"}
        stage.play([CALL, "Done."] if not replay else ["Other."], **options)
        answer = stage.client().chat.completions.create(model="policy", messages=[USER], tools=[SEARCH])
        answers.append(answer.model_dump(exclude={"created"}))
        said = answer.choices[0].message
        assert said.tool_calls and answer.choices[0].finish_reason == "tool_calls"
        result: Any = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "a city"}
        go_on: Any = {"model": "policy", "messages": [USER, said.model_dump(exclude_none=True), result], "tools": [SEARCH]}
        stage.client().chat.completions.create(**go_on)
        rollouts.append(parent(stage.transitions()))
    assert answers[0] == answers[1]
    one, two = (rollout.transitions for rollout in rollouts)
    assert_repeats(two[0], one[0])
    np.testing.assert_array_equal(two[1].prompt_ids, one[1].prompt_ids)
    assert (one[1].text, two[1].text) == ("Done.", "Other.")


def test_a_stream_of_a_repeated_call_says_the_same(stage: Stage) -> None:
    old = recorded(stage, ["A few words.", "B"], "x", "y")
    branch(stage, Replay(old, 1), [])
    request: Any = {"model": "policy", "messages": [{"role": "user", "content": "x"}], "stream": True}
    chunks = [chunk.choices[0] for chunk in stage.client().chat.completions.create(**request)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "A few words."
    assert chunks[-1].finish_reason == "stop"
    assert_repeats(stage.transitions()[0], old.transitions[0])


def test_the_other_endpoints_repeat_too(stage: Stage) -> None:
    def run() -> list[Any]:
        client = stage.client()
        said = [client.completions.create(model="policy:reader", prompt="Once", max_tokens=9).choices[0].text]
        first = client.responses.create(model="policy", input="hi")
        second = client.responses.create(model="policy", input="and?", previous_response_id=first.id)
        return [*said, first.output_text, second.output_text]

    stage.play(["A", "B", "C"], rollout="parent")
    assert run() == ["A", "B", "C"]
    old = parent(stage.transitions())
    branch(stage, Replay(old, 2), ["P"])
    assert run() == ["A", "B", "P"]
    record = stage.record()
    assert record.replayed == 2
    for mine, theirs in zip(record.transitions[:2], old.transitions, strict=False):
        assert_repeats(mine, theirs)
    np.testing.assert_array_equal(record.transitions[2].prompt_ids, old.transitions[2].prompt_ids)


def test_a_retry_of_a_repeated_call_repeats_nothing_more(stage: Stage) -> None:
    old = recorded(stage, ["A", "B"], "hi", "hi")
    branch(stage, Replay(old, 1), ["P"])
    assert raw(stage).json() == raw(stage, attempt=1).json()
    record = stage.record()
    assert (len(record.transitions), record.replayed) == (1, 1)


def test_settings_of_the_run_hold_for_what_is_sampled(stage: Stage) -> None:
    old = recorded(stage, ["A", "B"], "x", "y")
    branch(stage, Replay(old, 1), ["P"], sampling=SamplingOverrides(temperature=0.5), train_roles=())
    converse(stage, "xy")
    first, second = stage.transitions()
    assert (first.temperature, first.trainable) == (1.0, True)
    assert (second.temperature, second.trainable) == (0.5, False)


# Calls that are alike, and calls side by side


def test_equal_prompts_are_repeated_in_the_order_recorded(stage: Stage) -> None:
    stage.play(["A", "B", "C"], rollout="parent")
    assert [ask(stage) for _ in range(3)] == ["A", "B", "C"]
    branch(stage, Replay(parent(stage.transitions()), 2), ["P"])
    assert [ask(stage) for _ in range(3)] == ["A", "B", "P"]
    assert stage.record().replayed == 2


def test_the_choices_of_one_call_can_be_cut_between(stage: Stage) -> None:
    def choices() -> list[str | None]:
        answer = stage.client().chat.completions.create(model="policy", messages=[USER], n=3)
        return [choice.message.content for choice in answer.choices]

    said = iter("ABC")
    stage.play(lambda prompt: next(said), rollout="parent")
    first = choices()
    old = parent(stage.transitions())
    branch(stage, Replay(old, 1), lambda prompt: "P")
    assert choices() == [first[0], "P", "P"]
    record = stage.record()
    assert record.replayed == 1
    assert_repeats(record.transitions[0], old.transitions[0])


def test_calls_side_by_side_may_come_in_any_order(stage: Stage) -> None:
    """A late call of the record that comes early is sampled at once, and has the turn that it was recorded under."""
    stage.play(["A", "B", "C", "D"], rollout="parent")
    for text in "abcd":
        ask(stage, text)
    old = parent(stage.transitions())
    branch(stage, Replay(old, 2), ["P", "Q", "R"])
    assert [ask(stage, text) for text in "dbac"] == ["P", "B", "A", "Q"]
    assert ask(stage, "new") == "R"
    record = stage.record()
    assert (record.replayed, record.divergence) == (2, "")
    assert [(t.turn, t.text) for t in record.transitions] == [(0, "A"), (1, "B"), (2, "Q"), (3, "P"), (4, "R")]
    for mine, theirs in zip(record.transitions, old.transitions, strict=False):
        np.testing.assert_array_equal(mine.prompt_ids, theirs.prompt_ids)


def test_after_a_new_call_turns_are_in_order_of_arrival_again(stage: Stage) -> None:
    stage.play(["A", "B"], rollout="parent")
    for text in "ab":
        ask(stage, text)
    branch(stage, Replay(parent(stage.transitions()), 1), ["P", "Q"])
    assert [ask(stage, text) for text in ("a", "new", "b")] == ["A", "P", "Q"]
    assert [t.text for t in stage.transitions()] == ["A", "P", "Q"]


def test_side_by_side_in_threads(stage: Stage) -> None:
    stage.play(lambda prompt: f"said {len(prompt)}", rollout="parent")
    texts = ["a" * k for k in range(1, 7)]
    for text in texts:
        ask(stage, text)
    old = parent(stage.transitions())
    branch(stage, Replay(old, 4), lambda prompt: "new")
    threads = [threading.Thread(target=ask, args=(stage, text)) for text in reversed(texts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = stage.record()
    assert (record.replayed, record.divergence) == (4, "")
    assert [t.text for t in record.transitions] == [*(t.text for t in old.transitions[:4]), "new", "new"]


# Divergence


def test_another_prompt_ends_the_run_with_one_error_that_says_where(stage: Stage) -> None:
    old = recorded(stage, ["A", "B", "C"], "x", "Result: 3 rows", "z")
    branch(stage, Replay(old, 2), ["P", "Q"])
    with pytest.raises(openai.PermissionDeniedError) as error:
        converse(stage, ["x", "Result: 4 rows", "z"])
    sentence = "the replay of rollout parent diverged after 1 of 2 calls, since its call 1 was asked"
    assert error.value.code == "replay_diverged"
    assert sentence in error.value.message and "Result: 3 rows" in error.value.message and "Result: 4 rows" in error.value.message
    record = stage.record()
    assert record.divergence.startswith(sentence)
    assert [t.text for t in record.transitions] == ["A"] and record.replayed == 1
    assert not stage.sampler.submitted


def test_a_client_does_not_try_again_and_no_later_call_is_answered(stage: Stage) -> None:
    old = recorded(stage, ["A", "B"], "x", "y")
    branch(stage, Replay(old, 2), ["P"])
    with pytest.raises(openai.PermissionDeniedError):
        stage.client(max_retries=2).chat.completions.create(model="policy", messages=[USER])
    with pytest.raises(openai.PermissionDeniedError):  # though this one was recorded
        ask(stage, "x")
    record = stage.record()
    assert record.divergence and not record.transitions


def test_another_role_diverges(stage: Stage) -> None:
    old = recorded(stage, ["A", "B"], "x", "y")
    branch(stage, Replay(old, 1), ["P"])
    with pytest.raises(openai.PermissionDeniedError, match="'policy: .*'checker: "):
        ask(stage, "x", model="policy:checker")
    assert stage.record().divergence


def test_text_that_tokenises_alike_is_no_excuse(stage: Stage) -> None:
    """The record's ids were spelled by the policy; ids of the same text, tokenised, are another prompt."""
    old = recorded(stage, ["How many singers", "B", "C"], "x", "y", "z")
    branch(stage, Replay(old, 2), ["P"])
    with pytest.raises(openai.PermissionDeniedError):
        said = {"role": "assistant", "content": "How many singers"}  # without having asked the first call
        messages: Any = [{"role": "user", "content": "x"}, said, {"role": "user", "content": "y"}]
        stage.client().chat.completions.create(model="policy", messages=messages)


def test_the_first_prompt_after_the_replay_may_be_another(stage: Stage) -> None:
    old = recorded(stage, ["A", "B"], "x", "y")
    branch(stage, Replay(old, 1), ["P"])
    assert converse(stage, ["x", "another observation"]) == ["A", "P"]
    record = stage.record()
    assert (record.replayed, record.divergence) == (1, "")


def test_a_run_that_ends_early_has_repeated_less(stage: Stage) -> None:
    old = recorded(stage, ["A", "B", "C"], "x", "y", "z")
    branch(stage, Replay(old, 2), [])
    converse(stage, "x")
    assert stage.record().replayed == 1


def test_a_call_that_failed_gives_back_what_it_was_to_repeat(stage: Stage) -> None:
    """Of two choices one is repeated and one sampled, at which the sampler fails: asked again, the same one is repeated."""
    stage.play(["A", "B"], rollout="parent")
    stage.client().chat.completions.create(model="policy", messages=[USER], n=2)
    old = parent(stage.transitions())
    branch(stage, Replay(old, 1), lambda prompt: "P")
    stage.sampler.error = ValueError("x")
    body: dict[str, Any] = {"model": "policy", "messages": [USER], "n": 2}
    assert raw(stage, body=body).status_code == 500
    stage.sampler.error = None
    said = [choice["message"]["content"] for choice in raw(stage, body=body).json()["choices"]]
    assert said == [old.transitions[0].text, "P"]
    record = stage.record()
    assert (record.replayed, record.divergence, len(record.transitions)) == (1, "", 2)


def test_more_calls_than_there_are_cannot_be_repeated(stage: Stage) -> None:
    with pytest.raises(ValueError, match="rollout 'parent' has 1 calls: a run cannot repeat 2 of them"):
        Replay(recorded(stage, ["A"], "x"), 2)
