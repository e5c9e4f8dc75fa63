"""`/v1/responses`: the part of the Responses API that agents use: text, function tools, `previous_response_id`, streaming."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lightningrl.gateway.errors import ApiError, parse_body
from lightningrl.gateway.exchange import EventStream, Exchange, converse
from lightningrl.gateway.logprobs import token_logprobs
from lightningrl.gateway.protocol import (
    Function,
    FunctionCall,
    Item,
    Message,
    NamedFunction,
    NamedTool,
    Part,
    ResponsesRequest,
    Tool,
    ToolCall,
    ToolChoice,
)
from lightningrl.gateway.response_events import response_events
from lightningrl.gateway.service import Service
from lightningrl.gateway.sessions import Incoming


async def responses(service: Service, request: Request) -> Response:
    session = service.session(request)
    body = await service.body(request)
    fields, raw = parse_body(body, ResponsesRequest)
    form = (fields.text or {}).get("format") or {}
    if not isinstance(form, dict) or form.get("type", "text") != "text":
        session.note("text.format is not enforced: the policy writes what it writes")
    history = session.recall(fields.previous_response_id) if fields.previous_response_id else ()
    conversation = (*history, *_messages(fields.input))
    instructions = (Message(role="system", content=fields.instructions),) if fields.instructions else ()
    messages = (*instructions, *conversation)
    if not messages:
        raise ApiError(400, "The input is empty; it must hold at least one message.", code="invalid_value", param="input")
    logprobs = "message.output_text.logprobs" in (fields.include or ())
    incoming = Incoming(
        fields=fields,
        fingerprint=service.fingerprint(request, body),
        attempt=service.attempt(request),
        role=service.role(request, fields.model),
        messages=messages,
        sent=tuple(message.model_dump(exclude_none=True) for message in messages),
        max_tokens=fields.max_output_tokens,
        stream=bool(fields.stream),
        top_logprobs=(fields.top_logprobs or 0) if logprobs else 0,
        prompt_field="input",
    )
    tools = [
        Tool(function=Function(name=tool.name, description=tool.description, parameters=tool.parameters)) for tool in fields.tools or ()
    ]
    exchange = converse(session, service.sampler, service.renderer, incoming, tools, _tool_choice(fields))
    shell = _shell(exchange, fields, raw)

    def complete() -> dict[str, Any]:
        session.remember(shell["id"], (*conversation, exchange.message(0)))
        return {**shell, **_outcome(exchange, logprobs)}

    if fields.stream:
        return EventStream(exchange, response_events(exchange, shell, complete))
    await exchange.finished(request)
    return service.json(complete())


def _messages(items: str | list[Item]) -> list[Message]:
    """Input items as chat messages: an assistant's words and the calls right after them are one turn."""
    if isinstance(items, str):
        return [Message(role="user", content=items)]
    messages: list[Message] = []
    open_turn = False  # whether a function call belongs to the last message
    for k, item in enumerate(items):
        if item.type == "reasoning":
            continue
        if item.type == "function_call":
            name, arguments = _required(item.name, k, "name"), _required(item.arguments, k, "arguments")
            call = ToolCall(id=item.call_id, function=FunctionCall(name=name, arguments=arguments))
            if not open_turn:
                messages.append(Message(role="assistant"))
            messages[-1].tool_calls = [*(messages[-1].tool_calls or ()), call]
            open_turn = True
        elif item.type == "function_call_output":
            output: str | list[Part] = _required(item.output, k, "output")
            messages.append(Message(role="tool", content=output, tool_call_id=item.call_id))
            open_turn = False
        else:
            role = _required(item.role, k, "role")
            messages.append(Message(role=role, content=_required(item.content, k, "content")))
            open_turn = role == "assistant"
    return messages


def _required(value: Any, k: int, name: str) -> Any:
    if value is None:
        field = f"input.{k}.{name}"
        raise ApiError(400, f"Missing required parameter: '{field}'.", code="missing_required_parameter", param=field)
    return value


def _tool_choice(fields: ResponsesRequest) -> ToolChoice | None:
    choice = fields.tool_choice
    if choice is None or isinstance(choice, str):
        return choice
    return NamedTool(function=NamedFunction(name=choice.name))


def _shell(exchange: Exchange, fields: ResponsesRequest, raw: dict[str, Any]) -> dict[str, Any]:
    call = exchange.call
    return {
        "id": f"resp_{call.id}",
        "object": "response",
        "created_at": call.created,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "metadata": raw.get("metadata") or {},
        "model": fields.model,
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": fields.previous_response_id,
        "temperature": call.params.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": raw.get("tool_choice") or "auto",
        "tools": raw.get("tools") or [],
        "top_p": call.params.top_p,
        "truncation": "disabled",
        "usage": None,
    }


def _outcome(exchange: Exchange, logprobs: bool) -> dict[str, Any]:
    reply, completion = exchange.reply(0), exchange.call.choices[0].completion
    assert completion is not None
    output: list[dict[str, Any]] = []
    if reply.content is not None:
        entries = token_logprobs(exchange, 0)["content"] if logprobs else []
        part = {"type": "output_text", "text": reply.content, "annotations": [], "logprobs": entries}
        message = {"type": "message", "id": f"msg_{exchange.call.id}", "role": "assistant", "status": "completed"}
        output.append({**message, "content": [part]})
    for k, call in enumerate(reply.calls):
        names = {"id": f"fc_{exchange.call.id}{k:02x}", "call_id": exchange.call_id(0, k), "name": call.name}
        output.append({"type": "function_call", **names, "arguments": call.arguments, "status": "completed"})
    prompt, response = exchange.prompt_tokens, exchange.response_tokens
    cut_short = completion.finish_reason == "length"
    return {
        "status": "incomplete" if cut_short else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut_short else None,
        "output": output,
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": response,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + response,
        },
    }
