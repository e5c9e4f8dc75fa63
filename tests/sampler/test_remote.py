"""An engine in a second process samples: what is recorded is what it said, and it learns with the run."""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import jax
import numpy as np
import optax
import pytest

from lightningrl.errors import UserError
from lightningrl.fit import fit
from lightningrl.gateway.calls import sampling_key
from lightningrl.policy import Policy, load_policy, save_policy
from lightningrl.recipes import get_recipe
from lightningrl.runtime import Store
from lightningrl.sampler.engine import PolicySampler, SamplerSettings
from lightningrl.sampler.protocol import EngineError, completion_of, completion_request
from lightningrl.sampler.remote import KEY, RELOADS, EngineSettings, RemoteSampler, reload_requests
from lightningrl.serving import make_sampler
from lightningrl.sharding import make_mesh
from lightningrl.train import TrainStep
from lightningrl.types import Rollout, SamplingParams
from tests.test_fit import TASKS, agent
from tests.test_fit import config as config  # noqa: PLC0414 - a fixture
from tests.tiny import tiny_policy

ROOT = pathlib.Path(__file__).parents[2]
SECRET = "only for this test"
CONTEXT = 64


def command(folder: pathlib.Path, *more: str) -> list[str]:
    return [sys.executable, "scripts/serve.py", f"--policy={folder}", "--port=0", f"--context_length={CONTEXT}", "--slots=8", *more]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy(0)


@pytest.fixture(scope="module")
def engine(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of scripts/serve.py."""
    folder = tmp_path_factory.mktemp("engine") / "policy"
    save_policy(folder, policy)
    environment = os.environ | {KEY: SECRET, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command(folder), stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as process:
        assert process.stdout is not None
        started = re.fullmatch(r"serving .+ as policy at (http://127\.0\.0\.1:\d+)/v1\n", process.stdout.readline())
        assert started
        try:
            yield started[1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SECRET)


def remote(url: str, folder: pathlib.Path, policy: Policy, **settings: Any) -> RemoteSampler:
    def export(folder: pathlib.Path, params: Any) -> None:
        save_policy(folder, dataclasses.replace(policy, params=params))

    options = {"model": "policy", "reload": RELOADS["lightningrl"], "context_length": CONTEXT, **settings}
    return RemoteSampler(EngineSettings(url, folder, **options), policy.tokenizer, export)


def local(policy: Policy, prompt: np.ndarray, params: SamplingParams, seed: int | None = None, key: Any = None) -> Any:
    """What this process samples as the engine does for that seed."""
    with PolicySampler(policy.params, policy.config, policy.tokenizer, SamplerSettings(8, CONTEXT)) as sampler:
        return sampler.submit(prompt, params, key or sampling_key(0, "", prompt, 0, 0, seed)).result(60)


PROMPT = np.arange(20, 40, dtype=np.int32)
KINDS = {
    "sampled": SamplingParams(12),
    "tempered": SamplingParams(12, temperature=0.7),
    "greedy, with alternatives": SamplingParams(6, temperature=0.0, top_logprobs=3),
    "truncated": SamplingParams(12, top_p=0.9, top_k=5),
    "to the end of the context": SamplingParams(1000),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_and_logprobs_are_the_engines_own(engine: str, tmp_path: pathlib.Path, policy: Policy, kind: str) -> None:
    key = (2**32 - 5, 17)
    parts = []
    with remote(engine, tmp_path, policy, model=None) as sampler:
        sampler.check()
        future = sampler.submit(PROMPT, KINDS[kind], key, lambda ids, logprobs: parts.append((ids, logprobs)))
        there = future.result(60)
        again = sampler.submit(PROMPT, KINDS[kind], key).result(60)
    seed = completion_request(None, PROMPT, KINDS[kind], key, 0)["seed"]
    assert seed == (((2**32 - 5) << 32) | 17) & (2**63 - 1)
    here = local(policy, PROMPT, KINDS[kind], seed)
    for other in (here, again):  # JSON keeps every bit of a float
        np.testing.assert_array_equal(there.token_ids, other.token_ids)
        np.testing.assert_array_equal(there.logprobs, other.logprobs)
        assert (there.finish_reason, there.text, there.top) == (other.finish_reason, other.text, other.top)
    assert there.token_ids.dtype == np.int32 and there.logprobs.dtype == np.float32
    ((ids, logprobs),) = parts
    assert ids is there.token_ids and logprobs is there.logprobs
    assert sampler.queue_length == 0 and sampler.busy_seconds > 0


@pytest.mark.slow
def test_a_stop_string_and_a_request_without_a_seed(engine: str, tmp_path: pathlib.Path, policy: Policy) -> None:
    free = local(policy, PROMPT, SamplingParams(12, temperature=0.0))
    stop = next(character for character in free.text[1:] if character.isascii())
    params = SamplingParams(12, temperature=0.0, stop=(stop,))
    with remote(engine, tmp_path, policy) as sampler:
        there = sampler.submit(PROMPT, params, (0, 1)).result(60)
    here = local(policy, PROMPT, params)
    np.testing.assert_array_equal(there.token_ids, here.token_ids)
    assert (there.finish_reason, there.text) == ("stop", here.text) and stop not in there.text

    headers = {"Authorization": f"Bearer {SECRET}"}
    body = {"model": "policy", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12}
    replies = {httpx.post(f"{engine}/v1/chat/completions", json=body, headers=headers, timeout=60).text for _ in range(3)}
    assert len({json.loads(reply)["choices"][0]["message"]["content"] for reply in replies}) > 1


@pytest.mark.slow
def test_the_engine_takes_new_weights_and_the_last_folder_stays(engine: str, tmp_path: pathlib.Path, policy: Policy) -> None:
    other = tiny_policy(1)
    with remote(engine, tmp_path / "weights", policy) as sampler:
        sampler.check()
        for version, params in ((3, policy.params), (4, other.params)):
            sampler.set_params(params, version)
            assert [path.name for path in (tmp_path / "weights").iterdir()] == [str(version)]
        learned = sampler.submit(PROMPT, SamplingParams(8), (5, 6)).result(60)
        here = local(other, PROMPT, SamplingParams(8), completion_request(None, PROMPT, SamplingParams(8), (5, 6), 0)["seed"])
        np.testing.assert_array_equal(learned.logprobs, here.logprobs)
        assert learned.policy_version == 4
        wider = tiny_policy(0, hidden_size=16)
        with pytest.raises(UserError, match=r"did not take the weights in .*/5 \(/admin/reload: HTTP 400, .* has another shape"):
            remote(engine, tmp_path / "weights", wider).set_params(wider.params, 5)
        sampler.set_params(policy.params, 6)


@pytest.mark.slow
def test_a_fit_whose_responses_an_engine_samples(engine: str, tmp_path: pathlib.Path, policy: Policy, config: Any) -> None:
    save_policy(tmp_path / "policy", policy)
    settings = {"engine": engine, "engine_reload": "lightningrl", "policy": str(tmp_path / "policy"), "context_length": CONTEXT}
    config = dataclasses.replace(config, **settings)
    fitted = fit(agent, TASKS[:4], None, config, heldout={"heldout": TASKS[4:]})
    out = pathlib.Path(config.out)
    first, second = fitted.metrics[1:]
    for row in (first, second):
        assert row["failed"] == 0 and row["calls"] == 8
        assert row["logprob_gap_max"] <= 1e-4  # so the engine had this iteration's weights: those before are farther away
        assert row["correction_weight_mean"] == pytest.approx(1.0, abs=1e-4) and row["correction_dropped_fraction"] == 0
    with Store(out / "rollouts.sqlite") as store:
        for iteration in (1, 2):
            calls = [call for rollout in store.read("train", iteration) for call in rollout.transitions]
            assert {call.policy_version for call in calls} == {iteration - 1}
    # What was recorded is what the engine says: with the last weights, asked as the gateway asked.
    assert [path.name for path in (out / "engine").iterdir()] == ["2"]
    trained = load_policy(out / "policy")
    assert max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (trained.params, policy.params)), strict=True)) > 1e-4
    with remote(engine, tmp_path / "engine", policy) as sampler, Store(out / "rollouts.sqlite") as store:
        sampler.check()
        (rollout,) = store.read("heldout", 2)
        (call,) = rollout.transitions
        again = sampler.submit(call.prompt_ids, SamplingParams(config.max_tokens, temperature=0.0), (0, 0)).result(60)
        np.testing.assert_array_equal(again.token_ids, call.response_ids)
        np.testing.assert_array_equal(again.logprobs, call.logprobs)
        sampler.set_params(policy.params, 0)


@pytest.mark.slow
def test_an_engine_with_log_probs_of_its_own_is_corrected_for(engine: str, tmp_path: pathlib.Path, policy: Policy, config: Any) -> None:
    """An engine that rounds otherwise: all its log-probs are 0.1 less than the trainer's, so that every token weighs e^0.1."""

    def rounded_otherwise(rollouts: Sequence[Rollout], iteration: int) -> list[Rollout]:
        return [
            dataclasses.replace(r, transitions=tuple(dataclasses.replace(t, logprobs=t.logprobs - np.float32(0.1)) for t in r.transitions))
            for r in rollouts
        ]

    save_policy(tmp_path / "policy", policy)
    settings = {"engine": engine, "engine_reload": "lightningrl", "policy": str(tmp_path / "policy"), "context_length": CONTEXT}
    moved = {}
    for correction in ("truncated", "none"):
        own = {"engine_correction": correction, "iterations": 1, "out": str(tmp_path / correction)}
        fitted = fit(agent, TASKS[:4], None, dataclasses.replace(config, **settings, **own), alter=rounded_otherwise)
        moved[correction] = fitted.metrics[1]
    assert moved["truncated"]["logprob_gap_mean"] == pytest.approx(0.1, abs=1e-4)
    assert moved["truncated"]["correction_weight_mean"] == pytest.approx(np.exp(0.1), abs=1e-4)
    assert moved["truncated"]["grad_norm"] == pytest.approx(np.exp(0.1) * moved["none"]["grad_norm"], rel=1e-3)
    assert "correction_weight_mean" not in moved["none"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model": "gpt-9"}, "has no model 'gpt-9': give --engine_model as one of policy"),
        ({"api_key": "wrong"}, f"refuses the key: set {KEY} to the one that it was started with"),
    ],
)
def test_an_engine_that_is_asked_in_the_wrong_way(
    engine: str, tmp_path: pathlib.Path, policy: Policy, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], sentence: str
) -> None:
    if wrong := settings.pop("api_key", None):
        monkeypatch.setenv(KEY, wrong)
        assert httpx.post(f"{engine}/admin/reload", json={"folder": "/"}).status_code == 401
    with pytest.raises(UserError, match=f"the engine at {engine} {sentence}"):
        remote(engine, tmp_path, policy, **settings).check()


class Poor(http.server.BaseHTTPRequestHandler):
    """An engine that leaves something out."""

    answers: dict[str, Any] = {}

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        said = self.answers.get(self.path)
        self.send_response(404 if said is None else 200)
        self.end_headers()
        self.wfile.write(b"" if said is None else json.dumps(said).encode())

    do_GET = do_POST = answer

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def poor() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Poor) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


ONE = {"data": [{"id": "m"}]}
TEXT = {"index": 0, "text": "x", "finish_reason": "length"}


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        ({}, "/v1/models answered HTTP 404: give --engine the URL of an OpenAI-compatible engine"),
        ({"/v1/models": ["m"]}, "does not answer as an OpenAI-compatible engine does"),
        ({"/v1/models": {"data": [{"id": "a"}, {"id": "b"}]}}, "serves several models or none: give --engine_model as one of a, b"),
        ({"/v1/models": {"data": [{"id": "m", "max_model_len": 32}]}}, "takes 32 tokens, fewer than context_length=64"),
        ({"/v1/models": ONE}, "cannot be trained with: it answered HTTP 404"),
        ({"/v1/models": ONE, "/v1/completions": {"choices": [TEXT]}}, "answers without token ids: use one that knows return_token_ids"),
        ({"/v1/models": ONE, "/v1/completions": {"choices": [TEXT | {"token_ids": [5]}]}}, "answers without a log-prob for every token"),
    ],
)
def test_an_engine_that_does_not_say_enough(
    poor: str, tmp_path: pathlib.Path, policy: Policy, monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setattr(Poor, "answers", answers)
    with pytest.raises(UserError) as refused:
        remote(poor, tmp_path, policy, model=None).check()
    assert sentence in str(refused.value) and poor in str(refused.value) and "\n" not in str(refused.value)


def test_an_engine_that_is_not_there(tmp_path: pathlib.Path, policy: Policy, config: Any) -> None:
    config = dataclasses.replace(config, engine="http://127.0.0.1:1/v1")
    step = TrainStep(policy.config, get_recipe("lightningrl"), optax.sgd(1.0), make_mesh())
    with pytest.raises(UserError, match=r"there is no engine at http://127.0.0.1:1/v1 \(.+\): give the --engine of one that runs"):
        make_sampler(step, (), policy, config)
    with remote("http://127.0.0.1:1", tmp_path, policy) as sampler:
        with pytest.raises(EngineError, match="the engine at http://127.0.0.1:1 cannot be reached"):
            sampler.submit(PROMPT, SamplingParams(3), (0, 0)).result(60)
        with pytest.raises(ValueError, match="a prompt of 64 tokens does not fit a context of 64"):
            sampler.submit(np.zeros(64, np.int32), SamplingParams(3), (0, 0))
    with pytest.raises(RuntimeError, match="not running"):
        sampler.submit(PROMPT, SamplingParams(3), (0, 0))


def test_what_is_posted_for_new_weights(poor: str, tmp_path: pathlib.Path, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    posted = []

    def answer(self: Poor) -> None:
        posted.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.headers["Authorization"]))
        self.send_response(200)
        self.end_headers()

    monkeypatch.setattr(Poor, "do_POST", answer)
    remote(poor, tmp_path, policy, reload=RELOADS["vllm"]).set_params(policy.params, 7)
    folder = str(tmp_path / "7")
    reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
    assert posted == [("/collective_rpc", reload, f"Bearer {SECRET}"), ("/reset_prefix_cache", {}, f"Bearer {SECRET}")]
    written = jax.tree.leaves(load_policy(tmp_path / "7").params)
    assert all(np.array_equal(a, b) for a, b in zip(written, jax.tree.leaves(policy.params), strict=True))

    posted.clear()
    own = reload_requests('[["/load?v={version}", {"paths": ["{folder}/x"], "n": 1}]]')
    remote(poor, tmp_path, policy, reload=own).set_params(policy.params, 8)
    assert posted == [("/load?v={version}", {"paths": [f"{tmp_path}/8/x"], "n": 1}, f"Bearer {SECRET}")]


@pytest.mark.parametrize("text", ["sglang", "[]", "{}", '[["no slash", {}]]', '["/path"]', "[1]"])
def test_a_reload_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UserError, match="is neither vllm nor lightningrl nor JSON such as"):
        reload_requests(text)


def test_responses_that_engines_break_off() -> None:
    whole = {"token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "abort"}
    with pytest.raises(EngineError, match=r"it broke a response off \(abort\)"):
        completion_of(httpx.Response(200, json={"choices": [whole]}), SamplingParams(1), 0, None)
    with pytest.raises(EngineError, match="with something that is no completion"):
        completion_of(httpx.Response(200, json={"choices": []}), SamplingParams(1), 0, None)
    with pytest.raises(EngineError, match="it answered HTTP 500, out of memory"):
        completion_of(httpx.Response(500, json={"error": {"message": "out of\nmemory."}}), SamplingParams(1), 0, None)


@pytest.mark.slow
def test_a_server_for_everybody_needs_a_key(tmp_path: pathlib.Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != KEY} | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command(tmp_path, "--host=0.0.0.0"), capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 1 and run.stderr == (
        f"error: on 0.0.0.0 everybody could reach this server: set {KEY} to a key, or listen on 127.0.0.1\n"
    )
