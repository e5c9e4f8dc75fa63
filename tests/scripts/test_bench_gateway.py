"""The benchmark of the gateway: that it runs, and that the peer is judged fairly. No timing is asserted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from lightningrl.gateway import Gateway
from scripts import bench_gateway
from scripts.bench_gateway_agents import REPLY, TURNS, Connection, Refused, call_attributes, make_tokenizer, play, run_agents
from scripts.bench_gateway_server import NoOp
from scripts.peers import otlp


def row(way: str, agents: int = 1000, **measured: float) -> dict[str, Any]:
    numbers = {"server_cpu_ms_per_call": 0.5, "rollouts_per_s": 300.0, **measured}
    return {"server": "x", "way": way, "agents": agents, "rollouts": 9, **numbers}


@pytest.mark.slow
def test_writes_its_results(tmp_path, capsys):
    path = tmp_path / "out" / "bench.json"
    small = ["--no_peer", "--no_model", "--rounds", "1", "--agents", "100", "--share", "0.02"]
    assert bench_gateway.main(["--json", str(path), *small]) == 0
    results = json.loads(path.read_text())
    (measured,) = results["results"]
    assert (measured["server"], measured["agents"], measured["rollouts"]) == ("gateway", 100, 12)
    assert 0 < measured["p50_ms"] <= measured["p99_ms"]
    assert [goal["goal"] for goal in results["goals"]] == [1.0, 200.0, 5.0]
    assert results["goals"][2]["value"] is None and not results["goals"][2]["met"]  # a peer that did not run is not beaten
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with Gateway(NoOp(make_tokenizer()), make_tokenizer()) as gateway:
        yield gateway


def test_agents_make_rollouts_of_calls_that_go_on(gateway: Gateway):
    keys = [gateway.open(f"rollout {k}", seed=0) for k in range(2)]
    seconds = asyncio.run(run_agents(gateway.base_url, play, 1, range(2), keys))
    assert len(seconds) == 2 * TURNS
    for record in map(gateway.close, keys):
        assert [transition.continues for transition in record.transitions] == [None, *range(TURNS - 1)]
        assert [transition.text for transition in record.transitions] == [REPLY] * TURNS
        assert record.reward == {"reward": 1.0}


def test_a_refusal_is_no_result(gateway: Gateway):
    async def ask() -> bytes:
        return await (await Connection(gateway.base_url).connect()).post("/chat/completions", b"{}", "nobody's")

    with pytest.raises(Refused, match="401.*Incorrect API key"):
        asyncio.run(ask())


def test_the_peer_gets_the_same_messages():
    calls = list(call_attributes(3))
    assert [sum(name.endswith("content") and "prompt" in name for name in call) for call in calls] == [2, 4, 6]
    for earlier, later in zip(calls, calls[1:], strict=False):
        said = earlier["prompt_token_ids"] + earlier["response_token_ids"]
        assert later["prompt_token_ids"][: len(said)] == said


def test_the_peer_counts_at_its_faster_way():
    rows = [row("no-op"), row("spans", rollouts_per_s=40.0), row("export", rollouts_per_s=75.0), row("export", 1, rollouts_per_s=999.0)]
    cpu, speed, times = bench_gateway.goals(rows, 1000)
    assert (cpu["value"], cpu["met"], speed["value"], speed["met"]) == (0.5, True, 300.0, True)
    assert (times["value"], times["met"]) == (4.0, False)


def test_rounds_are_summed_up_by_their_medians():
    rows = [{"round": k, **row("no-op", rollouts_per_s=speed)} for k, speed in enumerate((1.0, 100.0, 2.0))] + [row("no-op", 1)]
    thousand, one = bench_gateway.medians(rows)
    assert (thousand["agents"], thousand["rollouts_per_s"], one["agents"]) == (1000, 2.0, 1)
    assert "round" not in thousand


def test_spans_are_written_as_opentelemetry_writes_them():
    # What opentelemetry-proto 1.45 writes for the same message.
    expected = (
        "0a6e0a0f0a0d0a0372756e12060a04726f2d31125b12590a1001010101010101010101010101010101120800000000000000"
        "012a0463616c6c4a0c0a047465787412040a02c3a94a120a03696473120b2a090a0218010a0318ac024a130a067265776172"
        "64120921000000000000e03f"
    )
    request = otlp.export_request({"run": "ro-1"}, [("call", 1, {"text": "é", "ids": [1, 300], "reward": 0.5})])
    assert request.hex() == expected
