"""A policy behind the OpenAI protocol for anybody who has the key: nothing is recorded, and every request stands alone."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lightningrl.errors import UserError
from lightningrl.gateway.calls import Call
from lightningrl.gateway.direct import Direct
from lightningrl.gateway.errors import ApiError, parse_body
from lightningrl.gateway.rendering import Renderer
from lightningrl.gateway.server import application, listen
from lightningrl.gateway.service import Service
from lightningrl.gateway.sessions import GatewaySettings, Incoming, SamplingOverrides, Session
from lightningrl.types import Sampler

Reload = Callable[[str, int], None]  # (folder, version): takes the weights that lie there; raises UserError


class ReloadRequest(BaseModel):
    folder: str
    version: int = 0


class EngineService(Service):
    """One key for everybody; None lets anybody in."""

    def __init__(self, sampler: Sampler, renderer: Renderer, settings: GatewaySettings, api_key: str | None) -> None:
        super().__init__(sampler, renderer, settings)
        self.api_key = api_key

    def session(self, request: Request) -> Session:
        self.check_key(request)
        return OneRequest("", 0, (), SamplingOverrides(), self.settings)

    def check_key(self, request: Request) -> None:
        """Raises `ApiError` 401."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode() if scheme.lower() == "bearer" else b""
        if self.api_key is not None and not hmac.compare_digest(given, self.api_key.encode()):
            raise ApiError(401, "Incorrect API key provided: this server was started with another one.", code="invalid_api_key")


class OneRequest(Session):
    """The response depends on the prompt, the settings and the client's seed alone; without a seed it is another every time."""

    def start(self, request: Incoming, *arguments: Any, **named: Any) -> Call:
        self.seed = 0 if request.fields.seed is not None else secrets.randbits(63)
        return super().start(request, *arguments, **named)


def engine_application(service: EngineService, reload: Reload) -> Direct:
    """The gateway's endpoints, and `POST /admin/reload {"folder": …, "version": …}` under the same key."""
    one_at_a_time = threading.Lock()

    def take(wanted: ReloadRequest) -> None:
        with one_at_a_time:
            reload(wanted.folder, wanted.version)

    async def admin_reload(request: Request) -> Response:
        service.check_key(request)
        wanted, _ = parse_body(await request.body(), ReloadRequest)
        try:
            await asyncio.to_thread(take, wanted)
        except UserError as error:
            raise ApiError(400, str(error), param="folder") from None
        return service.json({"status": "ok", "version": wanted.version})

    return application(service, (Route("/admin/reload", admin_reload, methods=["POST"]),))


def serve(service: EngineService, reload: Reload, on_ready: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM. `on_ready(base_url)` is called once the address is had; raises `GatewayError` if it can't be."""
    listener = listen(service.settings)
    host = service.settings.host
    config = uvicorn.Config(
        engine_application(service, reload),
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=1,
        server_header=False,
    )
    on_ready(f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/v1")
    uvicorn.Server(config).run(sockets=[listener])
