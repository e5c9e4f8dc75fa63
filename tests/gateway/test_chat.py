"""`/v1/chat/completions` through raw HTTP and the openai client: streaming or not, the same answer."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import httpx
import numpy as np
import pytest

from tests.gateway.conftest import Stage, assert_continues
from tests.gateway.scripted_sampler import ScriptedSampler

USER: Any = {"role": "user", "content": "Where is Paris?"}
SEARCH: Any = {
    "type": "function",
    "function": {"name": "search", "parameters": {"type": "object", "properties": {"query": {"type": "string"}}}},
}
CALL = '<tool_call>{"name": "search", "arguments": {"query": "é"}}</tool_call>'


def test_the_raw_answer(stage: Stage) -> None:
    stage.play(["In France."])
    body = {"model": "policy", "messages": [USER]}
    answer = httpx.post(f"{stage.url}/chat/completions", json=body, headers=stage.headers())
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    value = answer.json()
    (transition,) = stage.transitions()
    prompt, response = len(transition.prompt_ids), len(transition.response_ids)
    assert value.pop("id").startswith("chatcmpl-") and isinstance(value.pop("created"), int)
    message = {"role": "assistant", "content": "In France.", "refusal": None}
    assert value == {
        "object": "chat.completion",
        "model": "policy",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": response, "total_tokens": prompt + response},
    }


def test_the_transition_is_what_the_sampler_saw_and_produced(stage: Stage) -> None:
    stage.play(["In France."])
    stage.client().chat.completions.create(model="policy:writer", messages=[USER], temperature=0.7)
    (transition,) = stage.transitions()
    prompt, params, _ = stage.sampler.submitted[0]
    completion = stage.sampler.futures[0].result()
    np.testing.assert_array_equal(transition.prompt_ids, prompt)
    np.testing.assert_array_equal(transition.response_ids, completion.token_ids)
    np.testing.assert_array_equal(transition.logprobs, completion.logprobs)
    assert (transition.prompt_ids.dtype, transition.response_ids.dtype) == (np.int32, np.int32)
    assert transition.logprobs.dtype == np.float32
    assert (transition.temperature, params.temperature, transition.policy_version) == (0.7, 0.7, 7)
    assert (transition.role, transition.turn, transition.reward, transition.finish_reason) == ("writer", 0, 0.0, "stop")
    assert (transition.messages, transition.text, transition.continues) == ((USER,), "In France.", None)


def test_sampling_settings_reach_the_sampler(stage: Stage) -> None:
    stage.play(["A", "A"])
    client = stage.client()
    client.chat.completions.create(
        model="policy",
        messages=[USER],
        temperature=0.5,
        top_p=0.9,
        max_completion_tokens=9,
        stop=["x", "y"],
        extra_body={"top_k": 4},
    )
    client.chat.completions.create(model="policy", messages=[USER], stop="z", max_tokens=7)
    first, second = (params for _, params, _ in stage.sampler.submitted)
    assert (first.temperature, first.top_p, first.top_k, first.max_tokens, first.stop) == (0.5, 0.9, 4, 9, ("x", "y"))
    assert (second.temperature, second.top_p, second.top_k, second.max_tokens, second.stop) == (1.0, 1.0, 0, 7, ("z",))


def test_max_tokens_defaults_and_is_held_to_the_context(stage: Stage) -> None:
    stage.play(["A", "A"])
    client = stage.client()
    client.chat.completions.create(model="policy", messages=[USER])
    client.chat.completions.create(model="policy", messages=[USER], max_tokens=100_000)
    (prompt, first, _), (_, second, _) = stage.sampler.submitted
    assert first.max_tokens == 256
    assert second.max_tokens == stage.sampler.context_length - len(prompt)


@pytest.mark.parametrize("spell", [False, True])
@pytest.mark.parametrize(
    ("said", "options"),
    [
        ("In France.", {}),
        ("", {}),
        ("a\ud83d\ude00b é\u4f60\u597d".encode("utf-16", "surrogatepass").decode("utf-16"), {}),
        ("one; two", {"stop": ["; t"]}),
        ("one; two", {"stop": ["zz", "; x"]}),
        ("Wait. " + CALL + CALL, {"tools": [SEARCH]}),
        (CALL, {"tools": [SEARCH]}),
        ("a <tool_call>{broken</tool_call> b", {"tools": [SEARCH]}),
        ("a <tool", {"tools": [SEARCH]}),
        (CALL, {}),
        (CALL, {"tools": [SEARCH], "tool_choice": "none"}),
        (
            '{"query": "x"}}</tool_call>',
            {"tools": [SEARCH], "tool_choice": {"type": "function", "function": {"name": "search"}}},
        ),
        ("no call at all", {"tools": [SEARCH], "tool_choice": "required"}),
        ("cut here" + ScriptedSampler.CUT, {}),
    ],
)
def test_streaming_says_the_same_as_not_streaming(stage: Stage, said: str, options: dict[str, Any], spell: bool) -> None:
    stage.play([said, said], spell=spell)
    client = stage.client()
    request = {"model": "policy", "messages": [USER], **options}
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    message = whole.choices[0].message
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    streamed = "".join(delta.content or "" for delta in deltas)
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [(c.function.name, c.function.arguments) for c in calls] == [
        (c.function.name, c.function.arguments) for c in message.tool_calls or ()
    ]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert (streamed.strip() or None) == message.content if calls else streamed == message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert deltas[0].role == "assistant"


def test_a_character_split_over_tokens_is_streamed_whole(stage: Stage) -> None:
    stage.play(["x😀y"])
    gate = stage.sampler.hold(0)
    pieces = []
    for chunk in stage.client().chat.completions.create(model="policy", messages=[USER], stream=True):
        pieces.append(chunk.choices[0].delta.content or "")
        if "".join(pieces) == "x😀y":
            gate.set()  # all of it arrived while the response was still being sampled
    assert "".join(pieces) == "x😀y"
    assert not any("\ufffd" in piece for piece in pieces)


def test_tokens_are_streamed_while_the_response_is_sampled(stage: Stage) -> None:
    stage.play(["one two three"])
    gate = stage.sampler.hold(0)
    stream = iter(stage.client().chat.completions.create(model="policy", messages=[USER], stream=True))
    seen = ""
    while "two" not in seen:
        seen += next(stream).choices[0].delta.content or ""
    gate.set()
    assert seen + "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "one two three"


def test_nothing_of_a_stop_string_is_streamed(stage: Stage) -> None:
    stage.play(["SELECT 1 -- because"])
    stream = stage.client().chat.completions.create(model="policy", messages=[USER], stream=True, stop=["-- b"])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "SELECT 1 "


def test_the_end_of_a_raw_stream(stage: Stage) -> None:
    stage.play(["Hi"])
    body = {"model": "policy", "messages": [USER], "stream": True}
    answer = httpx.post(f"{stage.url}/chat/completions", json=body, headers=stage.headers())
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events[:-2])


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_every_sampled_token(stage: Stage, stream: bool) -> None:
    stage.play(["é!"])
    request: Any = {"model": "policy", "messages": [USER], "logprobs": True, "top_logprobs": 2}
    answer = stage.client().chat.completions.create(**request, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    (transition,) = stage.transitions()
    assert [entry.logprob for entry in entries] == [float(value) for value in transition.logprobs]
    assert b"".join(bytes(entry.bytes) for entry in entries) == "é!<|im_end|>".encode()
    assert entries[0].token == "\ufffd"
    assert [len(entry.top_logprobs) for entry in entries] == [2] * len(entries)
    assert [alternative.logprob for alternative in entries[0].top_logprobs] == [-1.0, -2.0]


def test_a_logprob_of_minus_infinity_is_still_json(stage: Stage) -> None:
    from lightningrl.gateway.logprobs import _entry
    from lightningrl.gateway.rendering import Renderer

    assert _entry(Renderer(stage.tokenizer), 9, -math.inf)["logprob"] == -9999.0


def test_n_choices_are_n_transitions(stage: Stage) -> None:
    stage.play(["A", "B", "C", "D"])
    client = stage.client()
    answer = client.chat.completions.create(model="policy", messages=[USER], n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == ["A", "B", "C"]
    reply: Any = answer.choices[1].message.model_dump()
    client.chat.completions.create(model="policy", messages=[USER, reply, {"role": "user", "content": "More."}])
    transitions = stage.transitions()
    assert [(t.turn, t.text, t.continues) for t in transitions] == [(0, "A", None), (1, "B", None), (2, "C", None), (3, "D", 1)]
    assert_continues(transitions[3], transitions[1])
    assert len({key for _, _, key in stage.sampler.submitted}) == 4
    assert answer.usage is not None and answer.usage.completion_tokens == sum(len(t.response_ids) for t in transitions[:3])


def test_n_choices_stream_by_index(stage: Stage) -> None:
    stage.play(["Aa", "Bb"])
    texts = ["", ""]
    finished = []
    for chunk in stage.client().chat.completions.create(model="policy", messages=[USER], n=2, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        finished += [choice.index] if choice.finish_reason else []
    assert (texts, finished) == (["Aa", "Bb"], [0, 1])


def test_the_async_client_in_many_calls_at_once(stage: Stage) -> None:
    stage.play(lambda prompt: prompt.split("user\n")[1].split("<")[0][::-1], spell=False)

    async def ask(client: Any, text: str) -> str:
        answer = await client.chat.completions.create(model="policy", messages=[{"role": "user", "content": text}])
        return answer.choices[0].message.content

    async def run() -> list[str]:
        async with stage.async_client() as client:
            return await asyncio.gather(*(ask(client, f"word{k}") for k in range(6)))

    assert asyncio.run(run()) == [f"{k}drow" for k in range(6)]
    assert len(stage.transitions()) == 6


def test_tool_calls_reach_the_client(stage: Stage) -> None:
    stage.play(["Wait.\n" + CALL])
    choice = stage.client().chat.completions.create(model="policy", messages=[USER], tools=[SEARCH]).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Wait.")
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.id.startswith("call_")
    assert (call.function.name, json.loads(call.function.arguments)) == ("search", {"query": "é"})


def test_tool_choice_none_keeps_the_conversation_and_parses_nothing(stage: Stage) -> None:
    stage.play(["A", CALL])
    client = stage.client()
    said: Any = client.chat.completions.create(model="policy", messages=[USER], tools=[SEARCH]).choices[0].message.model_dump()
    messages = [USER, said, {"role": "user", "content": "Now?"}]
    last = client.chat.completions.create(model="policy", messages=messages, tools=[SEARCH], tool_choice="none").choices[0]
    assert (last.message.content, last.message.tool_calls, last.finish_reason) == (CALL, None, "stop")
    first, second = stage.transitions()
    assert_continues(second, first)


@pytest.mark.parametrize(
    ("choice", "prefill", "said"),
    [
        ("required", "<tool_call>", '{"name": "search", "arguments": {"query": "x"}}</tool_call>'),
        (
            {"type": "function", "function": {"name": "search"}},
            '<tool_call>{"name": "search", "arguments": ',
            '{"query": "x"}}</tool_call>',
        ),
    ],
    ids=["required", "named"],
)
def test_a_forced_tool_call_is_opened_for_the_policy(stage: Stage, choice: Any, prefill: str, said: str) -> None:
    stage.play([said, "Done."])
    client = stage.client()
    message = client.chat.completions.create(model="policy", messages=[USER], tools=[SEARCH], tool_choice=choice).choices[0].message
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments) == {"query": "x"}
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "r"}
    client.chat.completions.create(model="policy", messages=[USER, message.model_dump(), result], tools=[SEARCH])
    first, second = stage.transitions()
    assert stage.read(first.prompt_ids).endswith("<|im_start|>assistant\n" + prefill)
    assert first.text == said
    assert_continues(second, first)
