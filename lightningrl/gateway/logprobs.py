"""Log-probs as the protocol reports them: one entry for every sampled token, the end of turn included."""

from __future__ import annotations

from typing import Any

from lightningrl.gateway.exchange import Exchange
from lightningrl.gateway.rendering import Renderer

_LOWEST = -9999.0  # JSON has no -inf; OpenAI's own stand-in


def token_logprobs(exchange: Exchange, choice: int) -> dict[str, Any]:
    completion = exchange.call.choices[choice].completion
    assert completion is not None
    ids, renderer = completion.token_ids.tolist(), exchange.renderer
    content = []
    for k, (token, logprob) in enumerate(zip(ids, completion.logprobs.tolist(), strict=True)):
        top = completion.top[k] if k < len(completion.top) else ()
        content.append({**_entry(renderer, token, logprob), "top_logprobs": [_entry(renderer, *pair) for pair in top]})
    return {"content": content, "refusal": None}


def _entry(renderer: Renderer, token: int, logprob: float) -> dict[str, Any]:
    raw = renderer.token_bytes(int(token))
    return {"token": raw.decode("utf-8", errors="replace"), "logprob": max(float(logprob), _LOWEST), "bytes": list(raw)}
