"""A policy as a Hugging Face checkpoint: `--policy` takes one, the tokenizer and the ends of an answer go along, and it is served."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from lightningrl.config import FitConfig
from lightningrl.errors import UserError
from lightningrl.model import decoder
from lightningrl.model.hf import VALUE_HEAD, WEIGHTS
from lightningrl.policy import Policy, export_policy, load_policy, save_policy
from lightningrl.sharding import make_mesh, params_sharding
from lightningrl.start import starting_policy, with_value_head
from scripts import convert_hf
from tests.model.hf_checkpoints import equal, random_params
from tests.tiny import tiny_policy

ROOT = pathlib.Path(__file__).parent.parent.parent
MESSAGES = [{"role": "system", "content": "name country"}, {"role": "user", "content": "How many singers are there?"}]


def random_policy(**changes: Any) -> Policy:
    policy = tiny_policy()
    config = dataclasses.replace(policy.config, **changes)
    return dataclasses.replace(policy, config=config, params=random_params(config))


def same_policy(ours: Policy, theirs: Policy) -> None:
    assert (ours.config, ours.end_ids) == (theirs.config, theirs.end_ids)
    equal(ours.params, theirs.params)
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    rendered = [p.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) for p in (ours, theirs)]
    assert rendered[0] == rendered[1]
    assert ours.tokenizer.encode(rendered[0]) == theirs.tokenizer.encode(rendered[0])
    assert (ours.tokenizer.eos_token_id, ours.tokenizer.pad_token_id) == (theirs.tokenizer.eos_token_id, theirs.tokenizer.pad_token_id)


@pytest.mark.parametrize("write", [save_policy, export_policy], ids=["ours", "hugging_face"])
@pytest.mark.parametrize("changes", [{"qk_norm": True}, {"qkv_bias": True, "value_head": True}, {"tie_embeddings": False}], ids=str)
def test_a_policy_is_read_as_it_was_written(write: Any, changes: dict[str, bool], tmp_path: pathlib.Path) -> None:
    policy = dataclasses.replace(random_policy(**changes), end_ids=(0, 1))
    write(tmp_path, policy)
    same_policy(load_policy(tmp_path), policy)
    mesh = make_mesh()
    sharded = load_policy(tmp_path, mesh=mesh)
    same_policy(sharded, policy)
    assert jax.tree.map(lambda leaf: leaf.sharding, sharded.params) == params_sharding(policy.config, mesh)
    assert load_policy(tmp_path, dtype=jnp.bfloat16).params["embedding"].dtype == jnp.bfloat16
    if write is export_policy:
        assert (tmp_path / VALUE_HEAD).exists() == policy.config.value_head
        for name in ("config.json", "generation_config.json"):
            fields = json.loads((tmp_path / name).read_text())
            assert (fields["eos_token_id"], fields["pad_token_id"]) == ([2, 0, 1], 0)


def test_the_tokenizer_goes_by_the_names_of_transformers_4(tmp_path: pathlib.Path) -> None:
    export_policy(tmp_path, random_policy())
    fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (fields["tokenizer_class"], fields["additional_special_tokens"]) == ("PreTrainedTokenizerFast", ["<|im_start|>"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.all_special_ids == tiny_policy().tokenizer.all_special_ids
    assert tokenizer.decode([1, 5, 40], skip_special_tokens=True) == tiny_policy().tokenizer.decode([5, 40])


def test_a_run_starts_from_a_checkpoint(tmp_path: pathlib.Path) -> None:
    policy = dataclasses.replace(random_policy(qkv_bias=True), end_ids=(1,))
    export_policy(tmp_path / "theirs", policy)
    config = FitConfig(policy=str(tmp_path / "theirs"))
    started = starting_policy(config, tmp_path / "out", [], [], critic=True, mesh=make_mesh())
    same_policy(started, with_value_head(policy))
    same_policy(load_policy(tmp_path / "out" / "start"), started)


def test_a_tokenizer_without_an_end_takes_that_of_the_generation_config(tmp_path: pathlib.Path) -> None:
    export_policy(tmp_path, random_policy())
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "eos_token"}))
    policy = load_policy(tmp_path)
    assert (policy.tokenizer.eos_token, policy.tokenizer.eos_token_id, policy.end_ids) == ("<|im_end|>", 2, ())


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("config.json", '{"model_type": "gemma3"}', "is of the architecture 'gemma3'; supported are Llama 3.x"),
        ("config.json", "[]", "should be a JSON object"),
        ("config.json", '{"width": 3}', "unknown setting 'width'"),
        ("config.json", '{"hidden_size": 3}', "does not describe a decoder"),
        ("generation_config.json", "[1]", "cannot be read as a generation config"),
        ("generation_config.json", '{"eos_token_id": "end"}', "cannot be read as a generation config"),
        ("tokenizer.json", "{}", "tokenizer"),
        ("tokenizer.json", None, "has no tokenizer.json"),
        (WEIGHTS, None, "holds no weights"),
        (WEIGHTS, "", "cannot be read as safetensors"),
    ],
)
def test_what_cannot_be_read_gets_one_sentence(file: str, text: str | None, says: str, tmp_path: pathlib.Path) -> None:
    export_policy(tmp_path, random_policy())
    if text is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(text)
    with pytest.raises(UserError) as error:
        load_policy(tmp_path)
    assert says in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_is_not_there_gets_one_sentence(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="there is no policy at .*nowhere: give a folder"):
        load_policy(tmp_path / "nowhere")


# ---- scripts/convert_hf.py
def test_there_and_back(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = random_policy(qk_norm=True, value_head=True)
    save_policy(tmp_path / "ours", policy)
    convert_hf.main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--max_file_mb=0.05"])
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    convert_hf.main(["from-hf", str(tmp_path / "theirs"), str(tmp_path / "again")])
    same_policy(load_policy(tmp_path / "again"), policy)
    assert f"{tmp_path / 'again'}: " in capsys.readouterr().out


def test_dtype_of_what_is_written(tmp_path: pathlib.Path) -> None:
    policy = random_policy()
    save_policy(tmp_path / "ours", policy)
    for direction in ("to-hf", "from-hf"):
        convert_hf.main([direction, str(tmp_path / "ours"), str(tmp_path / direction), "--dtype=bfloat16"])
        expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), policy.params)
        equal(load_policy(tmp_path / direction).params, expected)
    ours, theirs = (sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors")) for name in ("ours", "to-hf"))
    assert theirs < 0.55 * ours


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["to-hf", "nowhere", "OUT"], "error: there is no policy at nowhere"),
        (["to-hf", "POLICY", "POLICY"], "error: OUT is IN"),
        (["to-hf", "POLICY", "OUT", "--max_file_mb=-1"], "error: max_file_mb=-1.0 must be more than 0"),
    ],
)
def test_errors_of_the_script(arguments: list[str], says: str, tmp_path: pathlib.Path) -> None:
    save_policy(tmp_path / "policy", random_policy())
    places = {"POLICY": str(tmp_path / "policy"), "OUT": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as error:
        convert_hf.main([places.get(argument, argument) for argument in arguments])
    assert isinstance(error.value.code, str) and error.value.code.startswith(says) and "\n" not in error.value.code


def test_help_of_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        convert_hf.main(["--help"])
    assert end.value.code == 0 and "--max_file_mb" in capsys.readouterr().out


# ---- transformers serve
def greedy(policy: Policy, prompt: list[int], count: int) -> list[int]:
    """What the policy answers when each token is its likeliest, computed by the decoder row by row."""
    length = -(-(len(prompt) + count) // 32) * 32
    config, positions = policy.config, np.arange(length, dtype=np.int32)[None]

    @jax.jit
    def next_token(params: Any, tokens: jax.Array, seen: jax.Array) -> jax.Array:
        end = jnp.where(positions < seen, seen, positions).astype(jnp.int32)
        hidden = decoder.forward(params, config, tokens, positions, end)[0, seen - 1]
        return jnp.argmax(decoder.logits(params, config, hidden))

    ids = list(prompt)
    while len(ids) < len(prompt) + count and ids[-1:] != [policy.tokenizer.eos_token_id]:
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(ids)] = ids
        ids.append(int(next_token(policy.params, tokens, np.int32(len(ids)))))
    return ids[len(prompt) :]


@pytest.fixture
def served(tmp_path: pathlib.Path) -> Iterator[tuple[Policy, str]]:
    """An exported policy, and the address at which `transformers serve` answers with it."""
    policy = random_policy(tie_embeddings=False)  # a Llama: of Qwen's answers it cuts out tool calls and gives the rest as it stands
    export_policy(tmp_path / "policy", policy, max_file_mb=0.05)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(tmp_path / "policy")]
    command += ["--host=127.0.0.1", f"--port={port}", "--device=cpu"]
    with (tmp_path / "log").open("w") as log:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=tmp_path)
        try:
            for _ in range(2400):
                assert process.poll() is None, (tmp_path / "log").read_text()
                try:
                    httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).raise_for_status()
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield policy, f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.slow
def test_transformers_serves_an_exported_policy(served: tuple[Policy, str], tmp_path: pathlib.Path) -> None:
    policy, address = served
    body = {"model": str(tmp_path / "policy"), "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    response = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=120, trust_env=False)
    assert response.status_code == 200, response.text
    answer = response.json()
    text = policy.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    prompt = policy.tokenizer.encode(text)
    ours = greedy(policy, prompt, 24)
    assert len(set(ours)) > 8  # an answer that repeats one token would show little
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (len(prompt), len(ours))
    assert answer["choices"][0]["message"]["content"] == policy.tokenizer.decode(ours, skip_special_tokens=True)
