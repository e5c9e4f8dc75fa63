"""Defects that Agent Lightning's gateways have or had, each with the test that they cannot occur here.

Sections are those of its description: prompts deduplicated, only the first choice kept, streaming refused, wrong token ids with
streaming and a tool parser, a client attached to another run's server, identity of agents lost, rewards of calls lost.
"""

from __future__ import annotations

import socket
from typing import Any

import httpx
import numpy as np
import pytest

from lightningrl.gateway import Gateway, GatewayError, GatewaySettings
from tests.gateway.conftest import Stage, assert_continues

USER: Any = {"role": "user", "content": "hi"}
SEARCH: Any = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>{"name": "search", "arguments": {}}</tool_call>'


def test_honest_repeats_of_a_prompt_are_not_deduplicated(stage: Stage) -> None:
    """v1.0 keeps only the last request of each prompt, so best-of-n, voting and parallel sub-agents lose their calls."""
    stage.play(["A", "B", "C"])
    for _ in range(3):
        stage.client().chat.completions.create(model="policy", messages=[USER])
    transitions = stage.transitions()
    assert [t.text for t in transitions] == ["A", "B", "C"]
    assert len({t.prompt_ids.tobytes() for t in transitions}) == 1


def test_all_choices_are_kept_not_only_the_first(stage: Stage) -> None:
    """v1.0 reads choices[0]."""
    stage.play(["A", "B", "C"])
    stage.client().chat.completions.create(model="policy", messages=[USER], n=3)
    assert [t.text for t in stage.transitions()] == ["A", "B", "C"]


def test_streaming_is_served_and_recorded(stage: Stage) -> None:
    """v1.0 answers a streaming request with HTTP 400."""
    stage.play(["A B"])
    body = {"model": "policy", "messages": [USER], "stream": True}
    assert httpx.post(f"{stage.url}/chat/completions", json=body, headers=stage.headers()).status_code == 200
    assert [t.text for t in stage.transitions()] == ["A B"]


def test_streaming_with_a_tool_parser_records_the_sampled_ids(stage: Stage) -> None:
    """Issue 326: with streaming and a tool parser the recorded ids were not the sampled ones, and training collapsed."""
    stage.play(["Wait.\n" + CALL, "Done."])
    client = stage.client()
    deltas = [
        chunk.choices[0].delta for chunk in client.chat.completions.create(model="policy", messages=[USER], tools=[SEARCH], stream=True)
    ]
    calls = [call.model_dump() for delta in deltas for call in delta.tool_calls or ()]
    said = {"role": "assistant", "content": "".join(delta.content or "" for delta in deltas), "tool_calls": calls}
    result = {"role": "tool", "tool_call_id": calls[0]["id"], "content": "r"}
    list(client.chat.completions.create(model="policy", messages=[USER, said, result], tools=[SEARCH], stream=True))
    first, second = stage.transitions()
    for transition, future in zip((first, second), stage.sampler.futures, strict=True):
        np.testing.assert_array_equal(transition.response_ids, future.result().token_ids)
        np.testing.assert_array_equal(transition.logprobs, future.result().logprobs)
    assert_continues(second, first)


def test_a_gateway_never_attaches_to_another_servers_port(stage: Stage) -> None:
    """Issue 221: a second trainer silently used the first one's store."""
    port = int(stage.url.split(":")[2].split("/")[0])
    with pytest.raises(GatewayError, match=f"port {port} on 127.0.0.1 is in use by another program"):
        Gateway(stage.sampler, stage.tokenizer, GatewaySettings(port=port)).start()
    with socket.create_connection(("127.0.0.1", port)):
        pass  # the first one is still there
    stage.play(["A"])
    assert stage.client().chat.completions.create(model="policy", messages=[USER]).choices[0].message.content == "A"


def test_keys_are_unguessable_and_can_be_given_on_a_command_line(stage: Stage) -> None:
    """One that begins with a dash would be taken for an option; of random ones, one in 64 does."""
    keys = [stage.gateway.open(f"r{i}", seed=0) for i in range(300)]
    assert len(set(keys)) == 300 and all(key[0].isalpha() and len(key) >= 32 for key in keys)
    for key in keys:
        stage.gateway.close(key)


def test_a_key_of_one_gateway_is_unknown_to_another(stage: Stage) -> None:
    """The same confusion seen from an agent: the wrong server must say so."""
    stage.play([])
    with Gateway(stage.sampler, stage.tokenizer) as other:
        answer = httpx.post(f"{other.base_url}/reward", json={"reward": 1}, headers=stage.headers())
    assert answer.status_code == 401


def test_the_agents_identity_is_kept_for_every_call(stage: Stage) -> None:
    """v1.0 has no agent identity in its events, so roles cannot be trained selectively."""
    stage.play(["A", "B"], train_roles=("writer",))
    for role in ("writer", "checker"):
        stage.client().chat.completions.create(model=f"policy:{role}", messages=[USER])
    assert [(t.role, t.trainable) for t in stage.transitions()] == [("writer", True), ("checker", False)]


def test_a_failed_call_is_no_transition_with_reward_zero(stage: Stage) -> None:
    """v1.0 trains failed rollouts with reward 0: a failure of the run is not a wrong answer."""
    stage.play(["A"])
    stage.sampler.error = RuntimeError("lost")
    assert httpx.post(
        f"{stage.url}/chat/completions", json={"model": "policy", "messages": [USER]}, headers=stage.headers()
    ).is_server_error
    record = stage.record()
    assert (record.transitions, record.reward) == ((), None)


def test_an_over_long_prompt_is_an_error_and_is_never_cut(stage: Stage) -> None:
    """v0.x cuts prompts to max_prompt_length and trains on what is left of the row."""
    stage.play(["A"])
    messages = [{"role": "user", "content": "word " * 3000}]
    answer = httpx.post(f"{stage.url}/chat/completions", json={"model": "policy", "messages": messages}, headers=stage.headers())
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert stage.sampler.submitted == [] and stage.transitions() == ()


def test_the_gateway_listens_on_loopback_unless_told_otherwise(stage: Stage) -> None:
    assert stage.url.startswith("http://127.0.0.1:")
    assert GatewaySettings().host == "127.0.0.1"
