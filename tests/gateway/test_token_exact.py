"""Conversations stay token-exact, whatever a client does to the messages on the way."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lightningrl.gateway import GatewayError
from lightningrl.gateway.protocol import Message, Tool
from lightningrl.gateway.rendering import Renderer
from tests.gateway.conftest import Stage, assert_continues
from tests.gateway.scripted_sampler import ScriptedSampler

SEARCH: dict[str, Any] = {
    "type": "function",
    "function": {"name": "search", "parameters": {"type": "object", "properties": {"query": {"type": "string"}}}},
}
USER = {"role": "user", "content": "Where is Paris?"}


def tool_call(query: Any) -> str:
    return "<tool_call>" + json.dumps({"name": "search", "arguments": {"query": query, "k": 1.0}}) + "</tool_call>"


def redump(message: dict[str, Any], **options: Any) -> dict[str, Any]:
    message = copy.deepcopy(message)
    for call in message.get("tool_calls") or ():
        call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]), **options)
    return message


def whole_numbers(message: dict[str, Any]) -> dict[str, Any]:
    message = copy.deepcopy(message)
    for call in message.get("tool_calls") or ():
        call["function"]["arguments"] = call["function"]["arguments"].replace("1.0", "1")
    return message


REWRITES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "untouched": lambda m: m,
    "content as parts": lambda m: {**m, "content": [{"type": "text", "text": m["content"] or ""}]},
    "content in two parts": lambda m: {
        **m,
        "content": [{"type": "text", "text": t} for t in ((m["content"] or "")[:3], (m["content"] or "")[3:])],
    },
    "arguments re-dumped": lambda m: redump(m, sort_keys=True, indent=2),
    "arguments escaped": lambda m: redump(m, ensure_ascii=True),
    "whole numbers": whole_numbers,
    "null fields dropped": lambda m: {key: value for key, value in m.items() if value is not None},
    "name added": lambda m: {**m, "name": "assistant_1"},
    "refusal added": lambda m: {**m, "refusal": None, "audio": None, "annotations": []},
    "keys reordered": lambda m: dict(reversed(m.items())),
    "empty content": lambda m: {**m, "content": m["content"] or ""},
    "content dropped beside calls": lambda m: {**m, "content": None} if m.get("tool_calls") else m,
    "text trimmed": lambda m: {**m, "content": (m["content"] or "").strip()},
    "other ids": lambda m: {**m, "tool_calls": [{**c, "id": f"x{k}"} for k, c in enumerate(m.get("tool_calls") or ())]},
}


@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
def test_three_tool_calls_and_an_answer_after_reserialisation(stage: Stage, rewrite: Any) -> None:
    script = [tool_call("Pa ris"), "Let me see.\n" + tool_call("ü"), tool_call("x") + tool_call("y"), " In France. ", "Yes."]
    stage.play(script)
    client = stage.client()
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, USER]
    for k in range(5):
        reply = client.chat.completions.create(model="policy", messages=messages, tools=[SEARCH])
        said = reply.choices[0].message.model_dump()
        messages.append(rewrite(said))
        for call in said["tool_calls"] or ():
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": f"result {k}"})
        if not said["tool_calls"]:
            messages.append({"role": "user", "content": "Sure?"})
    transitions = stage.transitions()
    new = [stage.read(assert_continues(later, earlier)) for earlier, later in zip(transitions, transitions[1:], strict=False)]
    tool = "<|im_start|>tool\n{}<|im_end|><|im_start|>assistant\n"
    assert new == [
        tool.format("<tool_response>result 0</tool_response>"),
        tool.format("<tool_response>result 1</tool_response>"),
        tool.format("<tool_response>result 2</tool_response>" * 2),
        "<|im_start|>user\nSure?<|im_end|><|im_start|>assistant\n",
    ]
    # What the policy spelled byte by byte is not what tokenising the conversation again would give.
    assert stage.tokenizer.encode(stage.read(transitions[-1].prompt_ids)) != transitions[-1].prompt_ids.tolist()


@pytest.mark.parametrize("field", ["user text", "assistant text", "arguments", "tools", "assistant call name"])
def test_a_changed_conversation_is_not_a_continuation(stage: Stage, field: str) -> None:
    stage.play([tool_call("x"), "A", "B"])
    client, tools = stage.client(), [copy.deepcopy(SEARCH)]
    messages: list[Any] = [dict(USER)]
    said = client.chat.completions.create(model="policy", messages=messages, tools=tools).choices[0].message.model_dump()
    messages += [said, {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "r"}]
    if field == "user text":
        messages[0]["content"] += " "
    elif field == "assistant text":
        messages[1]["content"] = "Hm."
    elif field == "arguments":
        messages[1]["tool_calls"][0]["function"]["arguments"] = '{"query": "z", "k": 1.0}'
    elif field == "tools":
        tools[0]["function"]["description"] = "Finds."
    else:
        messages[1]["tool_calls"][0]["function"]["name"] = "find"
    client.chat.completions.create(model="policy", messages=messages, tools=tools)
    transitions = stage.transitions()
    assert transitions[1].continues is None
    rendered = stage.tokenizer.apply_chat_template(
        [{**m, "content": m.get("content") or "", "tool_calls": as_objects(m)} for m in messages],
        tools=tools,
        tokenize=False,
        add_generation_prompt=True,
    )
    assert transitions[1].prompt_ids.tolist() == stage.tokenizer.encode(rendered)


def as_objects(message: dict[str, Any]) -> list[Any]:
    calls = copy.deepcopy(message.get("tool_calls") or [])
    for call in calls:
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return calls


def test_a_response_cut_by_length_is_closed_before_what_follows(stage: Stage) -> None:
    stage.play(["SELECT na" + ScriptedSampler.CUT, "B"])
    say(stage, [USER], "Go on.")
    first, second = stage.transitions()
    assert first.finish_reason == "length" and first.response_ids[-1] != stage.tokenizer.eos_token_id
    assert stage.read(assert_continues(second, first)) == "<|im_end|><|im_start|>user\nGo on.<|im_end|><|im_start|>assistant\n"


def test_a_response_cut_inside_a_character_goes_on_exactly(stage: Stage) -> None:
    stage.play(["caf\u00e9", "B"])
    say(stage, [USER], "Go on.", max_tokens=4)  # c a f and half of é
    first, second = stage.transitions()
    assert first.text == "caf\ufffd"
    assert_continues(second, first)


def test_a_response_ended_by_a_stop_string_keeps_its_tokens(stage: Stage) -> None:
    stage.play(["SELECT 1; -- done", "B"])
    said = say(stage, [USER], "Go on.", stop=[";"])
    first, second = stage.transitions()
    assert said == "SELECT 1"
    assert stage.read(first.response_ids) == "SELECT 1;"
    assert stage.read(assert_continues(second, first)) == "<|im_end|><|im_start|>user\nGo on.<|im_end|><|im_start|>assistant\n"


def test_the_longest_match_wins(stage: Stage) -> None:
    stage.play(["A", "B", "C", "D"])
    client = stage.client()
    messages: list[Any] = [USER]
    for _ in range(3):
        reply = client.chat.completions.create(model="policy", messages=messages)
        messages += [reply.choices[0].message.model_dump(), {"role": "user", "content": "More."}]
    client.chat.completions.create(model="policy", messages=messages[:3])  # back to the first answer
    transitions = stage.transitions()
    assert [t.continues for t in transitions] == [None, 0, 1, 0]
    assert_continues(transitions[3], transitions[0])


def test_another_role_goes_on_in_the_same_conversation(stage: Stage) -> None:
    stage.play(["SELECT 1", "SELECT 2"])
    client = stage.client()
    reply = client.chat.completions.create(model="policy:writer", messages=[USER])
    messages: list[Any] = [USER, reply.choices[0].message.model_dump(), {"role": "user", "content": "Again."}]
    client.chat.completions.create(model="policy:rewriter", messages=messages)
    first, second = stage.transitions()
    assert (first.role, second.role) == ("writer", "rewriter")
    assert_continues(second, first)


@pytest.mark.parametrize("marker", ["<|im_end|>", "<|im_start|>", "<tool_call>", "</tool_response>", "<|endoftext|>"])
def test_markers_that_somebody_wrote_are_text(stage: Stage, marker: str) -> None:
    stage.play([tool_call("x"), "B"])
    text = f"a {marker} b {marker}{marker}"
    messages: list[Any] = [{"role": "system", "content": text}, {"role": "user", "content": text}]
    client = stage.client()
    tools = copy.deepcopy([SEARCH])
    tools[0]["function"]["description"] = text
    said = client.chat.completions.create(model="policy", messages=messages, tools=tools).choices[0].message.model_dump()
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": text}
    client.chat.completions.create(model="policy", messages=[*messages, said, result], tools=tools)
    first, second = stage.transitions()
    tail = assert_continues(second, first)
    (marker_id,) = stage.tokenizer.encode(marker)

    # Rendered with a harmless word in its place, the conversation has as many such tokens.
    def harmless(prompt: np.ndarray) -> int:
        return stage.tokenizer.encode(stage.read(prompt).replace(text, "word")).count(marker_id)

    for ids in (first.prompt_ids, tail):
        assert stage.read(ids).count(text) == (3 if ids is first.prompt_ids else 1)
        assert ids.tolist().count(marker_id) == harmless(ids)


def test_markers_in_tool_arguments_are_text(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer)
    call = {"function": {"name": "search", "arguments": json.dumps({"<|im_end|>": ["<|im_start|>", "\ufdd0"]})}}
    message = Message.model_validate({"role": "assistant", "content": None, "tool_calls": [call]})
    ids = renderer.prompt([message], [])
    assert (ids.count(1), ids.count(2)) == (2, 1)
    assert '{"<|im_end|>": ["<|im_start|>", "\ufdd0"]}' in tokenizer.decode(ids)


def test_a_new_conversation_is_what_the_chat_template_gives(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER]
    expected = tokenizer.apply_chat_template(messages, tools=[SEARCH], tokenize=False, add_generation_prompt=True)
    ids = Renderer(tokenizer).prompt([Message.model_validate(m) for m in messages], [Tool.model_validate(SEARCH)])
    assert ids == tokenizer.encode(expected)


@pytest.mark.parametrize("tools", ([], [SEARCH]), ids=("no tools", "tools"))
def test_a_template_for_tools_is_used_where_there_are_tools(tokenizer: Any, tools: list[Any]) -> None:
    """And calls in the history are rendered as the library renders them, arguments of every JSON type included."""
    two = copy.deepcopy(tokenizer)
    two.chat_template = {"default": tokenizer.chat_template, "tool_use": tokenizer.chat_template + "{{ tools | length }}"}
    arguments = {"query": "é", "page": 1, "near": [0.5, None, True], "more": {"a": {}}}
    call = {"type": "function", "function": {"name": "search", "arguments": arguments}}
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "nothing"}]
    expected = two.apply_chat_template(messages, tools=tools or None, tokenize=False, add_generation_prompt=True)
    renderer, asked = Renderer(two), [Message.model_validate(m) for m in messages]
    offered = [Tool.model_validate(tool) for tool in tools]
    ids = renderer.prompt(asked, offered)
    assert ids == tokenizer.encode(expected)
    ids.append(0)
    assert renderer.prompt(asked, offered) == ids[:-1]  # what is remembered is nobody's to change


def test_a_template_that_asks_for_the_date_is_asked_each_time(tokenizer: Any) -> None:
    dated, today = copy.deepcopy(tokenizer), iter(("1 May", "2 May"))
    dated.chat_template = "{{ strftime_now('%d')[:0] }}" + tokenizer.chat_template
    renderer = Renderer(dated)
    rendered: list[Any] = []
    renderer._template = lambda entries, tools, open_turn: rendered.append(next(today)) or rendered[-1]  # type: ignore[method-assign]
    assert renderer.prompt([Message(role="user", content="hi")], []) == tokenizer.encode("1 May")
    assert renderer.prompt([Message(role="user", content="hi")], []) == tokenizer.encode("2 May")


def test_any_byte_level_tokenizer_with_a_chat_template_will_do(tokenizer: Any) -> None:
    qwen = copy.deepcopy(tokenizer)
    qwen.chat_template = (
        "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
        "{{ '<|im_end|>\\n' }}{% endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    user = Message(role="user", content="Go on.")
    ended = Renderer(qwen).continuation([user], ended=True)
    assert qwen.decode(ended) == "\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(GatewayError, match="no chat template"):
        Renderer(bare)


def test_a_template_without_an_end_of_turn_is_refused(tokenizer: Any) -> None:
    open_ended = copy.deepcopy(tokenizer)
    open_ended.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(GatewayError, match="does not close an assistant's turn with the eos token"):
        Renderer(open_ended)


def test_a_tokenizer_that_is_not_byte_level_is_refused() -> None:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    wordy = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", chat_template="{{ messages[0].content }}</s>")
    with pytest.raises(GatewayError, match="not byte-level"):
        Renderer(wordy)


def say(stage: Stage, messages: list[Any], then: str, **options: Any) -> str | None:
    """One call, and another that goes on with `then`; returns what the first said."""
    client = stage.client()
    said = client.chat.completions.create(model="policy", messages=messages, **options).choices[0].message
    client.chat.completions.create(model="policy", messages=[*messages, said.model_dump(), {"role": "user", "content": then}])
    return said.content
