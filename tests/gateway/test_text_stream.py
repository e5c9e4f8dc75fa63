"""Tool calls in text, and text that may be sent already: any text, cut anywhere."""

from __future__ import annotations

import json
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from lightningrl.gateway.rendering import Renderer
from lightningrl.gateway.text_stream import TextStream, cut
from lightningrl.gateway.tool_calls import OPEN, ParsedCall, parse_reply

TOOLS = {"f", "g"}
FRAGMENTS = [
    "<tool_call>",
    "</tool_call>",
    '{"name": "f", "arguments": {"a": 1}}',
    "<tool",
    "STOP",
    "ST",
    "x",
    " ",
    "é😀",
    "\n",
]


def call(arguments: str, name: str = "f") -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("plain", "plain", []),
        ("", "", []),
        (call('{"a": [1, null]}'), None, [("f", '{"a": [1, null]}')]),
        ("Wait.\n" + call("{}"), "Wait.", [("f", "{}")]),
        (call("{}") + call("{}", "g") + " so", "so", [("f", "{}"), ("g", "{}")]),
        ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', None, [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}}', None, [("f", "{}")]),
        ('<tool_call>{"name": "f"}</tool_call>', None, [("f", "{}")]),
        (call('"{\\"a\\": 1}"'), None, [("f", '{"a": 1}')]),
        (call('{"q": "é"}'), None, [("f", '{"q": "é"}')]),
        (call('{"q": "\\u00e9"}'), None, [("f", '{"q": "é"}')]),
    ],
)
def test_calls_are_parsed(text: str, content: str | None, calls: list[Any]) -> None:
    reply = parse_reply(text, TOOLS)
    assert (reply.content, reply.calls) == (content, tuple(ParsedCall(*pair) for pair in calls))


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{broken</tool_call>",
        "<tool_call>[]</tool_call>",
        "<tool_call></tool_call>",
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        call("[]"),
        call('"text"'),
        call("NaN"),
        call('{"a": NaN}'),
        call('{"a": 1e999}'),
        call('{"q": "\\ud800"}'),
        call("{}", name="unknown"),
        "<tool_call>" + "[" * 100_000,
        "</tool_call>",
    ],
)
def test_what_is_no_call_of_an_offered_tool_stays_text(text: str) -> None:
    reply = parse_reply("a " + text, TOOLS)
    assert (reply.content, reply.calls) == ("a " + text, ())


def test_a_broken_call_beside_a_good_one_stays_text() -> None:
    reply = parse_reply(call("{}") + "<tool_call>{</tool_call>", TOOLS)
    assert (reply.content, len(reply.calls)) == ("<tool_call>{</tool_call>", 1)


def test_without_tools_nothing_is_a_call() -> None:
    assert parse_reply(call("{}"), ()).calls == ()


@pytest.mark.slow
@hypothesis.given(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=8).map("".join), st.data())
def test_released_text_is_always_a_beginning_of_the_final_text(tokenizer: Any, text: str, data: st.DataObject) -> None:
    renderer, stops = Renderer_of(tokenizer), ("STOP", "\n\n")
    ids = tokenizer.encode(text)
    stream = TextStream(renderer, stops, OPEN)
    released, at = "", 0
    while at < len(ids):
        at += data.draw(st.integers(1, 4))
        released += stream.feed(ids[:at])
        assert stream.released == len(released)
    final = parse_reply(cut(renderer.text(ids), stops), TOOLS).words
    assert final.startswith(released)


def test_text_without_markers_is_released_at_once(tokenizer: Any) -> None:
    ids = tokenizer.encode("How many singers")
    stream = TextStream(Renderer_of(tokenizer), ("STOP",), OPEN)
    assert [stream.feed(ids[: k + 1]) for k in range(len(ids))] == [tokenizer.decode([token]) for token in ids]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [("a;b", (";",), "a"), ("abc", ("c", "b"), "a"), ("abc", (), "abc"), ("abc", ("x",), "abc"), (";", (";",), "")],
)
def test_cut(text: str, stops: tuple[str, ...], expected: str) -> None:
    assert cut(text, stops) == expected


_renderers: dict[int, Renderer] = {}


def Renderer_of(tokenizer: Any) -> Renderer:  # noqa: N802
    return _renderers.setdefault(id(tokenizer), Renderer(tokenizer))


@pytest.mark.slow
@hypothesis.given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=5))
def test_any_arguments_come_through_as_they_are(value: Any) -> None:
    arguments = {"value": value}
    (parsed,) = parse_reply(OPEN + json.dumps({"name": "f", "arguments": arguments}) + "</tool_call>", TOOLS).calls
    assert json.loads(parsed.arguments) == arguments
