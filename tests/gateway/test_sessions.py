"""Keys, roles, retries, order and randomness of a rollout's calls."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from lightningrl.gateway import Gateway, GatewaySettings, SamplingOverrides
from lightningrl.gateway.calls import sampling_key
from tests.gateway.conftest import Stage, assert_continues

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


# Keys


def test_keys_do_not_leak_between_rollouts(stage: Stage) -> None:
    stage.play(["A", "B", "C"])
    one, two = stage.key, stage.gateway.open("other", seed=0)
    first = stage.client().chat.completions.create(**BODY).choices[0].message.model_dump()
    go_on: Any = {"model": "policy", "messages": [USER, first, USER]}
    stage.key = two
    stage.client().chat.completions.create(**go_on)
    stage.key = one
    stage.client().chat.completions.create(**go_on)
    mine, others = stage.gateway.close(one).transitions, stage.gateway.close(two).transitions
    assert [t.text for t in mine] == ["A", "C"] and [t.text for t in others] == ["B"]
    assert mine[1].continues == 0
    assert others[0].continues is None  # the same words, but another rollout's tokens


def test_keys_are_unguessable_and_differ(stage: Stage) -> None:
    keys = {stage.gateway.open("rollout", seed=0) for _ in range(50)}
    assert len(keys) == 50 and all(len(key) >= 32 for key in keys)
    for key in keys:
        stage.gateway.close(key)


def test_a_closed_key_is_401_and_closing_it_again_a_keyerror(stage: Stage) -> None:
    stage.play(["A"])
    stage.record()
    assert raw(stage).status_code == 401
    with pytest.raises(KeyError):
        stage.record()


def test_requests_in_flight_at_close_are_cancelled_and_not_recorded(stage: Stage) -> None:
    stage.play(["A", "B"])
    stage.sampler.hold(1)
    ask(stage)
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(raw(stage)))
    thread.start()
    until(lambda: len(stage.sampler.submitted) == 2)
    record = stage.record()
    thread.join()
    assert [t.text for t in record.transitions] == ["A"]
    assert answers[0].status_code == 401
    assert stage.sampler.futures[1].cancelled()
    assert stage.sampler.queue_length == 0


# Roles


@pytest.mark.parametrize(
    ("model", "header", "role"),
    [
        ("policy", None, "policy"),
        ("policy:writer", None, "writer"),
        ("policy/writer", None, "writer"),
        ("policy-writer", None, "writer"),
        ("policy:re-writer:2", None, "re-writer:2"),
        ("policy", "checker", "checker"),
        ("policy:writer", "checker", "writer"),
    ],
)
def test_a_role_comes_from_the_model_name_or_a_header(stage: Stage, model: str, header: str | None, role: str) -> None:
    stage.play(["A"])
    more = {"x-lightningrl-role": header} if header else {}
    answer = httpx.post(f"{stage.url}/chat/completions", json={**BODY, "model": model}, headers=stage.headers(**more))
    assert answer.json()["model"] == model
    assert stage.transitions()[0].role == role


def test_models_are_listed_and_shown(stage: Stage) -> None:
    stage.play([])
    assert [model.id for model in stage.client().models.list()] == ["policy"]
    assert stage.client().models.retrieve("policy:writer").id == "policy:writer"
    with pytest.raises(openai.NotFoundError):
        stage.client().models.retrieve("gpt-4o")


def test_health_needs_no_key(stage: Stage) -> None:
    assert httpx.get(stage.url.removesuffix("/v1") + "/healthz").json() == {"status": "ok", "queue": 0}


# What is trained


@pytest.mark.parametrize(
    ("options", "train_roles", "trainable"),
    [
        ({}, None, True),
        ({"temperature": 0.3}, None, True),
        ({"stop": "x"}, None, True),
        ({"temperature": 0}, None, False),
        ({"top_p": 0.9}, None, False),
        ({"extra_body": {"top_k": 5}}, None, False),
        ({"extra_body": {"top_k": -1}, "top_p": 1}, None, True),
        ({"model": "policy:writer"}, ("writer", "rewriter"), True),
        ({"model": "policy:checker"}, ("writer", "rewriter"), False),
        ({}, (), False),
    ],
)
def test_greedy_truncated_and_untrained_calls_are_not_trainable(
    stage: Stage, options: dict[str, Any], train_roles: Any, trainable: bool
) -> None:
    stage.play(["A"], train_roles=train_roles)
    ask(stage, **options)
    (transition,) = stage.transitions()
    assert transition.trainable is trainable


def test_training_settings_override_the_agents_and_say_so_once(stage: Stage) -> None:
    stage.play(["A", "A"], sampling=SamplingOverrides(temperature=1.0, top_p=1.0, top_k=0, max_tokens=40))
    for _ in range(2):
        ask(stage, temperature=0, top_p=0.5, max_tokens=99, extra_body={"top_k": 3})
    record = stage.record()
    params = stage.sampler.submitted[0][1]
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1.0, 1.0, 0, 40)
    assert all(t.trainable and t.temperature == 1.0 for t in record.transitions)
    assert sorted(record.log) == [
        "max_tokens 99 of the agent is overridden by 40",
        "temperature 0.0 of the agent is overridden by 1.0",
        "top_k 3 of the agent is overridden by 0",
        "top_p 0.5 of the agent is overridden by 1.0",
    ]


def test_a_setting_that_agrees_or_was_not_given_is_no_note(stage: Stage) -> None:
    stage.play(["A"], sampling=SamplingOverrides(temperature=0.7, max_tokens=40))
    ask(stage, temperature=0.7)
    assert stage.record().log == ()


def test_settings_that_are_not_applied_are_noted(stage: Stage) -> None:
    stage.play(["A"])
    ask(stage, frequency_penalty=0.5, presence_penalty=0, response_format={"type": "json_object"})
    assert stage.record().log == (
        "response_format is not enforced: the policy writes what it writes",
        "frequency_penalty is not applied: responses are sampled from the policy's own distribution",
    )


# Rewards


def test_rewards_are_posted_and_the_last_one_counts(stage: Stage) -> None:
    stage.play([])
    for reward in (0, 0.25, {"reward": 0.5, "format": 1}):
        answer = httpx.post(f"{stage.url}/reward", json={"reward": reward}, headers=stage.headers())
        assert answer.status_code == 200
    assert stage.record().reward == {"reward": 0.5, "format": 1.0}


def test_a_reward_of_zero_is_a_reward_and_none_is_none(stage: Stage) -> None:
    stage.play([])
    assert stage.record().reward is None
    stage.play([])
    httpx.post(f"{stage.url}/reward", json={"reward": 0}, headers=stage.headers())
    assert stage.record().reward == {"reward": 0.0}


@pytest.mark.parametrize("body", [b'{"reward": NaN}', b'{"reward": {"f1": 1}}', b'{"reward": "x"}', b'{"reward": {}}', b"{}"])
def test_a_reward_that_is_none_is_400(stage: Stage, body: bytes) -> None:
    stage.play([])
    answer = httpx.post(f"{stage.url}/reward", content=body, headers=stage.headers())
    assert (answer.status_code, answer.json()["error"]["param"].split(".")[0]) == (400, "reward")
    assert stage.record().reward is None


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
    for k, text in enumerate("abc"):
        threads.append(threading.Thread(target=ask, args=(stage, text)))
        threads[-1].start()
        until(lambda k=k: len(stage.sampler.submitted) == k + 1)
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
    threads = [threading.Thread(target=lambda k=k: answers.append(raw(stage, attempt=k))) for k in (0, 1)]
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
