"""`config.json`, theirs to ours and back, and which models are refused."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest
from transformers import AutoConfig

from lightningrl.errors import UserError
from lightningrl.model.config import ModelConfig, RopeScaling
from lightningrl.model.hf_config import config_from_hf, config_to_hf
from tests.model.test_decoder import LLAMA_3, QWEN_3, QWEN_25

# As the hub has them, written by transformers 4.
LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN_2_5_1_5B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3_4B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
OF_THE_HUB = {
    "llama": (
        LLAMA_3_1_8B,
        ModelConfig(
            vocab_size=128256,
            hidden_size=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            intermediate_size=14336,
            max_positions=131072,
            rope_theta=500_000.0,
            rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
            norm_eps=1e-5,
            tie_embeddings=False,
        ),
    ),
    "qwen2": (
        QWEN_2_5_1_5B,
        ModelConfig(
            vocab_size=151936,
            hidden_size=1536,
            num_layers=28,
            num_heads=12,
            num_kv_heads=2,
            head_dim=128,
            intermediate_size=8960,
            max_positions=32768,
            rope_theta=1e6,
            qkv_bias=True,
        ),
    ),
    "qwen3": (
        QWEN_3_4B,
        ModelConfig(
            vocab_size=151936,
            hidden_size=2560,
            num_layers=36,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            intermediate_size=9728,
            max_positions=40960,
            rope_theta=1e6,
            qk_norm=True,
        ),
    ),
}


@pytest.mark.parametrize("kind", OF_THE_HUB)
def test_configs_of_the_hub_are_read(kind: str) -> None:
    fields, expected = OF_THE_HUB[kind]
    assert config_from_hf(fields, "config.json") == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_THE_HUB)
def test_transformers_5_writes_the_same_decoder(kind: str, tmp_path: pathlib.Path) -> None:
    fields, expected = OF_THE_HUB[kind]
    AutoConfig.for_model(**fields).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written and "rope_theta" not in written
    assert config_from_hf(written, "config.json") == expected


@pytest.mark.parametrize("config", [LLAMA_3, QWEN_25, QWEN_3, *(ours for _, ours in OF_THE_HUB.values())])
def test_round_trip_through_transformers(config: ModelConfig, tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(config, value_head=False)
    fields = config_to_hf(config, "bfloat16")
    assert config_from_hf(fields, "config.json") == config
    (tmp_path / "config.json").write_text(json.dumps(fields))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == fields["model_type"] and str(theirs.dtype).endswith("bfloat16")
    theirs.save_pretrained(tmp_path)
    assert config_from_hf(json.loads((tmp_path / "config.json").read_text()), "config.json") == config


def test_older_configs_leave_out_what_follows_from_the_rest() -> None:
    older = {name: value for name, value in LLAMA_3_1_8B.items() if name not in ("num_key_value_heads", "rope_theta", "rope_scaling")}
    config = config_from_hf(older, "config.json")
    assert (config.num_kv_heads, config.head_dim, config.rope_theta, config.rope_scaling) == (32, 128, 10_000.0, None)
    nameless = {name: value for name, value in QWEN_3_4B.items() if name not in ("head_dim", "architectures")}
    assert config_from_hf(nameless, "config.json") == OF_THE_HUB["qwen3"][1]
    no_original = {**LLAMA_3_1_8B["rope_scaling"]}
    del no_original["original_max_position_embeddings"]
    scaling = config_from_hf({**LLAMA_3_1_8B, "rope_scaling": no_original}, "config.json").rope_scaling
    assert scaling is not None and scaling.original_max_positions == 131072


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
NESTED = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
SLIDING = ["full_attention"] * 20 + ["sliding_attention"] * 8


@pytest.mark.parametrize(
    ("fields", "changes", "says"),
    [
        (LLAMA_3_1_8B, {"model_type": "mistral"}, "is of the architecture 'mistral'"),
        (QWEN_3_4B, {"model_type": "qwen3_moe"}, "is of the architecture 'qwen3_moe'"),
        (QWEN_3_4B, {"model_type": None}, "is of the architecture None"),
        (
            LLAMA_3_1_8B,
            {"architectures": ["LlamaForSequenceClassification"]},
            "'LlamaForSequenceClassification', which is no LlamaForCausalLM",
        ),
        (LLAMA_3_1_8B, {"attention_bias": True}, "attention_bias=true"),
        (LLAMA_3_1_8B, {"mlp_bias": True}, "mlp_bias=true"),
        (QWEN_3_4B, {"attention_bias": True}, "attention_bias=true"),
        (QWEN_2_5_1_5B, {"use_sliding_window": True}, "sliding-window attention"),
        (QWEN_2_5_1_5B, {"layer_types": SLIDING, "use_sliding_window": True}, "sliding-window attention"),
        (QWEN_3_4B, {"layer_types": SLIDING}, "sliding-window attention"),
        (QWEN_2_5_1_5B, {"rope_scaling": YARN}, "RoPE scaling of the type 'yarn'"),
        (QWEN_2_5_1_5B, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE scaling of the type 'linear'"),
        (QWEN_3_4B, {"rope_parameters": {**YARN, "rope_theta": 1e6}}, "RoPE scaling of the type 'yarn'"),
        (QWEN_3_4B, {"rope_parameters": NESTED}, "RoPE scaling"),
        (LLAMA_3_1_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA_3_1_8B, {"rope_scaling": None, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LLAMA_3_1_8B, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (LLAMA_3_1_8B, {"quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
    ],
)
def test_other_models_are_refused_and_what_is_supported_is_said(fields: dict[str, Any], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        config_from_hf(fields | changes, "DIR/config.json")
    assert str(error.value).startswith("DIR/config.json ") and says in str(error.value)
    assert "supported are Llama 3.x, Qwen 2.5 and Qwen 3 (dense)" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "4096"}, "hidden_size='4096', which should be a positive whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0, which should be a positive number"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        ({"num_key_value_heads": 5}, "num_heads=32 must be a multiple of num_kv_heads=5"),
        ({"head_dim": 127}, "head_dim=127 must be even"),
    ],
)
def test_numbers_that_make_no_decoder_are_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        config_from_hf(LLAMA_3_1_8B | changes, "DIR/config.json")
    assert str(error.value).startswith("DIR/config.json ") and says in str(error.value)


def test_decoders_without_a_counterpart_are_not_exported() -> None:
    with pytest.raises(UserError, match="both qkv_bias and qk_norm has no counterpart"):
        config_to_hf(dataclasses.replace(QWEN_3, qkv_bias=True), "float32")
    with pytest.raises(UserError, match="hidden_size=24 is not a multiple of num_heads=16"):
        config_to_hf(dataclasses.replace(LLAMA_3, num_heads=16), "float32")
