"""A conversation's request through the session to the sampler and back: what chat completions and responses share."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lightningrl.gateway.calls import Call
from lightningrl.gateway.conversations import fingerprints
from lightningrl.gateway.errors import ApiError
from lightningrl.gateway.protocol import FunctionCall, Message, NamedTool, Tool, ToolCall, ToolChoice
from lightningrl.gateway.rendering import Renderer, as_ids
from lightningrl.gateway.sessions import Incoming, Session
from lightningrl.gateway.text_stream import TextStream, cut
from lightningrl.gateway.tool_calls import OPEN, Reply, parse_reply
from lightningrl.types import Sampler


@dataclasses.dataclass
class Exchange:
    """A call, and how its tokens read for the client that asked.

    `tool_choice` "none" parses no calls (the tools stay in the prompt, so the conversation stays token-exact). "required" and a
    named tool open the call for the policy: `prefill` ends the prompt and begins the reply.
    """

    session: Session
    call: Call
    renderer: Renderer
    tools: frozenset[str]
    prefill: str

    def reply(self, choice: int) -> Reply:
        """What a finished choice says."""
        text = self.renderer.text(self.call.choices[choice].seen)
        return parse_reply(self.prefill + cut(text, self.call.params.stop), self.tools)

    def text_stream(self) -> TextStream:
        return TextStream(self.renderer, self.call.params.stop, OPEN if self.tools else None, hold=bool(self.prefill))

    def call_id(self, choice: int, index: int) -> str:
        """A tool call's id: the same whenever the same run is repeated."""
        return "call_" + "".join(f"{word:08x}" for word in self.call.choices[choice].key) + f"{index:02x}"

    def message(self, choice: int) -> Message:
        reply = self.reply(choice)
        calls = [
            ToolCall(id=self.call_id(choice, k), function=FunctionCall(name=call.name, arguments=call.arguments))
            for k, call in enumerate(reply.calls)
        ]
        return Message(role="assistant", content=reply.content, tool_calls=calls or None)

    def finish_reason(self, choice: int, reply: Reply) -> str:
        completion = self.call.choices[choice].completion
        assert completion is not None
        return "tool_calls" if reply.calls else completion.finish_reason

    @property
    def prompt_tokens(self) -> int:
        return len(self.call.prompt_ids)

    @property
    def response_tokens(self) -> int:
        return sum(len(choice.seen) for choice in self.call.choices)

    async def finished(self, request: Request) -> None:
        """Waits for the call; raises its error. A client that hangs up meanwhile ends the call, unless a retry waits too."""
        self.call.waiters += 1
        gone = asyncio.ensure_future(request.receive())
        gone.add_done_callback(lambda _: self.call.announce())
        try:
            while self.call.state == "running" and not gone.done():
                await self.call.wait()
            if self.call.state == "running":
                raise ApiError(499, "The client closed the connection.")
            await self.call.finished()
        except ApiError as error:
            _remember_if_retried(self.session, self.call.fingerprint, error)
            raise
        finally:
            gone.cancel()
            self.leave()

    def leave(self) -> None:
        self.call.waiters -= 1
        if self.call.waiters == 0:
            self.session.abandon(self.call)


def converse(
    session: Session,
    sampler: Sampler,
    renderer: Renderer,
    request: Incoming,
    tools: Sequence[Tool],
    tool_choice: ToolChoice | None,
) -> Exchange:
    """Starts the call that answers `request`, or joins the one it retries; raises `ApiError`."""
    names = frozenset(tool.function.name for tool in tools)
    prefill = _prefill(tool_choice, names)
    offered = frozenset() if tool_choice == "none" else names

    def exchange(call: Call) -> Exchange:
        return Exchange(session, call, renderer, offered, prefill)

    def on_done(call: Call) -> None:
        replies = [exchange(call).message(k) for k in range(len(call.choices))]
        session.conversations.add(call, said, replies)

    call = session.retried(request)
    if call is None:
        said = fingerprints(request.messages, tools)
        prompt_ids, extends = session.conversations.prompt(request.messages, tools, said, renderer)
        if prefill:
            prompt_ids = np.concatenate([prompt_ids, as_ids(renderer.raw(prefill))])
        call = begin(session, sampler, request, prompt_ids, extends, on_done)
    return exchange(call)


def begin(
    session: Session,
    sampler: Sampler,
    request: Incoming,
    prompt_ids: np.ndarray,
    extends: tuple[Call, int] | None,
    on_done: Callable[[Call], None],
) -> Call:
    """`Session.start`, keeping in mind that a client comes back after some errors."""
    try:
        return session.start(request, prompt_ids, extends, sampler, on_done)
    except ApiError as error:
        _remember_if_retried(session, request.fingerprint, error)
        raise


def _remember_if_retried(session: Session, fingerprint: bytes, error: ApiError) -> None:
    # The statuses after which OpenAI's clients try again.
    if error.status in (408, 409, 429) or error.status >= 500:
        session.turned_away(fingerprint)


def _prefill(choice: ToolChoice | None, names: frozenset[str]) -> str:
    if choice == "required":
        if not names:
            raise ApiError(400, "tool_choice is 'required' but no tools are given.", param="tool_choice")
        return OPEN
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in names:
            raise ApiError(400, f"tool_choice names '{name}', which is not among the tools.", param="tool_choice")
        return f'{OPEN}{{"name": "{name}", "arguments": '
    return ""


class EventStream(StreamingResponse):
    """Server-sent events of an exchange; the client's leaving is noticed whenever it happens."""

    def __init__(self, exchange: Exchange, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._exchange = exchange
        exchange.call.waiters += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.leave()
