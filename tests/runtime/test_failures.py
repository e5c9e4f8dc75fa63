from __future__ import annotations

import ssl

import httpx
import httpx2
import openai
import pytest

from lightningrl.runtime.failures import describe, is_infrastructure_failure

REQUEST = httpx2.Request("POST", "http://127.0.0.1/v1/chat/completions")


def status(code: int) -> openai.APIStatusError:
    kinds: dict[int, type[openai.APIStatusError]] = {400: openai.BadRequestError, 401: openai.AuthenticationError}
    kinds |= {404: openai.NotFoundError, 429: openai.RateLimitError}
    kind = kinds.get(code, openai.InternalServerError)
    return kind("message", response=httpx2.Response(code, request=REQUEST), body=None)


def httpx_status(code: int) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "http://127.0.0.1")
    return httpx.HTTPStatusError("message", request=request, response=httpx.Response(code, request=request))


def caused_by(cause: BaseException) -> RuntimeError:
    error = RuntimeError("the framework's own")
    error.__cause__ = cause
    return error


def handled(context: BaseException) -> RuntimeError:
    error = RuntimeError("raised while handling another")
    error.__context__ = context
    return error


def circular() -> RuntimeError:
    one, other = RuntimeError("one"), RuntimeError("other")
    one.__cause__, other.__cause__ = other, one
    return one


@pytest.mark.parametrize(
    "exception",
    [
        ConnectionResetError(),
        BrokenPipeError(),
        TimeoutError(),
        openai.APIConnectionError(request=REQUEST),
        openai.APITimeoutError(request=REQUEST),
        status(429),
        status(500),
        status(503),
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("late"),
        httpx.RemoteProtocolError("hung up"),
        httpx2.PoolTimeout("full"),
        httpx_status(502),
        caused_by(openai.APIConnectionError(request=REQUEST)),
        caused_by(caused_by(status(500))),
        ExceptionGroup("both", [ConnectionResetError(), status(503)]),
    ],
    ids=repr,
)
def test_infrastructure(exception: BaseException) -> None:
    assert is_infrastructure_failure(exception)


@pytest.mark.parametrize(
    "exception",
    [
        ValueError("no"),
        KeyError("x"),
        OSError("disk full"),
        FileNotFoundError(),
        ssl.SSLCertVerificationError("self-signed"),
        status(400),
        status(401),
        status(404),
        httpx.InvalidURL("no host"),
        httpx.UnsupportedProtocol("ftp"),
        httpx_status(404),
        caused_by(ValueError("no")),
        handled(ConnectionResetError()),
        circular(),
        ExceptionGroup("one of them", [ConnectionResetError(), ValueError("no")]),
        AssertionError(),
    ],
    ids=repr,
)
def test_the_agents_own_fault(exception: BaseException) -> None:
    assert not is_infrastructure_failure(exception)


def test_a_description_is_the_traceback_with_its_causes() -> None:
    try:
        try:
            raise ConnectionResetError("gone")
        except ConnectionResetError as error:
            raise RuntimeError("the framework's own") from error
    except RuntimeError as error:
        text = describe(error)
    assert text.index("ConnectionResetError: gone") < text.index("RuntimeError: the framework's own")
