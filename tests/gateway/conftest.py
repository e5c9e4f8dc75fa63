"""One gateway for all tests of the gateway, with a sampler whose script each test sets."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from lightningrl.gateway import CallRecord, Gateway, GatewaySettings
from lightningrl.tokenizer import train_tokenizer
from lightningrl.types import Transition
from tests.gateway.scripted_sampler import Script, ScriptedSampler


@dataclasses.dataclass
class Stage:
    """The gateway, the sampler behind it, and short ways to use them."""

    gateway: Gateway
    sampler: ScriptedSampler
    tokenizer: Any
    shared: openai.OpenAI  # its connections are shared: a new client takes longer than a call
    key: str = ""

    @property
    def url(self) -> str:
        return self.gateway.base_url

    def play(self, script: Script, *, spell: bool = True, rollout: str = "rollout", seed: int = 0, **options: Any) -> Stage:
        """Opens a rollout in which the policy says `script`."""
        self.sampler.restart(script)
        self.sampler.spell = spell
        self.key = self.gateway.open(rollout, seed=seed, **options)
        return self

    def client(self, **options: Any) -> Any:
        return self.shared.with_options(api_key=self.key, **{"max_retries": 0, **options})

    def async_client(self, **options: Any) -> Any:
        return openai.AsyncOpenAI(base_url=self.url, api_key=self.key, **{"max_retries": 0, **options})

    def headers(self, **more: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}", **more}

    def record(self) -> CallRecord:
        return self.gateway.close(self.key)

    def transitions(self) -> tuple[Transition, ...]:
        return self.record().transitions

    def read(self, ids: np.ndarray) -> str:
        return self.tokenizer.decode(ids)


def assert_continues(later: Transition, earlier: Transition) -> np.ndarray:
    """The prompt is exactly the earlier prompt and response and something new, which is returned."""
    said = np.concatenate([earlier.prompt_ids, earlier.response_ids])
    assert later.continues == earlier.turn
    assert later.prompt_ids.dtype == np.int32
    np.testing.assert_array_equal(later.prompt_ids[: len(said)], said)
    return later.prompt_ids[len(said) :]


USER: Any = {"role": "user", "content": "hi"}
BODY: dict[str, Any] = {"model": "policy", "messages": [USER]}


def ask(stage: Stage, text: str = "hi", **options: Any) -> str | None:
    request: dict[str, Any] = {"model": "policy", "messages": [{"role": "user", "content": text}], **options}
    return stage.client().chat.completions.create(**request).choices[0].message.content


def until(condition: Callable[[], bool]) -> None:
    """Waits for the gateway to notice something that no reply tells of."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def raw(stage: Stage, attempt: int = 0, body: dict[str, Any] = BODY, **options: Any) -> httpx.Response:
    headers = stage.headers(**{"x-stainless-retry-count": str(attempt)})
    return httpx.post(f"{stage.url}/chat/completions", json=body, headers=headers, **options)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    corpus = [
        "How many singers are there?",
        "SELECT name FROM singer WHERE age > 20",
        "Write one SQLite query.",
        '<|im_start|>assistant\n<tool_call>{"name": "search", "arguments": {"query": "Paris"}}</tool_call><|im_end|>',
    ]
    return train_tokenizer(corpus * 20, 600)


@pytest.fixture(scope="session")
def _shared(tokenizer: Any) -> Iterator[Stage]:
    sampler = ScriptedSampler(tokenizer, [], context_length=2048)
    with Gateway(sampler, tokenizer, GatewaySettings(max_queue=8)) as gateway:
        with openai.OpenAI(base_url=gateway.base_url, api_key="of no rollout") as client:
            yield Stage(gateway, sampler, tokenizer, client)


@pytest.fixture
def stage(_shared: Stage) -> Iterator[Stage]:
    yield _shared
    for gate in _shared.sampler.gates.values():
        gate.set()
