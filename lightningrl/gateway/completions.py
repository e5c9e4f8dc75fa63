"""`/v1/completions`: a text, or token ids, to go on from. Here special tokens in the text are tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lightningrl.gateway.calls import Call
from lightningrl.gateway.chat import event, usage
from lightningrl.gateway.errors import ApiError, parse_body
from lightningrl.gateway.exchange import EventStream, Exchange, begin
from lightningrl.gateway.logprobs import token_logprobs
from lightningrl.gateway.protocol import CompletionRequest
from lightningrl.gateway.rendering import as_ids
from lightningrl.gateway.service import Service
from lightningrl.gateway.sessions import Incoming, Session


async def completions(service: Service, request: Request) -> Response:
    session = service.session(request)
    body = await service.body(request)
    fields, raw = parse_body(body, CompletionRequest)
    incoming = Incoming(
        fields=fields,
        fingerprint=service.fingerprint(request, body),
        attempt=service.attempt(request),
        role=service.role(request, fields.model),
        messages=(),
        sent=({"role": "user", "content": raw["prompt"]},),
        max_tokens=fields.max_tokens,
        stream=bool(fields.stream),
        top_logprobs=fields.logprobs or 0,
        prompt_field="prompt",
    )
    call = session.retried(incoming) or _start(service, session, incoming, fields.prompt)
    exchange = Exchange(session, call, service.renderer, frozenset(), "")
    if fields.stream:
        return EventStream(exchange, _chunks(exchange, fields))
    await exchange.finished(request)
    choices = [_choice(exchange, fields, k, exchange.reply(k).words) for k in range(len(call.choices))]
    return service.json({**_head(exchange, fields), "choices": choices, "usage": usage(exchange)})


def _start(service: Service, session: Session, incoming: Incoming, prompt: str | list[int]) -> Call:
    renderer = service.renderer
    if not prompt:
        raise ApiError(400, "The prompt is empty; it must hold at least one token.", code="invalid_value", param="prompt")
    if isinstance(prompt, list):
        vocabulary = renderer.vocabulary
        wrong = next((token for token in prompt if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise ApiError(400, f"The prompt's token {wrong} is not in the vocabulary of {vocabulary} tokens.", param="prompt")
        return begin(session, service.sampler, incoming, as_ids(prompt), None, lambda call: None)
    prompt_ids, extends = session.conversations.text_prompt(prompt, renderer)

    def on_done(call: Call) -> None:
        session.conversations.add_text(prompt, call, renderer)

    return begin(session, service.sampler, incoming, prompt_ids, extends, on_done)


def _head(exchange: Exchange, fields: CompletionRequest) -> dict[str, Any]:
    call = exchange.call
    return {"id": f"cmpl-{call.id}", "object": "text_completion", "created": call.created, "model": fields.model}


def _choice(exchange: Exchange, fields: CompletionRequest, k: int, text: str) -> dict[str, Any]:
    logprobs = _logprobs(exchange, fields, k) if fields.logprobs is not None else None
    choice = {"index": k, "text": text, "logprobs": logprobs, "finish_reason": exchange.finish_reason(k, exchange.reply(k))}
    if fields.return_token_ids:
        choice |= {"prompt_token_ids": exchange.call.prompt_ids.tolist(), "token_ids": exchange.call.choices[k].token_ids.tolist()}
    return choice


def _logprobs(exchange: Exchange, fields: CompletionRequest, k: int) -> dict[str, Any]:
    # This endpoint's older form: parallel lists, offsets in characters from the end of the prompt.
    entries = token_logprobs(exchange, k)["content"]
    tokens = [entry["token"] for entry in entries]
    offsets = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    names = [[alternative["token"] for alternative in entry["top_logprobs"]] for entry in entries]
    if fields.return_tokens_as_token_ids:
        completion = exchange.call.choices[k].completion
        assert completion is not None
        tokens = [f"token_id:{token}" for token in completion.token_ids.tolist()]
        names = [[f"token_id:{token}" for token, _ in pairs] for pairs in completion.top] or [[] for _ in entries]
    top = [
        {name: alternative["logprob"] for name, alternative in zip(of_entry, entry["top_logprobs"], strict=True)}
        for of_entry, entry in zip(names, entries, strict=True)
    ]
    return {"tokens": tokens, "token_logprobs": [e["logprob"] for e in entries], "top_logprobs": top, "text_offset": offsets}


async def _chunks(exchange: Exchange, fields: CompletionRequest) -> AsyncIterator[bytes]:
    head, choices = _head(exchange, fields), exchange.call.choices
    streams = [exchange.text_stream() for _ in choices]
    try:
        while exchange.call.state == "running":
            for k, stream in enumerate(streams):
                text = stream.feed(choices[k].seen)
                if text:
                    choice = {"index": k, "text": text, "logprobs": None, "finish_reason": None}
                    yield event({**head, "choices": [choice]})
            await exchange.call.wait()
        await exchange.call.finished()
        for k, stream in enumerate(streams):
            rest = exchange.reply(k).words[stream.released :]
            yield event({**head, "choices": [_choice(exchange, fields, k, rest)]})
        if fields.wants_usage:
            yield event({**head, "choices": [], "usage": usage(exchange)})
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield b"data: " + error.body + b"\n\n"
