"""Against `transformers`' torch implementation: its logits from its checkpoints, and its logits from ours.

torch is imported by the tests and not by the module: collecting tests would else take seconds in every process.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from lightningrl.model import decoder
from lightningrl.model.config import ModelConfig
from lightningrl.model.hf import INDEX, save_hf
from tests.model.hf_checkpoints import OURS, load, random_params

pytestmark = pytest.mark.slow

SHAPE = dict(vocab_size=72, hidden_size=48, num_hidden_layers=2, intermediate_size=56, max_position_embeddings=128)
GROUPED = dict(num_attention_heads=6, num_key_value_heads=2)
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
THEIRS = {
    "llama_3.1": dict(model_type="llama", **SHAPE, **GROUPED, rope_theta=5e5, rope_scaling=SCALED, rms_norm_eps=1e-5),
    "llama_3.2": dict(model_type="llama", **SHAPE, **GROUPED, rope_theta=5e5, rope_scaling=SCALED, head_dim=16, tie_word_embeddings=True),
    "llama_of_one_kv_head": dict(model_type="llama", **SHAPE, num_attention_heads=4, num_key_value_heads=1),
    "qwen_2.5_tied": dict(model_type="qwen2", **SHAPE, **GROUPED, rope_theta=1e6, tie_word_embeddings=True),
    "qwen_2.5": dict(model_type="qwen2", **SHAPE, num_attention_heads=4, num_key_value_heads=4, rope_theta=1e6),
    "qwen_3": dict(model_type="qwen3", **SHAPE, **GROUPED, head_dim=20, rope_theta=1e6),
    "qwen_3_tied": dict(model_type="qwen3", **SHAPE, num_attention_heads=4, num_key_value_heads=2, head_dim=24, tie_word_embeddings=True),
}
IDS = np.random.default_rng(0).integers(0, 40, (2, 48)).astype(np.int32)  # beyond the original 32 positions of the scaled RoPE


def random_torch(settings: dict[str, Any]) -> Any:
    """Random in every array, biases and norms too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def our_logits(params: Any, config: ModelConfig) -> np.ndarray:
    length = IDS.shape[1]
    positions, end = np.tile(np.arange(length, dtype=np.int32), (2, 1)), np.full(IDS.shape, length, np.int32)

    def logits(params: Any) -> jax.Array:
        return decoder.logits(params, config, decoder.forward(params, config, IDS, positions, end))

    return np.asarray(jax.jit(logits, compiler_options={"xla_backend_optimization_level": 0})(params))


def torch_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(IDS.astype(np.int64))).logits.numpy()


def same_logits(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert theirs.std() > 0.3  # far more than the tolerance


@pytest.mark.parametrize("name", THEIRS)
def test_a_checkpoint_of_transformers_has_its_logits(name: str, tmp_path: pathlib.Path) -> None:
    model = random_torch(THEIRS[name])
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / INDEX).exists()
    same_logits(our_logits(*load(tmp_path)), torch_logits(model))


@pytest.mark.parametrize("name", OURS)
def test_transformers_loads_what_is_exported(name: str, tmp_path: pathlib.Path) -> None:
    from transformers import AutoModelForCausalLM

    params, config = random_params(OURS[name]), OURS[name]
    save_hf(tmp_path, params, config, max_file_mb=0.01)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    same_logits(our_logits(params, config), torch_logits(model.eval()))
