"""A tiny policy for tests: random weights, a tokenizer trained on a few sentences."""

from __future__ import annotations

import functools

import jax

from lightningrl.model.config import ModelConfig
from lightningrl.model.params import init_params
from lightningrl.policy import Policy
from lightningrl.tokenizer import train_tokenizer

TEXTS = [
    "How many singers are there?",
    "SELECT count(*) FROM singer",
    "name country age",
    "CORRECT INCORRECT Result: error",
] * 4


@functools.cache
def tiny_policy(seed: int = 0, value_head: bool = False, hidden_size: int = 32) -> Policy:
    tokenizer = train_tokenizer(TEXTS, 384)
    config = ModelConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=hidden_size,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=hidden_size // 4,
        intermediate_size=64,
        max_positions=128,
        value_head=value_head,
    )
    return Policy(config, init_params(config, jax.random.key(seed)), tokenizer)
