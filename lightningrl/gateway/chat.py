"""`/v1/chat/completions`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lightningrl.gateway.errors import ApiError, parse_body
from lightningrl.gateway.exchange import EventStream, Exchange, converse
from lightningrl.gateway.logprobs import token_logprobs
from lightningrl.gateway.protocol import ChatRequest
from lightningrl.gateway.service import Service
from lightningrl.gateway.sessions import Incoming
from lightningrl.gateway.tool_calls import Reply


async def chat_completions(service: Service, request: Request) -> Response:
    session = service.session(request)
    body = await service.body(request)
    fields, raw = parse_body(body, ChatRequest)
    if fields.response_format and fields.response_format.get("type") != "text":
        session.note("response_format is not enforced: the policy writes what it writes")
    incoming = Incoming(
        fields=fields,
        fingerprint=service.fingerprint(request, body),
        attempt=service.attempt(request),
        role=service.role(request, fields.model),
        messages=fields.messages,
        sent=tuple(raw["messages"]),
        max_tokens=fields.max_completion_tokens or fields.max_tokens,
        stream=bool(fields.stream),
        top_logprobs=(fields.top_logprobs or 0) if fields.logprobs else 0,
    )
    exchange = converse(session, service.sampler, service.renderer, incoming, fields.tools or (), fields.tool_choice)
    if fields.stream:
        return EventStream(exchange, _chunks(exchange, fields))
    await exchange.finished(request)
    return service.json(_completion(exchange, fields))


def _head(exchange: Exchange, fields: ChatRequest, kind: str) -> dict[str, Any]:
    call = exchange.call
    return {"id": f"chatcmpl-{call.id}", "object": kind, "created": call.created, "model": fields.model}


def _completion(exchange: Exchange, fields: ChatRequest) -> dict[str, Any]:
    choices = []
    for k in range(len(exchange.call.choices)):
        reply = exchange.reply(k)
        message: dict[str, Any] = {"role": "assistant", "content": reply.content, "refusal": None}
        if reply.calls:
            message["tool_calls"] = _tool_calls(exchange, k, reply)
        choices.append(
            {
                "index": k,
                "message": message,
                "logprobs": token_logprobs(exchange, k) if fields.logprobs else None,
                "finish_reason": exchange.finish_reason(k, reply),
            }
        )
    return {**_head(exchange, fields, "chat.completion"), "choices": choices, "usage": usage(exchange)}


async def _chunks(exchange: Exchange, fields: ChatRequest) -> AsyncIterator[bytes]:
    head = _head(exchange, fields, "chat.completion.chunk")

    def chunk(k: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": k, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event({**head, "choices": [choice]})

    choices = exchange.call.choices
    streams = [exchange.text_stream() for _ in choices]
    try:
        for k in range(len(choices)):
            yield chunk(k, {"role": "assistant", "content": "", "refusal": None})
        while exchange.call.state == "running":
            for k, stream in enumerate(streams):
                text = stream.feed(choices[k].seen)
                if text:
                    yield chunk(k, {"content": text})
            await exchange.call.wait()
        await exchange.call.finished()
        for k, stream in enumerate(streams):
            reply = exchange.reply(k)
            rest = reply.words[stream.released :]
            logprobs = token_logprobs(exchange, k) if fields.logprobs else None
            if rest or logprobs:
                yield chunk(k, {"content": rest}, logprobs=logprobs)
            for index, tool_call in enumerate(_tool_calls(exchange, k, reply)):
                yield chunk(k, {"tool_calls": [{"index": index, **tool_call}]})
            yield chunk(k, {}, exchange.finish_reason(k, reply))
        if fields.wants_usage:
            yield event({**head, "choices": [], "usage": usage(exchange)})
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield b"data: " + error.body + b"\n\n"


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _tool_calls(exchange: Exchange, k: int, reply: Reply) -> list[dict[str, Any]]:
    return [
        {
            "id": exchange.call_id(k, index),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for index, call in enumerate(reply.calls)
    ]


def usage(exchange: Exchange) -> dict[str, Any]:
    prompt, response = exchange.prompt_tokens, exchange.response_tokens
    return {"prompt_tokens": prompt, "completion_tokens": response, "total_tokens": prompt + response}
