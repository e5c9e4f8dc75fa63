"""Tool calls in the policy's text: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection
from typing import Any

from lightningrl.gateway.errors import is_unicode

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_DEEPEST = 100  # brackets in a call: a policy that only writes brackets must not exhaust the stack
_BLOCK = re.compile(re.escape(OPEN) + r"(.*?)(?:" + re.escape(CLOSE) + r"|\Z)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class ParsedCall:
    name: str
    arguments: str  # JSON of an object


@dataclasses.dataclass(frozen=True)
class Reply:
    """An assistant's turn: the words outside its tool calls, and the calls."""

    words: str
    calls: tuple[ParsedCall, ...] = ()

    @property
    def content(self) -> str | None:
        """The words as a client sees them: trimmed beside tool calls, and None where there are only calls."""
        return (self.words.strip() or None) if self.calls else self.words


def parse_reply(text: str, tools: Collection[str]) -> Reply:
    """Splits a response into words and calls of the offered `tools`.

    A block that is no JSON object with `name` and `arguments`, or that names a tool which was not offered, stays plain text:
    most frameworks stop an agent at a call they can't parse, and the run would then be lost instead of earning a low reward.
    The end marker may be missing at the end of the text.
    """
    if not tools or OPEN not in text:
        return Reply(text)
    calls: list[ParsedCall] = []

    def take(match: re.Match[str]) -> str:
        call = _parse_call(match.group(1), tools)
        if call is None:
            return match.group(0)
        calls.append(call)
        return ""

    return Reply(_BLOCK.sub(take, text), tuple(calls))


def _parse_call(block: str, tools: Collection[str]) -> ParsedCall | None:
    if block.count("{") + block.count("[") > _DEEPEST:
        return None
    try:
        call: Any = json.loads(block)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or call["name"] not in tools:
            return None
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(arguments, dict) or not is_unicode(arguments):
            return None
        return ParsedCall(call["name"], json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except ValueError:
        return None
