"""`/v1/completions` as an engine speaks it: token ids there, token ids and log-probs back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import httpx
import numpy as np

from lightningrl.types import Completion, FinishReason, SamplingParams

_SEED_BITS = (1 << 63) - 1  # engines take a signed 64-bit seed


class EngineError(RuntimeError):
    """The engine answered with an error, or with less than was asked for."""


def completion_request(
    model: str | None, prompt_ids: np.ndarray, params: SamplingParams, key: tuple[int, int], end_token: int
) -> dict[str, Any]:
    """The body for one response; its seed is made of the key."""
    return {
        "model": model,
        "prompt": np.asarray(prompt_ids).tolist(),
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": 0.0,  # what is left out, vLLM takes from the checkpoint's generation_config.json
        "repetition_penalty": 1.0,
        "stop": list(params.stop),
        "stop_token_ids": [end_token],
        "seed": ((key[0] << 32) | key[1]) & _SEED_BITS,
        "logprobs": params.top_logprobs,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def completion_of(reply: httpx.Response, params: SamplingParams, version: int, tokenizer: Any) -> Completion:
    """What the engine sampled; raises `EngineError` for an error, or where something is missing."""
    if reply.status_code != 200:
        raise EngineError(f"it answered {answered(reply)}")
    try:
        choice = reply.json()["choices"][0]
        ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        alternatives = (choice.get("logprobs") or {}).get("top_logprobs") or []
        reason = choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise EngineError("it answered /v1/completions with something that is no completion") from None
    if ids is None or logprobs is None or len(ids) != len(logprobs) or None in logprobs:
        missing = "token ids" if ids is None else "a log-prob for every token"
        raise EngineError(f"it answers without {missing}: use one that knows return_token_ids and logprobs, such as vLLM from 0.10.2")
    if reason not in ("stop", "length"):
        raise EngineError(f"it broke a response off ({reason})")
    return Completion(
        token_ids=np.asarray(ids, np.int32),
        logprobs=np.asarray(logprobs, np.float32),
        finish_reason=cast(FinishReason, reason),
        policy_version=version,
        text=_text(tokenizer, ids, params.stop),
        top=tuple(_alternatives(each, params.top_logprobs) for each in alternatives) if params.top_logprobs else (),
    )


def answered(reply: httpx.Response) -> str:
    """An error as one half of a sentence."""
    try:
        body = reply.json()
        error = body.get("error", body)
        said = error.get("message") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        said = reply.text
    said = " ".join(str(said or "").split())[:200].rstrip(".")
    return f"HTTP {reply.status_code}" + (f", {said}" if said else "")


def _text(tokenizer: Any, ids: list[int], stop: Sequence[str]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return text[: min([at for each in stop if (at := text.find(each)) >= 0], default=len(text))]


def _alternatives(top: dict[str, float], count: int) -> tuple[tuple[int, float], ...]:
    """(id, log-prob), falling, of tokens that are written as `token_id:17`."""
    pairs = [(int(name.removeprefix("token_id:")), logprob) for name, logprob in top.items() if name.startswith("token_id:")]
    return tuple(sorted(pairs, key=lambda pair: -pair[1])[:count])
