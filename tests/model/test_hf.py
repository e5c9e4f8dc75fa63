"""Weights in and out: through files and back, and what is refused."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from lightningrl.errors import UserError
from lightningrl.model.hf import INDEX, VALUE_HEAD, WEIGHTS, save_hf
from tests.model.hf_checkpoints import OURS, equal, load, random_params
from tests.model.test_decoder import LLAMA_3, QWEN_3, QWEN_25


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("max_file_mb", [0.01, 1000])
def test_round_trip(name: str, max_file_mb: float, tmp_path: pathlib.Path) -> None:
    params, config = random_params(OURS[name]), OURS[name]
    save_hf(tmp_path, params, config, max_file_mb=max_file_mb)
    weights = {path.name for path in tmp_path.glob("model*.safetensors")}
    assert weights == {WEIGHTS} if max_file_mb > 1 else len(weights) > 1
    assert all(path.stat().st_size < max_file_mb * 1e6 + 2000 for path in tmp_path.glob("model-*.safetensors"))  # 2000: the header
    loaded, read = load(tmp_path)
    assert read == config
    equal(loaded, params)


def test_dtypes_are_cast_on_the_way(tmp_path: pathlib.Path) -> None:
    params, config = random_params(QWEN_25, jnp.bfloat16), QWEN_25
    save_hf(tmp_path, params, config)
    with safetensors.safe_open(tmp_path / WEIGHTS, framework="np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    equal(load(tmp_path)[0], jax.tree.map(lambda x: x.astype(np.float32), params))
    equal(load(tmp_path, dtype=jnp.bfloat16)[0], params)  # the value head stays float32
    save_hf(tmp_path, load(tmp_path)[0], config, dtype=ml_dtypes.bfloat16)
    equal(load(tmp_path, dtype=jnp.bfloat16)[0], params)


def test_what_the_folder_held_before_is_gone(tmp_path: pathlib.Path) -> None:
    save_hf(tmp_path, random_params(QWEN_25), QWEN_25)
    assert (tmp_path / WEIGHTS).exists() and (tmp_path / VALUE_HEAD).exists()
    save_hf(tmp_path, random_params(LLAMA_3), LLAMA_3, max_file_mb=0.01)
    equal(load(tmp_path)[0], random_params(LLAMA_3))
    assert not (tmp_path / WEIGHTS).exists() and not (tmp_path / VALUE_HEAD).exists()
    save_hf(tmp_path, random_params(QWEN_3), QWEN_3)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["config.json", VALUE_HEAD, WEIGHTS])


def test_tied_checkpoints_may_hold_the_head_again_and_constants_of_rope(tmp_path: pathlib.Path) -> None:
    save_hf(tmp_path, random_params(QWEN_25), QWEN_25)
    tensors = safetensors.numpy.load_file(tmp_path / WEIGHTS)
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"], "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3)}
    safetensors.numpy.save_file(tensors, tmp_path / WEIGHTS)
    equal(load(tmp_path)[0], random_params(QWEN_25))


# ---- what is refused, with one sentence
@pytest.fixture
def checkpoint(tmp_path: pathlib.Path) -> pathlib.Path:
    save_hf(tmp_path, random_params(LLAMA_3), LLAMA_3, max_file_mb=0.01)
    return tmp_path


def shard_of(directory: pathlib.Path, name: str) -> pathlib.Path:
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][name]


def refused(directory: pathlib.Path, *says: str) -> None:
    with pytest.raises(UserError) as error:
        load(directory)
    assert all(part in str(error.value) for part in (str(directory), *says)), error.value
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(checkpoint: pathlib.Path) -> None:
    path = shard_of(checkpoint, "model.norm.weight")
    path.unlink()
    refused(checkpoint, path.name, "is missing")


@pytest.mark.parametrize("keep", [0, 4, 100, -8])
def test_a_broken_file_is_named(checkpoint: pathlib.Path, keep: int) -> None:
    path = shard_of(checkpoint, "model.norm.weight")
    path.write_bytes(path.read_bytes()[:keep])
    refused(checkpoint, path.name, "cannot be read as safetensors")


def test_a_file_that_lacks_what_the_index_says_is_named(checkpoint: pathlib.Path) -> None:
    path = shard_of(checkpoint, "model.norm.weight")
    safetensors.numpy.save_file({"other": np.zeros(3, np.float32)}, path)
    refused(checkpoint, path.name, "lacks the tensor")


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"model.norm.weight": 3}}'])
def test_a_broken_index_is_named(checkpoint: pathlib.Path, index: str) -> None:
    (checkpoint / INDEX).write_text(index)
    refused(checkpoint, INDEX, "cannot be read")


def test_a_folder_without_weights_is_named(checkpoint: pathlib.Path) -> None:
    (checkpoint / INDEX).unlink()
    refused(checkpoint, "holds no weights")


def change(directory: pathlib.Path, **tensors: np.ndarray | None) -> None:
    """Rewrites a checkpoint of one file with some tensors changed, added or (None) left out."""
    save_hf(directory, random_params(LLAMA_3), LLAMA_3)
    held = safetensors.numpy.load_file(directory / WEIGHTS) | tensors
    safetensors.numpy.save_file({name: tensor for name, tensor in held.items() if tensor is not None}, directory / WEIGHTS)


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("model.layers.0.self_attn.o_proj.bias", np.zeros(24, np.float32), "no place"),
        ("lm_head.weight", None, "lacks the tensor"),
        ("model.norm.weight", np.zeros(23, np.float32), "of shape [23], but by config.json it is [24]"),
        ("model.norm.weight", np.zeros(24, np.int8), "stored as I8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name: str, tensor: np.ndarray | None, says: str, tmp_path: pathlib.Path) -> None:
    change(tmp_path, **{name: tensor})
    refused(tmp_path, repr(name), says)


def test_files_need_a_size(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="max_file_mb=0 must be more than 0"):
        save_hf(tmp_path, random_params(LLAMA_3), LLAMA_3, max_file_mb=0)
