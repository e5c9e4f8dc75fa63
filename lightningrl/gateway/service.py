"""What every endpoint needs: the sampler, the sessions by key, and how a request names its session and role."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lightningrl.gateway.errors import ApiError
from lightningrl.gateway.rendering import Renderer
from lightningrl.gateway.sessions import GatewaySettings, Session
from lightningrl.types import Sampler

ROLE_HEADER = "x-lightningrl-role"


@dataclasses.dataclass
class Service:
    sampler: Sampler
    renderer: Renderer
    settings: GatewaySettings
    sessions: dict[str, Session] = dataclasses.field(default_factory=dict)

    def session(self, request: Request) -> Session:
        """The session of the request's API key; raises `ApiError` 401."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        session = self.sessions.get(key.strip()) if scheme.lower() == "bearer" else None
        if session is None:
            raise ApiError(
                401,
                "Incorrect API key provided: every rollout has a key of its own, good until the rollout is over.",
                code="invalid_api_key",
            )
        return session

    async def body(self, request: Request) -> bytes:
        """The request's whole body, which mostly comes in one piece; raises `ApiError` if the client hangs up before."""
        pieces = []
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ApiError(499, "The client closed the connection.")
            pieces.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(pieces)

    def role(self, request: Request, model: str) -> str:
        """The role that a model name carries (as `policy:writer`, with `/` or `-` too), else the header's; raises 404."""
        base = self.settings.model
        if model == base:
            return request.headers.get(ROLE_HEADER) or base
        if model.startswith(base) and model[len(base)] in ":/-" and len(model) > len(base) + 1:
            return model[len(base) + 1 :]
        raise ApiError(
            404,
            f"The model `{model}` does not exist: this gateway serves `{base}`, or with a role, as in `{base}:writer`.",
            code="model_not_found",
            param="model",
        )

    def attempt(self, request: Request) -> int:
        """Which automatic retry this is; 0 for none."""
        count = request.headers.get("x-stainless-retry-count", "0")
        return int(count) if count.isascii() and count.isdigit() and len(count) < 10 else 0

    def fingerprint(self, request: Request, body: bytes) -> bytes:
        role = request.headers.get(ROLE_HEADER, "")
        return hashlib.blake2b(f"{request.scope['path']} {role} ".encode() + body, digest_size=16).digest()

    def json(self, value: dict[str, Any]) -> Response:
        return Response(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(), media_type="application/json")
