"""A small OpenAI endpoint that hands out keys and records calls as the gateway does, with replies and errors on demand."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from lightningrl.gateway import CallRecord
from lightningrl.types import Transition

Reply = Callable[[Mapping[str, Any]], str | int]  # request body -> text, or an HTTP status


@dataclasses.dataclass
class Session:
    rollout_id: str
    seed: int
    calls: list[Transition] = dataclasses.field(default_factory=list)
    posted: dict[str, float] | None = None


def ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


class FakeGateway:
    def __init__(self, reply: Reply = lambda body: "fine") -> None:
        self.reply, self.base_url = reply, "http://127.0.0.1:1/v1"
        self.open_sessions: dict[str, Session] = {}
        self.opened: list[tuple[str, str]] = []  # (key, rollout id)
        self.requests: list[dict[str, Any]] = []
        self.log: tuple[str, ...] = ()

    def open(self, rollout_id: str, *, seed: int, train_roles: Any = None, sampling: Any = None) -> str:
        key = f"key-{len(self.opened)}"
        self.opened.append((key, rollout_id))
        self.open_sessions[key] = Session(rollout_id, seed)
        return key

    def close(self, api_key: str) -> CallRecord:
        session = self.open_sessions.pop(api_key)
        return CallRecord(tuple(session.calls), session.posted, self.log)

    def call(self, key: str, messages: list[dict[str, Any]], text: str, model: str = "policy") -> None:
        """Records a call as if a client had made it."""
        calls = self.open_sessions[key].calls
        prompt = "\n".join(message["content"] for message in messages)
        logprobs = np.full(len(text.encode()), -0.5, np.float32)
        calls.append(
            Transition(
                ids(prompt),
                ids(text),
                logprobs,
                temperature=1.0,
                policy_version=3,
                role=model.partition(":")[2] or model,
                turn=len(calls),
                messages=tuple(messages),
                text=text,
            )
        )

    async def _chat(self, request: Request) -> JSONResponse:
        body = await request.json()
        key = request.headers["authorization"].removeprefix("Bearer ")
        if key not in self.open_sessions:
            return JSONResponse({"error": {"message": "unknown key"}}, 401)
        self.requests.append(body)
        text = self.reply(body)
        if isinstance(text, int):
            return JSONResponse({"error": {"message": "as the test asked"}}, text, headers={"x-should-retry": "false"})
        self.call(key, body["messages"], text, body["model"])
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return JSONResponse({"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]})

    def __enter__(self) -> FakeGateway:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.base_url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        app = Starlette(routes=[Route("/v1/chat/completions", self._chat, methods=["POST"])])
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.should_exit = True
        self._thread.join()
