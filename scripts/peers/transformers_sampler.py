"""`transformers` generate on torch, in static left-padded batches with a key/value cache; for scripts/bench_sampler.py."""

from __future__ import annotations

import pathlib
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from bench_sampler_work import CONTEXT, MODEL, Prompts, load_weights, serve  # noqa: E402


def load(folder: pathlib.Path) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=MODEL["vocab_size"],
        hidden_size=MODEL["hidden_size"],
        num_hidden_layers=MODEL["num_layers"],
        num_attention_heads=MODEL["num_heads"],
        num_key_value_heads=MODEL["num_kv_heads"],
        head_dim=MODEL["head_dim"],
        intermediate_size=MODEL["intermediate_size"],
        max_position_embeddings=CONTEXT,
        rope_theta=MODEL["rope_theta"],
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in load_weights(folder).items()}, strict=False)
    return model


def main() -> None:
    model = load(pathlib.Path(sys.argv[1]))

    @torch.inference_mode()
    def run(prompts: Prompts, tokens: int, sample: bool) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = model.generate(
            ids, attention_mask=seen, max_new_tokens=tokens, do_sample=sample, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=None
        )
        return out[:, width:].tolist()

    serve(lambda prompts, tokens: run(prompts, tokens, True), lambda prompts, tokens: run(prompts, tokens, False), sizes=(16, 32, 64))


if __name__ == "__main__":
    main()
