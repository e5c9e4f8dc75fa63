"""Token-exact conversations: finding the earlier call that new messages go on from.

A client sends text; what the policy saw and wrote was tokens, and text tokenised again may give others. So a request is
compared with what earlier calls of its rollout were asked and answered, in a form that survives re-serialisation, and on a
match the recorded tokens are used. Two messages are the same if speaker, text and tool calls (names, and arguments as JSON
values) are; ids, names, `refusal`, order of keys and null fields don't count, nor does white space around an assistant's text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lightningrl.gateway.calls import Call
from lightningrl.gateway.protocol import Message, Tool
from lightningrl.gateway.rendering import Renderer, as_ids, parsed_arguments


class Conversations:
    """The finished turns of one rollout, found by what was said up to and including them."""

    def __init__(self) -> None:
        self._turns: dict[bytes, tuple[Call, int]] = {}
        self._texts: list[tuple[str, Call, int]] = []

    def add(self, call: Call, said: Sequence[bytes], replies: Sequence[Message]) -> None:
        """Records a finished call, what was `said` to it (`fingerprints`), and the assistant's message of each of its choices."""
        for choice, reply in enumerate(replies):
            # Some clients drop the words beside tool calls.
            forms = [reply, reply.model_copy(update={"content": None})] if reply.tool_calls else [reply]
            for form in forms:
                key = _extend(said[-1], form)
                # Of equal turns the one that arrived first is kept, whichever finished first.
                if key not in self._turns or self._turns[key][0].arrival > call.arrival:
                    self._turns[key] = (call, choice)

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool], said: Sequence[bytes], renderer: Renderer
    ) -> tuple[np.ndarray, tuple[Call, int] | None]:
        """Prompt ids int32 [p] of a request, and the (call, choice) they extend: that of the longest match, or None.

        `said` is the `fingerprints` of `messages` and `tools`.
        """
        for length in range(len(messages), 0, -1):
            earlier = self._turns.get(said[length])
            if earlier is None:
                continue
            call, choice = earlier
            response = call.choices[choice].token_ids
            new = renderer.continuation(messages[length:], ended=_ended(response, renderer.end_id))
            if new is not None:
                return np.concatenate([call.prompt_ids, response, as_ids(new)]), earlier
        return as_ids(renderer.prompt(messages, tools)), None

    def add_text(self, prompt: str, call: Call, renderer: Renderer) -> None:
        """Records a finished call of the text completion endpoint."""
        for choice, produced in enumerate(call.choices):
            self._texts.append((prompt + renderer.text(produced.seen), call, choice))

    def text_prompt(self, prompt: str, renderer: Renderer) -> tuple[np.ndarray, tuple[Call, int] | None]:
        """The same for a text prompt: it goes on from a call if it starts with that call's prompt and response.

        A response that the policy ended goes on only where the text has the end-of-turn marker too.
        """
        best: tuple[str, Call, int] | None = None
        for text, call, choice in self._texts:
            ended = _ended(call.choices[choice].token_ids, renderer.end_id)
            whole = text + renderer.end if ended else text
            if prompt.startswith(whole) and (best is None or len(whole) > len(best[0])):
                best = (whole, call, choice)
        if best is None:
            return as_ids(renderer.raw(prompt)), None
        whole, call, choice = best
        new = as_ids(renderer.raw(prompt[len(whole) :]))
        return np.concatenate([call.prompt_ids, call.choices[choice].token_ids, new]), (call, choice)


def _ended(response: np.ndarray, end_id: int) -> bool:
    return bool(len(response)) and int(response[-1]) == end_id


def fingerprints(messages: Iterable[Message], tools: Sequence[Tool]) -> list[bytes]:
    """Entry k stands for the tools and what the first k messages say."""
    definitions = _canonical([tool.function.model_dump(exclude_none=True) for tool in tools]) if tools else b""
    prints = [_digest(definitions)]
    for message in messages:
        prints.append(_extend(prints[-1], message))
    return prints


def _extend(prefix: bytes, message: Message) -> bytes:
    text = message.text.strip() if message.role == "assistant" else message.text
    # The length says where the text ends, so no text can pass for another one with calls.
    said = f"{message.speaker} {len(text)} {text}".encode()
    if not message.tool_calls:
        return _digest(prefix + said)
    calls = [(call.function.name, parsed_arguments(call.function.arguments)) for call in message.tool_calls]
    return _digest(prefix + said + _canonical(calls))


def _digest(said: bytes) -> bytes:
    return hashlib.blake2b(said, digest_size=16).digest()


def _canonical(value: Any) -> bytes:
    return json.dumps(_numbers(value), sort_keys=True, separators=(",", ":")).encode()


def _numbers(value: Any) -> Any:
    # A client in another language writes 1.0 back as 1.
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return [_numbers(item) for item in value] if isinstance(value, list | tuple) else value
