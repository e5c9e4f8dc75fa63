"""The short way to the endpoints, past Starlette, answers as Starlette would."""

from __future__ import annotations

import json
import logging
import socket
import urllib.parse
from typing import Any

import httpx
import pytest

from lightningrl.gateway import chat
from lightningrl.gateway.errors import parse_body
from lightningrl.gateway.protocol import ChatRequest
from tests.gateway.conftest import BODY, Stage, ask, until

LONG = json.dumps({**BODY, "messages": [{"role": "user", "content": "hi " * 100}]}).encode()


def test_an_error_of_ours_is_500_and_logged(stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError("one over zero")

    stage.play(["A"])
    monkeypatch.setattr(chat, "converse", broken)
    with caplog.at_level(logging.ERROR, "uvicorn.error"):
        answer = httpx.post(f"{stage.url}/chat/completions", json=BODY, headers=stage.headers())
        until(lambda: "one over zero" in caplog.text)  # the traceback, once the answer has been sent
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "The gateway failed: ZeroDivisionError: one over zero"
    monkeypatch.undo()
    assert ask(stage) == "A"


def test_a_body_may_come_in_pieces(stage: Stage) -> None:
    stage.play(["A"])
    pieces = (LONG[k : k + 50] for k in range(0, len(LONG), 50))
    answer = httpx.post(f"{stage.url}/chat/completions", content=pieces, headers=stage.headers())
    assert answer.json()["choices"][0]["message"]["content"] == "A"
    (transition,) = stage.transitions()
    assert transition.messages[0]["content"] == "hi " * 100


def test_a_client_that_leaves_within_its_request_leaves_nothing(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.play(["A"])
    address = urllib.parse.urlsplit(stage.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {stage.key}\r\nContent-Length: 999\r\n\r\n"
        connection.sendall(head.encode() + LONG[:100])
    assert ask(stage) == "A"  # one event loop: by now it has heard of the end of the connection
    assert len(stage.transitions()) == 1
    assert caplog.text == ""


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_other_methods_are_refused_as_before(stage: Stage, method: str) -> None:
    answer = httpx.request(method, f"{stage.url}/chat/completions", headers=stage.headers())
    assert answer.status_code == 405
    assert answer.json()["error"]["message"] == f"Method Not Allowed: {method} /v1/chat/completions is not served here."


@pytest.mark.parametrize(
    "encoded",
    [b'"\\ud83d"', b'"\\uDE00"', '"\ud83d"'.encode("utf-8", "surrogatepass"), b'{"a": "\\udc00"}'],
    ids=("escape", "upper case", "bytes", "nested"),
)
def test_half_a_pair_is_found_however_it_is_written(encoded: bytes) -> None:
    body = b'{"model": "policy", "messages": [{"role": "user", "content": "hi"}], "metadata": ' + encoded + b"}"
    for same in (body, body.decode("utf-8", "surrogatepass").encode("utf-16-le", "surrogatepass")):
        with pytest.raises(Exception, match="half of a surrogate pair"):
            parse_body(same, ChatRequest)


def test_whole_pairs_are_text() -> None:
    body = b'{"model": "policy", "messages": [{"role": "user", "content": "\\ud83d\\ude00 \xed\x95\x9c"}]}'
    assert parse_body(body, ChatRequest)[0].messages[0].text == "😀 한"
