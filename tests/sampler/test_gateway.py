"""The sampler behind the gateway: whoever hangs up frees its slot, and `/metrics` tells."""

from __future__ import annotations

import json
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from lightningrl.gateway import Gateway
from lightningrl.sampler.engine import PolicySampler, SamplerSettings
from tests.tiny import tiny_policy


@pytest.fixture(scope="module")
def sampler() -> Iterator[PolicySampler]:
    policy = tiny_policy()
    settings = SamplerSettings(slots=4, context_length=2048, group=4, chunk=64, prefill_rows=1, prefill_runs=1, steps=2)
    with PolicySampler(policy.params, policy.config, policy.tokenizer, settings) as engine:
        yield engine


@pytest.fixture(scope="module")
def gateway(sampler: PolicySampler) -> Iterator[Gateway]:
    with Gateway(sampler, tiny_policy().tokenizer) as gateway:
        yield gateway


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def send(gateway: Gateway, **options: object) -> socket.socket:
    """Asks for a long answer over a raw connection."""
    # Greedy, because these weights then go round in a circle without an end-of-turn token.
    body = json.dumps({"model": "policy", "prompt": "How many singers", "max_tokens": 1900, "n": 4, "temperature": 0, **options}).encode()
    host, port = urllib.parse.urlsplit(gateway.base_url).netloc.split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {gateway.open('r', seed=0)}\r\n"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_slots(gateway: Gateway, sampler: PolicySampler, stream: bool) -> None:
    cancelled = sampler.counts.cancelled
    connection = send(gateway, stream=stream)
    if stream:
        assert b"data: {" in connection.recv(65536) + connection.recv(65536)  # in the middle of the answer
    else:
        until(lambda: sampler.counts.sampled_tokens > 0 and sampler.queue_length > 0)
    connection.close()
    until(lambda: sampler.queue_length == 0)
    assert sampler.counts.cancelled > cancelled
    assert sampler._slots.in_use() == 0


@pytest.mark.slow
def test_a_client_that_hangs_up_while_it_waits_for_a_slot_is_not_sampled_for(gateway: Gateway, sampler: PolicySampler) -> None:
    before = sampler.counts.requests
    first = send(gateway)
    until(lambda: sampler.counts.requests == before + 4)
    second = send(gateway)
    until(lambda: sampler.queue_length > 4)
    second.close()
    until(lambda: sampler.queue_length <= 4)
    assert sampler.counts.requests == before + 4
    first.close()
    until(lambda: sampler.queue_length == 0)


def test_metrics_are_served_as_prometheus_text(gateway: Gateway, sampler: PolicySampler) -> None:
    with urllib.request.urlopen(gateway.base_url.removesuffix("/v1") + "/metrics") as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = answer.read().decode()
    assert "\nlightningrl_sampler_slots 4.0\n" in text
    assert "\nlightningrl_gateway_open_rollouts " in text
