"""The gateway: an OpenAI-compatible server in a thread, in front of a sampler."""

from __future__ import annotations

import asyncio
import errno
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lightningrl.gateway.chat import chat_completions
from lightningrl.gateway.completions import completions
from lightningrl.gateway.direct import Direct
from lightningrl.gateway.errors import ApiError, GatewayError, parse_body
from lightningrl.gateway.protocol import RewardRequest
from lightningrl.gateway.rendering import Renderer
from lightningrl.gateway.responses import responses
from lightningrl.gateway.service import Service
from lightningrl.gateway.sessions import CallRecord, GatewaySettings, SamplingOverrides, Session
from lightningrl.types import Replay, Sampler

Endpoint = Callable[[Service, Request], Awaitable[Response]]


class Gateway:
    """Serves a policy to agents that speak the OpenAI protocol, and records their calls token by token.

    Every rollout gets a key of its own; the key is what ties a call to its rollout. Use it as a context manager, or call
    `start` and `stop`. `open` and `close` may be called from any thread.

    Args:
        sampler: the policy.
        tokenizer: a byte-level `transformers` fast tokenizer with a chat template.
        settings: where to listen and what to let in.

    Raises:
        GatewayError: for a tokenizer that can't keep conversations token-exact.
    """

    def __init__(self, sampler: Sampler, tokenizer: Any, settings: GatewaySettings | None = None) -> None:
        self._service = Service(sampler, Renderer(tokenizer), settings or GatewaySettings())
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._port: int | None = None

    @property
    def base_url(self) -> str:
        """What clients take as `base_url`; raises `GatewayError` before `start`."""
        if self._port is None:
            raise GatewayError("the gateway has not been started: call start(), or use it as a context manager")
        host = self._service.settings.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self._port}/v1"

    def start(self) -> None:
        """Starts to listen. Raises `GatewayError` when the address can't be had, for example a port in use."""
        listener = listen(self._service.settings)
        self._port = listener.getsockname()[1]
        config = uvicorn.Config(
            application(self._service),
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,
            server_header=False,
        )
        self._server = uvicorn.Server(config)
        ready = threading.Event()

        async def serve() -> None:
            assert self._server is not None
            self._loop = asyncio.get_running_loop()
            ready.set()
            await self._server.serve(sockets=[listener])

        def run() -> None:
            with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
                runner.run(serve())

        self._thread = threading.Thread(target=run, name="lightningrl-gateway", daemon=True)
        self._thread.start()
        while not ready.wait(0.05):
            if not self._thread.is_alive():
                raise GatewayError("the gateway's server thread ended before it could listen; its traceback is above")

    def stop(self) -> None:
        """Ends every session and stops listening."""
        if self._server is None or self._thread is None:
            return
        for key in list(self._service.sessions):
            self.close(key)
        self._server.should_exit = True
        self._thread.join()
        self._server = self._thread = self._loop = self._port = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def open(
        self,
        rollout_id: str,
        *,
        seed: int,
        train_roles: tuple[str, ...] | None = None,
        sampling: SamplingOverrides | None = None,
        replay: Replay | None = None,
    ) -> str:
        """A new API key for one rollout.

        Args:
            rollout_id: with `seed`, what the rollout's randomness depends on.
            seed: any integer.
            train_roles: roles whose calls are trainable; None for all.
            sampling: settings that replace the agent's.
            replay: answers the rollout's first calls as a recorded rollout's; how, and what happens if they differ: `gateway.replay`.
        """
        key = f"sk-{secrets.token_urlsafe(24)}"  # one that began with - would be taken for an option on a command line
        settings = self._service.settings
        self._service.sessions[key] = Session(rollout_id, seed, train_roles, sampling or SamplingOverrides(), settings, replay)
        return key

    def close(self, api_key: str) -> CallRecord:
        """Ends a rollout and returns what it left; requests still in flight are cancelled and not recorded.

        Raises:
            KeyError: for a key that isn't open.
        """
        session = self._service.sessions.pop(api_key)
        record = session.record(self._service.renderer)
        session.closed = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(session.close)
        return record


def listen(settings: GatewaySettings) -> socket.socket:
    # Bound here, not by the server, so that a port somebody else listens on is an error and never an attachment to his server.
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = "is in use by another program" if taken else f"can't be listened on ({error})"
        address = f"port {settings.port} on {settings.host}"
        raise GatewayError(f"{address} {reason}: choose another one, or 0 for any free port") from None
    return listener


def application(service: Service, more: Sequence[Route] = ()) -> Direct:
    def bound(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            return await endpoint(service, request)

        return handle

    often = {"/v1/chat/completions": chat_completions, "/v1/completions": completions, "/v1/responses": responses, "/v1/reward": _reward}
    application = Starlette(
        routes=[
            *(Route(path, bound(endpoint), methods=["POST"]) for path, endpoint in often.items()),
            Route("/v1/models", bound(_models), methods=["GET"]),
            Route("/v1/models/{model:path}", bound(_model), methods=["GET"]),
            Route("/healthz", bound(_health), methods=["GET"]),
            Route("/metrics", bound(_metrics), methods=["GET"]),
            *more,
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _unexpected},
    )
    handlers = {("POST", path): bound(endpoint) for path, endpoint in often.items()}
    return Direct(handlers, application, _api_error, _unexpected)


async def _models(service: Service, request: Request) -> Response:
    service.session(request)
    return service.json({"object": "list", "data": [_model_card(service.settings.model)]})


async def _model(service: Service, request: Request) -> Response:
    service.session(request)
    model = request.path_params["model"]
    service.role(request, model)
    return service.json(_model_card(model))


def _model_card(model: str) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": 0, "owned_by": "lightningrl"}


async def _reward(service: Service, request: Request) -> Response:
    session = service.session(request)
    posted, _ = parse_body(await service.body(request), RewardRequest)
    reward = posted.reward
    session.reward = dict(reward) if isinstance(reward, dict) else {"reward": reward}
    return service.json({"object": "reward", "reward": session.reward})


async def _health(service: Service, request: Request) -> Response:
    return service.json({"status": "ok", "queue": service.sampler.queue_length})


async def _metrics(service: Service, request: Request) -> Response:
    """Prometheus' text exposition format: what the sampler counts, where it does, and the rollouts that have a key."""
    sampler_text = getattr(service.sampler, "metrics_text", str)()
    name = "lightningrl_gateway_open_rollouts"
    own = f"# HELP {name} Rollouts that have a key.\n# TYPE {name} gauge\n{name} {len(service.sessions)}\n"
    return Response(sampler_text + own, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(error.body, error.status, error.headers, "application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path} is not served here."
    return await _api_error(request, ApiError(error.status_code, message, headers=error.headers))


async def _unexpected(request: Request, error: Exception) -> Response:
    return await _api_error(request, ApiError(500, f"The gateway failed: {type(error).__name__}: {error}"))
