"""Every error has the shape that OpenAI's clients expect, and leaves nothing behind."""

from __future__ import annotations

import socket
from typing import Any

import httpx
import openai
import pytest

from lightningrl.errors import UserError
from lightningrl.gateway import Gateway, GatewayError, GatewaySettings
from tests.gateway.conftest import Stage

USER: Any = {"role": "user", "content": "hi"}
BODY: dict[str, Any] = {"model": "policy", "messages": [USER]}


def post(stage: Stage, body: Any, path: str = "chat/completions", **options: Any) -> httpx.Response:
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    return httpx.post(f"{stage.url}/{path}", headers=stage.headers(), **content, **options)


def error(answer: httpx.Response) -> dict[str, Any]:
    (name, value), *others = answer.json().items()
    assert (name, others, set(value)) == ("error", [], {"message", "type", "param", "code"})
    return value


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "reward"])
@pytest.mark.parametrize("header", ["Bearer nobody", "Basic x", ""])
def test_an_unknown_key_is_401(stage: Stage, path: str, header: str) -> None:
    answer = httpx.post(f"{stage.url}/{path}", json=BODY, headers={"Authorization": header})
    assert answer.status_code == 401
    assert (error(answer)["code"], error(answer)["type"]) == ("invalid_api_key", "authentication_error")


def test_the_openai_client_raises_its_own_exceptions(stage: Stage) -> None:
    stage.play(["A"])
    client = stage.client()
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="nobody").chat.completions.create(**BODY)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=[USER])
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="policy", messages=[USER] * 2000)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    stage.sampler.busy = 8
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(**BODY)
    assert stage.transitions() == ()


@pytest.mark.parametrize("model", ["gpt-4o", "polic", "policyx", "policy:", "policy_writer", ""])
def test_an_unknown_model_is_404(stage: Stage, model: str) -> None:
    stage.play([])
    answer = post(stage, {**BODY, "model": model})
    assert answer.status_code == 404
    assert (error(answer)["code"], error(answer)["param"]) == ("model_not_found", "model")
    assert "`policy`" in error(answer)["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [USER, {"content": "x"}]}, "messages.1.role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"top_k": 2**31}, "top_k"),
        ({"stop": ""}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"top_logprobs": 99}, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b<|im_end|>"}}]}, "tools.0.function.name"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ],
)
def test_a_malformed_body_is_400_and_names_the_field(stage: Stage, change: dict[str, Any], param: str) -> None:
    stage.play([])
    answer = post(stage, {**BODY, **change})
    assert answer.status_code == 400
    assert error(answer)["param"].startswith(param)
    assert error(answer)["type"] == "invalid_request_error"
    assert "\n" not in error(answer)["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"null", b'{"model": "\\ud800"}', b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_400(stage: Stage, body: bytes) -> None:
    stage.play([])
    answer = post(stage, body)
    assert (answer.status_code, error(answer)["code"]) == (400, "invalid_json")


@pytest.mark.parametrize(("path", "param"), [("chat/completions", "messages"), ("completions", "prompt"), ("responses", "input")])
def test_a_prompt_past_the_context_is_400(stage: Stage, path: str, param: str) -> None:
    stage.play([])
    text = "<|im_end|>word " * 2000
    body = {"model": "policy", "messages": [{"role": "user", "content": text}], "prompt": text, "input": text}
    answer = post(stage, body, path)
    assert (answer.status_code, error(answer)["code"], error(answer)["param"]) == (400, "context_length_exceeded", param)
    assert "2048 tokens" in error(answer)["message"]


def test_a_full_queue_is_429_with_retry_after(stage: Stage) -> None:
    stage.play([])
    stage.sampler.busy = 8
    answer = post(stage, BODY)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert (error(answer)["code"], error(answer)["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert stage.transitions() == ()


@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_sampler_is_an_error_and_no_transition(stage: Stage, stream: bool) -> None:
    stage.play(["A"])
    stage.sampler.error = ValueError("no memory")
    with pytest.raises(openai.APIError, match="The sampler failed: ValueError: no memory"):
        list(stage.client().chat.completions.create(**BODY, stream=stream))
    assert stage.transitions() == ()


def test_a_sampler_that_refuses_is_500_and_no_transition(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.play(["A"])

    def refuse(*arguments: Any) -> None:
        raise RuntimeError("closed")

    monkeypatch.setattr(stage.sampler, "submit", refuse)
    answer = post(stage, BODY)
    assert (answer.status_code, error(answer)["message"]) == (500, "The sampler refused the request: RuntimeError: closed")
    assert stage.transitions() == ()


def test_an_unknown_path_or_method_is_404_or_405(stage: Stage) -> None:
    stage.play([])
    assert error(post(stage, BODY, "embeddings"))["message"] == "Not Found: POST /v1/embeddings is not served here."
    assert httpx.get(f"{stage.url}/chat/completions", headers=stage.headers()).status_code == 405


def test_a_port_in_use_is_one_clear_sentence(tokenizer: Any, stage: Stage) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(GatewayError) as caught:
            Gateway(stage.sampler, tokenizer, GatewaySettings(port=port)).start()
    expected = f"port {port} on 127.0.0.1 is in use by another program: choose another one, or 0 for any free port"
    assert str(caught.value) == expected
    assert isinstance(caught.value, UserError)


def test_a_host_that_is_not_ours_is_one_clear_sentence(tokenizer: Any, stage: Stage) -> None:
    with pytest.raises(GatewayError, match="port 0 on 192.0.2.1 can't be listened on"):
        Gateway(stage.sampler, tokenizer, GatewaySettings(host="192.0.2.1")).start()


def test_the_base_url_of_a_gateway_that_was_not_started(tokenizer: Any, stage: Stage) -> None:
    with pytest.raises(GatewayError, match="has not been started"):
        _ = Gateway(stage.sampler, tokenizer).base_url
