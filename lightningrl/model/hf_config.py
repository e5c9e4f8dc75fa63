"""The `config.json` of a Hugging Face checkpoint, to a decoder's shape and back: Llama 3.x, Qwen 2.5, Qwen 3 (dense).

What our decoder would compute differently is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightningrl.errors import UserError
from lightningrl.model.config import ModelConfig, RopeScaling

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SUPPORTED = "supported are Llama 3.x, Qwen 2.5 and Qwen 3 (dense), unquantised, with full attention and no or Llama 3's RoPE scaling"
_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
}


def config_from_hf(fields: Mapping[str, Any], where: str) -> ModelConfig:
    """The decoder that a `config.json` describes, as `transformers` 4 or 5 writes it.

    Args:
      fields: the JSON object; `model_type` is llama, qwen2 or qwen3.
      where: the path it was read from, for the sentence of an error.

    Returns:
      A config without a value head: a checkpoint's config says nothing of it.

    Raises:
      UserError: the file describes a model that our decoder isn't, or lacks a number that describes it.
    """
    kind = fields.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(f"{where} is of the architecture {kind!r}; {SUPPORTED}")
    if unlike := _unlike_ours(fields, kind):
        raise UserError(f"{where} has {unlike}; {SUPPORTED}")
    heads = _number(fields, "num_attention_heads", where)
    hidden = _number(fields, "hidden_size", where)
    theta, scaling = _rope(fields, where)
    try:
        return ModelConfig(
            vocab_size=_number(fields, "vocab_size", where),
            hidden_size=hidden,
            num_layers=_number(fields, "num_hidden_layers", where),
            num_heads=heads,
            num_kv_heads=_number(fields, "num_key_value_heads", where, default=heads),
            # A Qwen 3 config without it means 128, whatever the other sizes; the others divide.
            head_dim=_number(fields, "head_dim", where, default=128 if kind == "qwen3" else hidden // heads),
            intermediate_size=_number(fields, "intermediate_size", where),
            max_positions=_number(fields, "max_position_embeddings", where),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=_number(fields, "rms_norm_eps", where, float),
            tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
        )
    except ValueError as error:
        raise UserError(f"{where} does not describe a decoder: {error}") from error


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` that both `transformers` 4 and 5 read as this decoder. The value head is not part of it.

    Args:
      dtype: what the weights are stored as: float32, bfloat16 or float16.

    Raises:
      UserError: no architecture of `transformers` computes what this decoder does.
    """
    c = config
    if c.qkv_bias and c.qk_norm:
        raise UserError(
            "a decoder with both qkv_bias and qk_norm has no counterpart in transformers: Qwen 2.5 has biases, Qwen 3 the norms"
        )
    kind = "qwen2" if c.qkv_bias else "qwen3" if c.qk_norm else "llama"
    if kind == "llama" and c.hidden_size % c.num_heads:
        raise UserError(f"transformers has no Llama whose hidden_size={c.hidden_size} is not a multiple of num_heads={c.num_heads}")
    scaling = None
    if c.rope_scaling is not None:
        scaling = {"rope_type": "llama3"} | {theirs: getattr(c.rope_scaling, ours) for ours, theirs in _LLAMA3.items()}
    own = {"llama": {"attention_bias": False, "mlp_bias": False}, "qwen2": {}, "qwen3": {"attention_bias": False}}[kind]
    return own | {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.norm_eps,
        # transformers 5 writes one `rope_parameters` instead, which version 4 does not know and would silently take for no RoPE settings.
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": dtype,
    }


def _unlike_ours(fields: Mapping[str, Any], kind: str) -> str | None:
    """What of a config our decoder does not compute, in words."""
    classes = fields.get("architectures") or [ARCHITECTURES[kind]]
    if ARCHITECTURES[kind] not in classes:
        return f"the architecture {classes[0]!r}, which is no {ARCHITECTURES[kind]}"
    if fields.get("quantization_config"):
        return "quantised weights (quantization_config)"
    if (act := fields.get("hidden_act", "silu")) != "silu":
        return f"hidden_act={act!r}"
    # Qwen 2.5 always has biases on queries, keys and values; this setting would add one on the output of attention.
    for bias in ("attention_bias", "mlp_bias"):
        if fields.get(bias):
            return f"{bias}=true"
    layers = fields.get("layer_types") or []
    if fields.get("use_sliding_window") and (not layers or "sliding_attention" in layers) or set(layers) - {"full_attention"}:
        return "layers with sliding-window attention"
    if fields.get("partial_rotary_factor") not in (None, 1, 1.0):
        return "partial_rotary_factor"
    return None


def _rope(fields: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """(θ, scaling): transformers 5 writes both into `rope_parameters`, version 4 into `rope_theta` and `rope_scaling`."""
    rope = {"rope_theta": fields.get("rope_theta", 10_000.0), **(fields.get("rope_scaling") or fields.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{where} has RoPE scaling of the type {kind!r}; {SUPPORTED}")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(f"{where} has partial_rotary_factor; {SUPPORTED}")
    theta = _number(rope, "rope_theta", where, float)
    if kind == "default":
        return theta, None
    rope.setdefault("original_max_position_embeddings", fields.get("max_position_embeddings"))
    values = {ours: _number(rope, theirs, where, float) for ours, theirs in _LLAMA3.items()}
    values["original_max_positions"] = int(values["original_max_positions"])
    return theta, RopeScaling(**values)


def _number(fields: Mapping[str, Any], name: str, where: str, of: type = int, default: Any = None) -> Any:
    value = fields.get(name)
    value = default if value is None else value
    if value is None:
        raise UserError(f"{where} lacks {name}, which the decoder's shape needs")
    if isinstance(value, bool) or not isinstance(value, int if of is int else int | float) or value <= 0:
        raise UserError(f"{where} has {name}={value!r}, which should be a positive {'whole number' if of is int else 'number'}")
    return of(value)
