"""Weights in and out: against `transformers`' torch implementation, through files and back, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from lightningrl.errors import UserError
from lightningrl.model import decoder
from lightningrl.model.config import ModelConfig
from lightningrl.model.hf import INDEX, VALUE_HEAD, WEIGHTS, load_arrays, save_hf
from lightningrl.model.hf_config import config_from_hf
from lightningrl.model.hf_layout import hf_sources
from lightningrl.model.params import shapes
from tests.model.test_decoder import LLAMA_3, QWEN_3, QWEN_25

SHAPE = dict(vocab_size=72, hidden_size=48, num_hidden_layers=2, intermediate_size=56, max_position_embeddings=128)
GROUPED = dict(num_attention_heads=6, num_key_value_heads=2)
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
THEIRS = {
    "llama_3.1": LlamaConfig(**SHAPE, **GROUPED, rope_theta=5e5, rope_scaling=SCALED, rms_norm_eps=1e-5),
    "llama_3.2": LlamaConfig(**SHAPE, **GROUPED, rope_theta=5e5, rope_scaling=SCALED, head_dim=16, tie_word_embeddings=True),
    "llama_of_one_kv_head": LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=1),
    "qwen_2.5_tied": Qwen2Config(**SHAPE, **GROUPED, rope_theta=1e6, tie_word_embeddings=True),
    "qwen_2.5": Qwen2Config(**SHAPE, num_attention_heads=4, num_key_value_heads=4, rope_theta=1e6),
    "qwen_3": Qwen3Config(**SHAPE, **GROUPED, head_dim=20, rope_theta=1e6),
    "qwen_3_tied": Qwen3Config(**SHAPE, num_attention_heads=4, num_key_value_heads=2, head_dim=24, tie_word_embeddings=True),
}
OURS = {"llama_3": LLAMA_3, "qwen_2.5": QWEN_25, "qwen_3": dataclasses.replace(QWEN_3, value_head=True)}
IDS = np.random.default_rng(0).integers(0, 40, (2, 48)).astype(np.int32)  # beyond the original 32 positions of the scaled RoPE


def random_torch(config: Any) -> Any:
    """Random in every array, biases and norms too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def random_params(config: ModelConfig, dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(3)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        return rng.normal("norm" in jax.tree_util.keystr(path), 0.2, leaf.shape).astype(dtype)

    params = jax.tree_util.tree_map_with_path(draw, shapes(config))
    return params if "value_head" not in params else {**params, "value_head": params["value_head"].astype(np.float32)}


def read_config(directory: pathlib.Path) -> ModelConfig:
    path = directory / "config.json"
    return config_from_hf(json.loads(path.read_text()), str(path))


def load(directory: pathlib.Path, **settings: Any) -> tuple[Any, ModelConfig]:
    config = dataclasses.replace(read_config(directory), value_head=(directory / VALUE_HEAD).exists())
    return load_arrays(directory, config, hf_sources(config), **settings), config


def our_logits(params: Any, config: ModelConfig) -> np.ndarray:
    length = IDS.shape[1]
    positions, end = np.tile(np.arange(length, dtype=np.int32), (2, 1)), np.full(IDS.shape, length, np.int32)

    def logits(params: Any) -> jax.Array:
        return decoder.logits(params, config, decoder.forward(params, config, IDS, positions, end))

    return np.asarray(jax.jit(logits, compiler_options={"xla_backend_optimization_level": 0})(params))


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS.astype(np.int64))).logits.numpy()


def same_logits(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert theirs.std() > 0.3  # far more than the tolerance


def equal(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", THEIRS)
def test_a_checkpoint_of_transformers_has_its_logits(name: str, tmp_path: pathlib.Path) -> None:
    model = random_torch(THEIRS[name])
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / INDEX).exists()
    same_logits(our_logits(*load(tmp_path)), torch_logits(model))


@pytest.mark.parametrize("name", OURS)
def test_transformers_loads_what_is_exported(name: str, tmp_path: pathlib.Path) -> None:
    params, config = random_params(OURS[name]), OURS[name]
    save_hf(tmp_path, params, config, max_file_mb=0.01)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    same_logits(our_logits(params, config), torch_logits(model.eval()))


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
