"""tunix' own sampler over its Llama, in static batches with a key/value cache; for scripts/bench_sampler.py.

It decodes greedily, which is the quickest it can: what it calls sampling sorts the vocabulary in every step. Prompts are padded to
multiples of 32, so that few shapes are compiled, and texts are token ids.
"""

from __future__ import annotations

import pathlib
import sys

import jax.numpy as jnp
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3.model import Llama3, ModelConfig

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from bench_sampler_work import CONTEXT, LONGEST, MODEL, Prompts, load_weights, serve  # noqa: E402


class Ids:
    """A tokenizer for texts that are numbers already."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return -1

    def pad_id(self) -> int:
        return 0


def load(folder: pathlib.Path) -> Llama3:
    config = ModelConfig(
        num_layers=MODEL["num_layers"],
        vocab_size=MODEL["vocab_size"],
        embed_dim=MODEL["hidden_size"],
        hidden_dim=MODEL["intermediate_size"],
        num_heads=MODEL["num_heads"],
        head_dim=MODEL["head_dim"],
        num_kv_heads=MODEL["num_kv_heads"],
        rope_theta=MODEL["rope_theta"],
        norm_eps=1e-6,
        weight_tying=True,
    )
    model, w = Llama3(config, rngs=nnx.Rngs(0)), load_weights(folder)
    d, heads, kv, width = MODEL["hidden_size"], MODEL["num_heads"], MODEL["num_kv_heads"], MODEL["head_dim"]

    def put(parameter: nnx.Param, array: object, *shape: int) -> None:
        value = jnp.asarray(array)
        value = value.reshape(shape) if shape else value
        if parameter.value.shape != value.shape:
            raise ValueError(f"a parameter has the shape {parameter.value.shape}, its weights have {value.shape}")
        parameter.value = value

    put(model.embedder.input_embedding, w["model.embed_tokens.weight"])
    put(model.final_norm.w, w["model.norm.weight"])
    for i, layer in enumerate(model.layers):
        name = f"model.layers.{i}."
        put(layer.input_layernorm.w, w[name + "input_layernorm.weight"])
        put(layer.post_attention_layernorm.w, w[name + "post_attention_layernorm.weight"])
        put(layer.attn.q_proj.w, w[name + "self_attn.q_proj.weight"].T, d, heads, width)
        put(layer.attn.k_proj.w, w[name + "self_attn.k_proj.weight"].T, d, kv, width)
        put(layer.attn.v_proj.w, w[name + "self_attn.v_proj.weight"].T, d, kv, width)
        put(layer.attn.o_proj.w, w[name + "self_attn.o_proj.weight"].T, heads, width, d)
        for part in ("gate_proj", "up_proj", "down_proj"):
            put(getattr(layer.mlp, part).kernel, w[name + f"mlp.{part}.weight"].T)
    return model


def main() -> None:
    model = load(pathlib.Path(sys.argv[1]))
    cache = CacheConfig(CONTEXT, MODEL["num_layers"], MODEL["num_kv_heads"], MODEL["head_dim"])
    sampler = Sampler(model, Ids(), cache)

    def run(prompts: Prompts, tokens: int) -> list[list[int]]:
        texts = [" ".join(map(str, prompt)) for prompt in prompts]
        width = -(-max(map(len, prompts)) // 32) * 32
        out = sampler(texts, max_generation_steps=min(tokens, LONGEST), max_prompt_length=width, eos_tokens=[-1])
        return [list(map(int, ids)) for ids in out.tokens]

    serve(run, run, sizes=(16, 32, 64))


if __name__ == "__main__":
    main()
