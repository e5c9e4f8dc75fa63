"""The event stream of `/v1/responses`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from lightningrl.gateway.errors import ApiError
from lightningrl.gateway.exchange import Exchange


async def response_events(exchange: Exchange, shell: dict[str, Any], complete: Callable[[], dict[str, Any]]) -> AsyncIterator[bytes]:
    """Text as it is sampled, then the tool calls, each whole; `complete()` is the finished response."""
    events = _Events()
    call, stream = exchange.call, exchange.text_stream()
    message_id, begun = f"msg_{call.id}", False
    text_at = {"item_id": message_id, "output_index": 0, "content_index": 0}

    def words(text: str) -> Iterator[bytes]:
        nonlocal begun
        if not begun:
            begun = True
            item = {"type": "message", "id": message_id, "role": "assistant", "status": "in_progress", "content": []}
            yield events("response.output_item.added", output_index=0, item=item)
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield events("response.content_part.added", **text_at, part=part)
        if text:
            yield events("response.output_text.delta", **text_at, delta=text, logprobs=[])

    try:
        yield events("response.created", response=shell)
        yield events("response.in_progress", response=shell)
        while call.state == "running":
            text = stream.feed(call.choices[0].seen)
            if text:
                for line in words(text):
                    yield line
            await call.wait()
        await call.finished()
        reply = exchange.reply(0)
        rest = reply.words[stream.released :]
        response = complete()
        if reply.content is not None or begun:
            for line in words(rest):
                yield line
            for line in _message_done(events, response, message_id, text_at, reply.words):
                yield line
        for index, item in enumerate(response["output"]):
            if item["type"] == "function_call":
                for line in _function_call(events, index, item):
                    yield line
        kind = "response.incomplete" if response["status"] == "incomplete" else "response.completed"
        yield events(kind, response=response)
    except ApiError as error:
        details = json.loads(error.body)["error"]
        yield events("error", code=details["code"], message=details["message"], param=details["param"])


def _message_done(events: _Events, response: dict[str, Any], message_id: str, text_at: dict[str, Any], words: str) -> Iterator[bytes]:
    # What was streamed is what the finished response says, white space beside tool calls included.
    if not response["output"] or response["output"][0]["type"] != "message":
        item = {"type": "message", "id": message_id, "role": "assistant", "status": "completed", "content": []}
        part = {"type": "output_text", "text": words, "annotations": [], "logprobs": []}
        response["output"].insert(0, {**item, "content": [part]})
    item = response["output"][0]
    part = item["content"][0]
    part["text"] = words
    yield events("response.output_text.done", **text_at, text=words, logprobs=part["logprobs"])
    yield events("response.content_part.done", **text_at, part=part)
    yield events("response.output_item.done", output_index=0, item=item)


def _function_call(events: _Events, index: int, item: dict[str, Any]) -> Iterator[bytes]:
    at = {"item_id": item["id"], "output_index": index}
    yield events("response.output_item.added", output_index=index, item={**item, "arguments": "", "status": "in_progress"})
    yield events("response.function_call_arguments.delta", **at, delta=item["arguments"])
    yield events("response.function_call_arguments.done", **at, name=item["name"], arguments=item["arguments"])
    yield events("response.output_item.done", output_index=index, item=item)


class _Events:
    """Numbers events and writes them as server-sent ones."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._count, **fields}
        self._count += 1
        data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        return f"event: {kind}\ndata: {data}\n\n".encode()
