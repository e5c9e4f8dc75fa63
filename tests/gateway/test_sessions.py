"""Keys, roles, sampling settings and rewards of a rollout."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import openai
import pytest

from lightningrl.gateway import SamplingOverrides
from tests.gateway.conftest import BODY, USER, Stage, ask, raw, until

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
