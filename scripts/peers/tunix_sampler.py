"""tunix' sampler on JAX, in static left-padded batches with a key/value cache; for scripts/bench_sampler.py."""

from __future__ import annotations

import functools
import itertools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from safetensors.numpy import save_file
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.models.llama3.params import create_model_from_safe_tensors

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from bench_sampler_work import MODEL, Prompts, load_weights, serve  # noqa: E402

MULTIPLE = 8  # of prompts' padded lengths: 4 % more to read than they need, for a third fewer shapes to compile, at seconds each


class Tokens:
    """In place of a tokenizer: prompts are tokens already. What pads and what ends is no token of the model, so nothing ends early."""

    def encode(self, prompt: Sequence[int]) -> list[int]:
        return list(prompt)

    def decode(self, tokens: Sequence[int]) -> str:
        return ""

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return -2

    def pad_id(self) -> int:
        return -1


def load(folder: pathlib.Path) -> Llama3:
    """The weights go by a file of the kind that tunix reads, as it offers no way to hand them over."""
    save_file(load_weights(folder), folder / "model.safetensors")
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
    return create_model_from_safe_tensors(str(folder), config)


def main() -> None:
    model, seeds = load(pathlib.Path(sys.argv[1])), itertools.count()

    @functools.cache
    def sampler(width: int, tokens: int) -> Sampler:
        """Its cache is no longer than a batch needs, as tunix attends to all of it; it compiles every width and length anew anyway."""
        return Sampler(model, Tokens(), CacheConfig(width + tokens, MODEL["num_layers"], MODEL["num_kv_heads"], MODEL["head_dim"]))

    def run(prompts: Prompts, tokens: int, **sampling: Any) -> list[list[int]]:
        width = -(-max(map(len, prompts)) // MULTIPLE) * MULTIPLE
        out = sampler(width, tokens)(prompts, max_generation_steps=tokens, max_prompt_length=width, **sampling)
        return [answer.tolist() for answer in out.tokens]

    def generate(prompts: Prompts, tokens: int) -> list[list[int]]:
        return run(prompts, tokens, temperature=1.0, top_p=1.0, seed=next(seeds))  # this top_p is its way to sample without sorting

    serve(generate, run, sizes=(8, 16, 32))


if __name__ == "__main__":
    main()
