"""The agents of bench_gateway.py: scripted, and over bare sockets, so that they cost a small part of what a server does.

An agent opens one connection and runs rollouts over it, one after the other: a question, TURNS calls whose messages each go on from
the last, and a reward. `record` and `export` store the same rollout with agentlightning's store server: its start, a span for each call
with its messages and token ids, a span for the reward, its end.
"""

from __future__ import annotations

import asyncio
import functools
import json
import pathlib
import sys
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from lightningrl.tokenizer import train_tokenizer

sys.path.insert(0, str(pathlib.Path(__file__).parent / "peers"))
import otlp  # noqa: E402

TURNS, MAX_TOKENS, GROUP = 3, 8, 8
REPLY = "SELECT name FROM singer"  # of the policy that costs nothing
SYSTEM = (
    "You answer questions about a database with one SQLite query at a time. Tables: singer(singer_id, name, country, age, is_male), "
    "concert(concert_id, concert_name, theme, stadium_id, year), stadium(stadium_id, location, name, capacity, highest, lowest, average), "
    "singer_in_concert(concert_id, singer_id). Write the query and nothing else."
)


def question(task: int) -> str:
    return (
        f"How many singers older than {task % 90} sang in a concert of the year {1950 + task // 90} in a stadium that holds {task} people?"
    )


def observation(rollout: int, turn: int) -> str:
    return (
        f"The query returned {rollout} rows, the first of them ('Joe Sharp', {turn}, {rollout * 7}). Is that the answer? If not, write it."
    )


@functools.cache
def make_tokenizer() -> Any:
    said = [text for k in range(64) for text in (SYSTEM, question(k), REPLY, observation(k, 0))]
    return train_tokenizer(said, 1024)


class Refused(Exception):
    """A server answered with another status than it should."""


class Connection(asyncio.Protocol):
    """HTTP/1.1 by hand: one request at a time, kept alive, answers with a Content-Length."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self.host, self.port, self._prefix = parts.hostname, parts.port, parts.path
        self._buffer = b""
        self._answer: asyncio.Future[bytes] | None = None

    async def connect(self) -> Connection:
        await asyncio.get_running_loop().create_connection(lambda: self, self.host, self.port)
        return self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def post(self, path: str, body: bytes, key: str = "", content: str = "application/json") -> Awaitable[bytes]:
        """The answer's body; raises `Refused` for a status that is not of success."""
        head = f"POST {self._prefix}{path} HTTP/1.1\r\nHost: {self.host}\r\nAuthorization: Bearer {key}\r\n"
        head += f"Content-Type: {content}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(head.encode() + body)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n") + 4
        if end < 4 or self._answer is None:
            return
        head = self._buffer[:end].lower()
        length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        if len(self._buffer) < end + length:
            return
        body, answer = self._buffer[end : end + length], self._answer
        self._buffer, self._answer = b"", None
        if head[9:10] == b"2":
            answer.set_result(body)
        else:
            answer.set_exception(Refused((head[:12] + b" " + body).decode()))

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None:
            self._answer.set_exception(error or Refused("the server closed the connection"))

    def close(self) -> None:
        self._transport.close()


# One rollout: (connection, number, key) -> seconds of each of its calls.
Run = Callable[[Connection, int, str], Awaitable[list[float]]]


async def play(connection: Connection, number: int, key: str) -> list[float]:
    """A rollout through the gateway."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question(number // GROUP)}]
    seconds = []
    for turn in range(TURNS):
        body = json.dumps({"model": "policy", "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 1.0}).encode()
        started = time.perf_counter()
        answer = await connection.post("/chat/completions", body, key)
        seconds.append(time.perf_counter() - started)
        said = json.loads(answer)["choices"][0]["message"]["content"]
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": observation(number, turn)}]
    await connection.post("/reward", b'{"reward": 1.0}', key)
    return seconds


async def record(connection: Connection, number: int, key: str) -> list[float]:
    """The same rollout with agentlightning's store, as its runner and tracer store it: a request for every span."""
    rollout, attempt = await start(connection, number)
    seconds = []
    for k, (name, attributes) in enumerate(spans(number)):
        body = json.dumps(span(rollout, attempt, k + 1, name, attributes)).encode()
        started = time.perf_counter()
        await connection.post("/v1/agl/spans", body)
        seconds.append(time.perf_counter() - started)
    await connection.post(f"/v1/agl/rollouts/{rollout}/attempts/{attempt}", b'{"status": "succeeded"}')
    return seconds[:TURNS]


async def export(connection: Connection, number: int, key: str) -> list[float]:
    """The same in the fewest requests that its server can take: all spans at the end, in one OpenTelemetry export."""
    rollout, attempt = await start(connection, number)
    resource = {"agentlightning.rollout_id": rollout, "agentlightning.attempt_id": attempt}
    body = otlp.export_request(resource, [(name, k + 1, attributes) for k, (name, attributes) in enumerate(spans(number))])
    started = time.perf_counter()
    await connection.post("/v1/traces", body, content=otlp.CONTENT_TYPE)
    seconds = time.perf_counter() - started
    await connection.post(f"/v1/agl/rollouts/{rollout}/attempts/{attempt}", b'{"status": "succeeded"}')
    return [seconds] * TURNS


async def start(connection: Connection, number: int) -> tuple[str, str]:
    """The ids of a new rollout and of its attempt."""
    asked = json.dumps({"input": {"question": question(number // GROUP)}, "mode": "train"}).encode()
    begun = json.loads(await connection.post("/v1/agl/rollouts", asked))
    return begun["rollout_id"], begun["attempt"]["attempt_id"]


def spans(number: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and attributes of a rollout's spans, the reward's last."""
    for attributes in call_attributes(number):
        yield "openai.chat.completion", attributes
    yield "agentlightning.annotation", {"agentlightning.reward.0.name": "primary", "agentlightning.reward.0.value": 1.0}


def call_attributes(number: int) -> Iterator[dict[str, Any]]:
    """What agentlightning's tracer and proxy put into the span of a call."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question(number // GROUP)}]
    said = encoded(REPLY)
    ids = [token for message in messages for token in encoded(message["content"])]
    for turn in range(TURNS):
        attributes: dict[str, Any] = {"gen_ai.request.model": "policy", "gen_ai.request.temperature": 1.0}
        for k, message in enumerate(messages):
            attributes[f"gen_ai.prompt.{k}.role"], attributes[f"gen_ai.prompt.{k}.content"] = message["role"], message["content"]
        attributes |= {
            "gen_ai.completion.0.role": "assistant",
            "gen_ai.completion.0.content": REPLY,
            "gen_ai.completion.0.finish_reason": "stop",
        }
        yield {**attributes, "prompt_token_ids": ids, "response_token_ids": said}
        asked = observation(number, turn)
        messages = [*messages, {"role": "assistant", "content": REPLY}, {"role": "user", "content": asked}]
        ids = [*ids, *said, *encoded(asked)]


@functools.lru_cache(maxsize=4096)
def encoded(text: str) -> list[int]:
    return make_tokenizer().encode(text)


def span(rollout: str, attempt: str, sequence: int, name: str, attributes: dict[str, Any]) -> dict[str, Any]:
    now = time.time()
    return {
        "rollout_id": rollout,
        "attempt_id": attempt,
        "sequence_id": sequence,
        "trace_id": f"{hash(rollout) & 2**127 - 1:032x}",
        "span_id": f"{hash((rollout, sequence)) & 2**63 - 1:016x}",
        "parent_id": None,
        "name": name,
        "status": {"status_code": "OK"},
        "attributes": attributes,
        "events": [],
        "links": [],
        "start_time": now,
        "end_time": now,
        "context": None,
        "parent": None,
        "resource": {"attributes": {}, "schema_url": ""},
    }


async def run_agents(url: str, run: Run, agents: int, numbers: Sequence[int], keys: Sequence[str]) -> list[float]:
    """Runs every rollout, `agents` at a time; seconds of all calls."""
    waiting = iter(zip(numbers, keys, strict=True))
    seconds: list[float] = []

    async def agent() -> None:
        connection = await Connection(url).connect()
        for number, key in waiting:
            seconds.extend(await run(connection, number, key))
        connection.close()

    await asyncio.gather(*(agent() for _ in range(agents)))
    return seconds
