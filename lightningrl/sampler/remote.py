"""A sampler that is an OpenAI-compatible engine on another host, such as vLLM: token ids go there, token ids and log-probs come back.

The gateway keeps rendering, tool calls and conversations to itself, so a prompt is sent as token ids to `/v1/completions` and nothing is
tokenised anew. Names of fields are vLLM's: `return_token_ids` (from 0.10.2), and `return_tokens_as_token_ids` for alternatives. For
temperatures other than 1 start it with `--logprobs-mode processed_logprobs`: its default reports the untempered distribution.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np

from lightningrl.errors import UserError
from lightningrl.sampler.protocol import EngineError, answered, completion_of, completion_request
from lightningrl.types import Completion, SamplingParams

KEY = "LIGHTNINGRL_ENGINE_KEY"  # the environment variable; a flag would show in lists of processes

# What is posted, in order, once weights lie in {folder}: (path, body). vLLM needs VLLM_SERVER_DEV_MODE=1 for both of its endpoints;
# what its prefix cache holds was computed with the old weights.
RELOADS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "vllm": (
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": "{folder}"}}),
        ("/reset_prefix_cache", {}),
    ),
    "lightningrl": (("/admin/reload", {"folder": "{folder}", "version": "{version}"}),),
}
Reload = Sequence[tuple[str, Any]]
RELOAD_TIMEOUT_S = 600.0


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    url: str  # with or without /v1 at its end
    folder: Path  # where weights are written for it
    model: str | None = None  # None: the only one it serves
    reload: Reload = RELOADS["vllm"]
    context_length: int = 256  # prompt and response together, at most

    @property
    def root(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")


def reload_requests(text: str) -> Reload:
    """The requests that `--engine_reload` stands for: a name of `RELOADS`, or JSON `[[path, body], …]`. Raises UserError for neither."""
    if text in RELOADS:
        return RELOADS[text]
    try:
        pairs = [(path, body) for path, body in json.loads(text)]
        if pairs and all(isinstance(path, str) and path.startswith("/") for path, _ in pairs):
            return pairs
    except (ValueError, TypeError):
        pass
    raise UserError(f'engine_reload={text!r} is neither {" nor ".join(RELOADS)} nor JSON such as [["/path", {{"folder": "{{folder}}"}}]]')


class RemoteSampler:
    """Implements `types.Sampler` over an engine. Use as a context manager, or call `start` and `stop`; `check` first.

    A response is sampled with a seed made of its key, so an engine that keeps to seeds samples the same again. Tokens come when the
    response is finished: `on_tokens` is called once. A request that is cancelled closes its connection, which frees the engine's slot.

    Args:
        settings: which engine, and how it takes new weights.
        tokenizer: the policy's, which must be the engine's too.
        export: `(folder, params)` writes weights as the engine reads them.
    """

    def __init__(self, settings: EngineSettings, tokenizer: Any, export: Callable[[Path, Any], None]) -> None:
        self.settings, self._tokenizer, self._export = settings, tokenizer, export
        self._model = settings.model
        self._version = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._in_flight, self._busy, self._since = 0, 0.0, 0.0

    # ---- called from any thread
    @property
    def context_length(self) -> int:
        return self.settings.context_length

    @property
    def queue_length(self) -> int:
        return self._in_flight

    @property
    def busy_seconds(self) -> float:
        """How long there was at least one request at the engine."""
        with self._lock:
            return self._busy + (time.perf_counter() - self._since if self._in_flight else 0.0)

    def submit(
        self,
        prompt_ids: np.ndarray,
        params: SamplingParams,
        key: tuple[int, int],
        on_tokens: Callable[[np.ndarray, np.ndarray], None] | None = None,
    ) -> Future[Completion]:
        room = self.context_length - len(prompt_ids)
        if len(prompt_ids) == 0 or room < 1:
            raise ValueError(f"a prompt of {len(prompt_ids)} tokens does not fit a context of {self.context_length}")
        if self._loop is None:
            raise RuntimeError("the sampler is not running")
        params = dataclasses.replace(params, max_tokens=max(1, min(params.max_tokens, room)))
        future = asyncio.run_coroutine_threadsafe(self._sample(self._request(prompt_ids, params, key), params, on_tokens), self._loop)
        self._count(+1)
        future.add_done_callback(lambda _: self._count(-1))
        return future

    def set_params(self, params: Any, policy_version: int) -> None:
        """Writes the weights to a folder of their own and has the engine load them; those before are deleted then.

        Raises:
            UserError: the engine did not take them.
        """
        folder = self.settings.folder.absolute() / str(policy_version)
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        self._export(partial, params)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for path, body in self.settings.reload:
            places = {"{folder}": str(folder), "{version}": str(policy_version)}
            self._post(path, _filled(body, places), folder)
        self._version = policy_version
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def check(self) -> None:
        """Asks the engine for its models and for one token. Raises UserError, one sentence, where training could not go on with it."""
        answer = self._get("/v1/models")
        try:
            models = {card["id"]: card for card in answer.json()["data"]}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.settings.url} does not answer as an OpenAI-compatible engine does: give the URL of one") from None
        names = ", ".join(models) or "none at all"
        if self._model is None and len(models) != 1:
            raise UserError(f"the engine at {self.settings.url} serves several models or none: give --engine_model as one of {names}")
        self._model = self._model or next(iter(models))
        if self._model not in models:
            raise UserError(f"the engine at {self.settings.url} has no model {self._model!r}: give --engine_model as one of {names}")
        longest = models[self._model].get("max_model_len")
        if isinstance(longest, int) and longest < self.context_length:
            raise UserError(f"the engine at {self.settings.url} takes {longest} tokens, fewer than context_length={self.context_length}")
        body = self._request(np.array([self._tokenizer.eos_token_id]), SamplingParams(1), (0, 0))
        try:
            with httpx.Client(headers=_headers(), timeout=RELOAD_TIMEOUT_S) as client:
                reply = client.post(f"{self.settings.root}/v1/completions", json=body)
            completion_of(reply, SamplingParams(1), 0, self._tokenizer)
        except (EngineError, httpx.HTTPError) as error:
            raise UserError(f"the engine at {self.settings.url} cannot be trained with: {_reason(error)}") from error

    def start(self) -> RemoteSampler:
        loop = asyncio.new_event_loop()
        self._client = httpx.AsyncClient(headers=_headers(), timeout=httpx.Timeout(None, connect=10.0), limits=httpx.Limits())
        self._thread = threading.Thread(target=loop.run_forever, name="engine", daemon=True)
        self._thread.start()
        self._loop = loop
        return self

    def stop(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._close(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()
            loop.close()

    def __enter__(self) -> RemoteSampler:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---- on the event loop
    async def _sample(
        self, body: dict[str, Any], params: SamplingParams, on_tokens: Callable[[np.ndarray, np.ndarray], None] | None
    ) -> Completion:
        version = self._version
        try:
            reply = await self._client.post(f"{self.settings.root}/v1/completions", json=body)
        except httpx.HTTPError as error:
            raise EngineError(f"the engine at {self.settings.url} cannot be reached ({_reason(error)})") from error
        completion = completion_of(reply, params, version, self._tokenizer)
        if on_tokens is not None:
            on_tokens(completion.token_ids, completion.logprobs)
        return completion

    async def _close(self) -> None:
        others = asyncio.all_tasks() - {cast("asyncio.Task[Any]", asyncio.current_task())}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()

    # ---- requests
    def _request(self, prompt_ids: np.ndarray, params: SamplingParams, key: tuple[int, int]) -> dict[str, Any]:
        return completion_request(self._model, prompt_ids, params, key, self._tokenizer.eos_token_id)

    def _get(self, path: str) -> httpx.Response:
        try:
            with httpx.Client(headers=_headers(), timeout=10.0) as client:
                reply = client.get(self.settings.root + path)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UserError(f"there is no engine at {self.settings.url} ({_reason(error)}): give the --engine of one that runs") from error
        if reply.status_code in (401, 403):
            raise UserError(f"the engine at {self.settings.url} refuses the key: set {KEY} to the one that it was started with")
        if reply.status_code != 200:
            raise UserError(f"{self.settings.root}{path} answered {answered(reply)}: give --engine the URL of an OpenAI-compatible engine")
        return reply

    def _post(self, path: str, body: Any, folder: Path) -> None:
        problem = ""
        try:
            with httpx.Client(headers=_headers(), timeout=RELOAD_TIMEOUT_S) as client:
                reply = client.post(self.settings.root + path, json=body)
            problem = "" if reply.is_success else answered(reply)
        except httpx.HTTPError as error:
            problem = _reason(error)
        if problem:
            raise UserError(
                f"the engine at {self.settings.url} did not take the weights in {folder} ({path}: {problem}): "
                "its host must see that folder, vLLM needs VLLM_SERVER_DEV_MODE=1, and --engine_reload says what is posted"
            )

    def _count(self, change: int) -> None:
        with self._lock:
            now = time.perf_counter()
            self._busy += now - self._since if self._in_flight else 0.0
            self._in_flight, self._since = self._in_flight + change, now


def _headers() -> dict[str, str]:
    key = os.environ.get(KEY)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _filled(value: Any, places: dict[str, str]) -> Any:
    """A JSON value with every `{folder}` and `{version}` in its strings filled in."""
    if isinstance(value, str):
        return functools.reduce(lambda text, place: text.replace(place, places[place]), places, value)
    if isinstance(value, dict):
        return {name: _filled(item, places) for name, item in value.items()}
    return [_filled(item, places) for item in value] if isinstance(value, list) else value


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
