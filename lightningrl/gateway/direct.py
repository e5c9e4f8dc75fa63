"""The shortest way to the endpoints that agents call all the time: past Starlette's middleware and the search of its routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from lightningrl.gateway.errors import ApiError

Handler = Callable[[Request], Awaitable[Response]]


class Direct:
    """Answers the requests whose method and path are in `handlers`, and leaves all others to `application`.

    As there, an `ApiError` is the answer, and any other error is answered by `unexpected` and raised, for the server to log.
    """

    def __init__(
        self,
        handlers: Mapping[tuple[str, str], Handler],
        application: ASGIApp,
        refused: Callable[[Request, Exception], Awaitable[Response]],
        unexpected: Callable[[Request, Exception], Awaitable[Response]],
    ) -> None:
        self._handlers, self._application, self._refused, self._unexpected = handlers, application, refused, unexpected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self._handlers.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if handler is None:
            return await self._application(scope, receive, send)
        request = Request(scope, receive)
        try:
            response = await handler(request)
        except ApiError as error:
            response = await self._refused(request, error)
        except Exception as error:
            response = await self._unexpected(request, error)
            await response(scope, receive, send)
            raise
        await response(scope, receive, send)
