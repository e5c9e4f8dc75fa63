"""`/v1/responses` through the openai client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.gateway.conftest import Stage, assert_continues
from tests.gateway.scripted_sampler import ScriptedSampler

SEARCH: Any = {
    "type": "function",
    "name": "search",
    "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
}
CALL = '<tool_call>{"name": "search", "arguments": {"query": "é"}}</tool_call>'


def test_text_in_and_out(stage: Stage) -> None:
    stage.play(["In France."])
    answer = stage.client().responses.create(model="policy:writer", input="Where is Paris?", instructions="Be brief.")
    assert (answer.status, answer.output_text, answer.model) == ("completed", "In France.", "policy:writer")
    (transition,) = stage.transitions()
    assert stage.read(transition.prompt_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nWhere is Paris?<|im_end|><|im_start|>assistant\n"
    )
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(transition.prompt_ids), len(transition.response_ids))
    assert [message["role"] for message in transition.messages] == ["system", "user"]


def test_a_tool_conversation_goes_on_token_by_token(stage: Stage) -> None:
    stage.play(["Wait. " + CALL, CALL + CALL, CALL, "In France."])
    client = stage.client()
    items: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "Where?"}]}]
    for k in range(4):
        answer = client.responses.create(model="policy", input=items, tools=[SEARCH])
        items += [item.model_dump(exclude_none=True) for item in answer.output]
        calls = [item for item in answer.output if item.type == "function_call"]
        items += [{"type": "function_call_output", "call_id": call.call_id, "output": f"r{k}"} for call in calls]
        assert all(json.loads(call.arguments) == {"query": "é"} for call in calls)
    assert answer.output_text == "In France."
    transitions = stage.transitions()
    for earlier, later in zip(transitions, transitions[1:], strict=False):
        assert_continues(later, earlier)
    assert stage.read(transitions[2].prompt_ids).endswith(
        "<|im_start|>tool\n<tool_response>r1</tool_response><tool_response>r1</tool_response><|im_end|><|im_start|>assistant\n"
    )


def test_a_previous_response_id_stands_for_its_conversation(stage: Stage) -> None:
    stage.play([CALL, "Done.", "More."])
    client = stage.client()
    request: Any = {"model": "policy", "instructions": "Be brief.", "tools": [SEARCH]}
    first = client.responses.create(**request, input="Where?")
    (call,) = first.output
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "r"}
    second = client.responses.create(**request, input=[output], previous_response_id=first.id)
    client.responses.create(**request, input="And?", previous_response_id=second.id)
    transitions = stage.transitions()
    assert [t.continues for t in transitions] == [None, 0, 1]
    assert_continues(transitions[1], transitions[0])
    assert_continues(transitions[2], transitions[1])


@pytest.mark.parametrize(
    ("said", "tools"),
    [("In é France.", []), ("", []), (CALL, [SEARCH]), ("Wait.\n" + CALL + CALL, [SEARCH]), ("cut" + ScriptedSampler.CUT, [])],
)
def test_streaming_says_the_same_as_not_streaming(stage: Stage, said: str, tools: list[Any]) -> None:
    stage.play([said, said])
    client = stage.client()
    whole = client.responses.create(model="policy", input="hi", tools=tools)
    events = list(client.responses.create(model="policy", input="hi", tools=tools, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last.type == f"response.{whole.status}"
    final = last.response

    def content(response: Any) -> list[Any]:
        return [
            (item.type, item.content[0].text.strip() if item.type == "message" else (item.name, item.arguments)) for item in response.output
        ]

    assert content(final) == content(whole)
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == final.output_text
    done = [event.item.id for event in events if event.type == "response.output_item.done"]
    assert done == [item.id for item in final.output]
    assert final.usage == whole.usage


def test_a_response_cut_by_length_is_incomplete(stage: Stage) -> None:
    stage.play(["a b c d e f"])
    answer = stage.client().responses.create(model="policy", input="hi", max_output_tokens=3)
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None and answer.incomplete_details.reason == "max_output_tokens"


def test_logprobs_on_request(stage: Stage) -> None:
    stage.play(["ab"])
    answer = stage.client().responses.create(model="policy", input="hi", include=["message.output_text.logprobs"], top_logprobs=1)
    (item,) = answer.output
    (transition,) = stage.transitions()
    entries = item.content[0].logprobs
    assert [entry.logprob for entry in entries] == [float(value) for value in transition.logprobs]
    assert [len(entry.top_logprobs) for entry in entries] == [1] * len(entries)


def test_a_named_tool_is_called(stage: Stage) -> None:
    stage.play(['{"query": "x"}}</tool_call>'])
    choice: Any = {"type": "function", "name": "search"}
    answer = stage.client().responses.create(model="policy", input="hi", tools=[SEARCH], tool_choice=choice)
    assert [(item.name, item.arguments) for item in answer.output] == [("search", '{"query": "x"}')]


def test_a_stream_whose_sampler_fails_ends_with_an_error_event(stage: Stage) -> None:
    stage.play(["A"])
    stage.sampler.error = ValueError("no memory")
    last = list(stage.client().responses.create(model="policy", input="hi", stream=True))[-1]
    assert (last.type, last.message) == ("error", "The sampler failed: ValueError: no memory")
    assert stage.transitions() == ()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input.0.type"),
        ({"input": [{"content": "x"}]}, "input.0.role"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.arguments"),
        ({"input": [{"type": "function_call_output", "call_id": "x"}]}, "input.0.output"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"previous_response_id": "resp_nobody"}, "previous_response_id"),
        ({"n": 2}, "n"),
    ],
)
def test_a_malformed_body_is_400_and_names_the_field(stage: Stage, change: dict[str, Any], param: str) -> None:
    stage.play([])
    with pytest.raises(openai.BadRequestError) as caught:
        stage.client().post("/responses", cast_to=object, body={"model": "policy", "input": "hi", **change})
    assert caught.value.param == param


def test_response_ids_do_not_leak_between_rollouts(stage: Stage) -> None:
    stage.play(["A"])
    answer = stage.client().responses.create(model="policy", input="hi")
    stage.record()
    stage.play(["B"], rollout="another")
    with pytest.raises(openai.BadRequestError, match="not found in this rollout"):
        stage.client().responses.create(model="policy", input="hi", previous_response_id=answer.id)
