"""Randomness, order, retries of a rollout's calls, and clients or servers that go away."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import httpx
import numpy as np
import pytest

from lightningrl.gateway import Gateway, GatewaySettings
from lightningrl.gateway.calls import sampling_key
from tests.gateway.conftest import BODY, USER, Stage, ask, assert_continues, raw, until

# Randomness


def test_a_key_depends_on_everything_that_it_should_and_nothing_else() -> None:
    prompt = np.arange(5, dtype=np.int32)
    keys = [
        sampling_key(0, "r", prompt, 0, 0, None),
        sampling_key(1, "r", prompt, 0, 0, None),
        sampling_key(0, "s", prompt, 0, 0, None),
        sampling_key(0, "r", prompt[:4], 0, 0, None),
        sampling_key(0, "r", prompt, 1, 0, None),
        sampling_key(0, "r", prompt, 0, 1, None),
        sampling_key(0, "r", prompt, 0, 0, 0),
        sampling_key(0, "r", prompt, 0, 0, 1),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == sampling_key(0, "r", prompt.copy(), 0, 0, None)
    assert all(0 <= word < 2**32 for key in keys for word in key)


def test_the_same_rollout_again_has_the_same_keys_in_any_order(stage: Stage) -> None:
    def keys(texts: list[str], **options: Any) -> list[tuple[int, int]]:
        stage.play(["A"] * 4, **options)
        for text in texts:
            ask(stage, text)
        stage.record()
        return [key for _, _, key in stage.sampler.submitted]

    first = keys(["x", "y", "x", "z"])
    assert len(set(first)) == 4
    again = keys(["z", "x", "x", "y"])
    assert again == [first[3], first[0], first[2], first[1]]
    assert not set(keys(["x", "y"], seed=1)) & set(first)
    assert not set(keys(["x", "y"], rollout="another")) & set(first)


def test_a_clients_seed_is_part_of_the_key(stage: Stage) -> None:
    keys = []
    for seed in (None, 1, 1, 2):
        stage.play(["A"])
        ask(stage, seed=seed)
        keys.append(stage.sampler.submitted[0][2])
        stage.record()
    assert keys[1] == keys[2] and len(set(keys)) == 3


# Order


def test_turns_are_in_order_of_arrival_whichever_call_finishes_first(stage: Stage) -> None:
    stage.play(["first", "second", "third"])
    gates = [stage.sampler.hold(k) for k in range(3)]
    threads = []
    for text in "abc":
        threads.append(threading.Thread(target=ask, args=(stage, text)))
        threads[-1].start()
        until(lambda: len(stage.sampler.submitted) == len(threads))
    for gate, future in zip(reversed(gates), reversed(stage.sampler.futures), strict=True):
        gate.set()
        future.result()
    for thread in threads:
        thread.join()
    assert [(t.turn, t.text) for t in stage.transitions()] == [(0, "first"), (1, "second"), (2, "third")]


def test_a_call_that_failed_leaves_no_gap_in_the_turns(stage: Stage) -> None:
    stage.play(["A", "B", "C"])
    said = stage.client().chat.completions.create(**BODY).choices[0].message.model_dump()
    stage.sampler.error = ValueError("x")
    assert raw(stage, body={**BODY, "seed": 3}).status_code == 500
    stage.sampler.error = None
    go_on: Any = {"model": "policy", "messages": [USER, said, USER]}
    stage.client().chat.completions.create(**go_on)
    first, second = stage.transitions()
    assert (first.turn, second.turn) == (0, 1)
    assert_continues(second, first)


# Retries


def test_a_retry_of_a_finished_call_gets_its_answer_again(stage: Stage) -> None:
    stage.play(["A", "B"])
    first, second = raw(stage), raw(stage, attempt=1)
    assert first.json() == second.json()
    assert len(stage.sampler.submitted) == 1
    assert len(stage.transitions()) == 1


def test_a_retry_joins_the_call_in_flight(stage: Stage) -> None:
    stage.play(["A", "B"])
    gate = stage.sampler.hold(0)
    answers: list[httpx.Response] = []

    def attempt(number: int) -> None:
        answers.append(raw(stage, attempt=number))

    threads = [threading.Thread(target=attempt, args=(number,)) for number in (0, 1)]
    threads[0].start()
    until(lambda: len(stage.sampler.submitted) == 1)
    threads[1].start()
    session = stage.gateway._service.sessions[stage.key]
    until(lambda: session._calls[0].waiters == 2)
    gate.set()
    for thread in threads:
        thread.join()
    assert answers[0].json() == answers[1].json()
    assert len(stage.transitions()) == 1


def test_the_clients_own_retry_after_an_error_records_one_transition(stage: Stage) -> None:
    stage.play(["A"])
    stage.sampler.refuse = 1
    answer = stage.client(max_retries=2).chat.completions.with_raw_response.create(**BODY)
    assert answer.retries_taken == 1
    assert len(stage.transitions()) == 1


def test_the_clients_own_retry_after_its_time_limit_records_one_transition(stage: Stage) -> None:
    stage.play(["A", "B"])
    gate = stage.sampler.hold(0)
    client = stage.client(max_retries=2, timeout=0.3)
    answer = client.chat.completions.create(**BODY)
    gate.set()
    assert answer.choices[0].message.content == "B"  # the first attempt was cancelled when the client hung up
    assert stage.sampler.futures[0].cancelled()
    assert stage.sampler.submitted[0][2] == stage.sampler.submitted[1][2]  # and the second samples with the same key
    assert len(stage.transitions()) == 1


def test_two_honest_calls_with_one_prompt_are_two_transitions(stage: Stage) -> None:
    stage.play(["A", "B"])
    assert (ask(stage), ask(stage)) == ("A", "B")
    first, second = stage.transitions()
    np.testing.assert_array_equal(first.prompt_ids, second.prompt_ids)
    assert stage.sampler.submitted[0][2] != stage.sampler.submitted[1][2]


def test_a_retry_after_429_is_not_mistaken_for_an_equal_call_that_was_answered(stage: Stage) -> None:
    stage.play(["A", "B"])
    assert raw(stage).status_code == 200
    stage.sampler.busy = 8
    assert raw(stage).status_code == 429  # a second, honest call
    stage.sampler.busy = 0
    assert raw(stage, attempt=1).json()["choices"][0]["message"]["content"] == "B"
    assert len(stage.transitions()) == 2


def test_retries_of_two_equal_calls_get_one_answer_each(stage: Stage) -> None:
    stage.play(["A", "B"])
    said = [raw(stage, attempt).json()["choices"][0]["message"]["content"] for attempt in (0, 0, 1, 1)]
    assert sorted(said) == ["A", "A", "B", "B"]
    assert len(stage.transitions()) == 2


def test_a_retried_stream_is_played_again(stage: Stage) -> None:
    stage.play(["A b c"])
    first, second = (raw(stage, attempt, {**BODY, "stream": True}) for attempt in (0, 1))
    assert "".join(first.text.split()) and first.text.endswith("data: [DONE]\n\n") and second.text.endswith("data: [DONE]\n\n")
    assert len(stage.transitions()) == 1


# Clients that hang up


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_cancels_its_call(stage: Stage, stream: bool) -> None:
    stage.play(["A", "B"])
    stage.sampler.hold(0)

    async def hang_up() -> None:
        async with stage.async_client() as client:
            call = asyncio.ensure_future(client.chat.completions.create(**{**BODY, "stream": stream}))
            while not stage.sampler.submitted:
                await asyncio.sleep(0.002)
            call.cancel()

    asyncio.run(hang_up())
    until(lambda: stage.sampler.futures[0].cancelled())
    assert ask(stage) == "B"
    (transition,) = stage.transitions()
    assert transition.text == "B"
    assert stage.sampler.submitted[0][2] == stage.sampler.submitted[1][2]


def test_hanging_up_in_the_middle_of_a_stream_cancels_it(stage: Stage) -> None:
    stage.play(["one two three"])
    stage.sampler.hold(0)
    stream = stage.client().chat.completions.create(**BODY, stream=True)
    next(iter(stream))
    stream.close()
    until(lambda: stage.sampler.futures[0].cancelled())
    assert stage.transitions() == ()


# The server's end


def test_stopping_ends_calls_in_flight_and_frees_the_port(stage: Stage) -> None:
    stage.play(["A", "B"])
    stage.sampler.hold(0)
    gateway = Gateway(stage.sampler, stage.tokenizer)
    gateway.start()
    key, port = gateway.open("rollout", seed=0), int(gateway.base_url.split(":")[2].split("/")[0])
    url, headers = f"{gateway.base_url}/chat/completions", {"Authorization": f"Bearer {key}"}
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(httpx.post(url, json=BODY, headers=headers)))
    thread.start()
    until(lambda: len(stage.sampler.submitted) == 1)
    gateway.stop()
    thread.join()
    assert answers[0].status_code == 401
    assert stage.sampler.futures[0].cancelled()
    with Gateway(stage.sampler, stage.tokenizer, GatewaySettings(port=port)) as again:
        assert again.base_url == f"http://127.0.0.1:{port}/v1"
