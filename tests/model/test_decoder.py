"""The decoder against plain NumPy loops in float64; the cache against the decoder; who sees whom."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningrl.model import decoder
from lightningrl.model.cache import extend, init_cache
from lightningrl.model.config import ModelConfig, RopeScaling
from lightningrl.model.params import count_params, init_params
from lightningrl.model.rope import frequencies

LLAMA_SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)
QWEN_25 = ModelConfig(
    vocab_size=40,
    hidden_size=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    intermediate_size=20,
    max_positions=64,
    qkv_bias=True,
    value_head=True,
)
LLAMA_3 = dataclasses.replace(
    QWEN_25, num_layers=2, qkv_bias=False, tie_embeddings=False, value_head=False, rope_theta=500.0, rope_scaling=LLAMA_SCALING
)
QWEN_3 = dataclasses.replace(QWEN_25, num_kv_heads=1, head_dim=8, qkv_bias=False, qk_norm=True)
FAMILIES = pytest.mark.parametrize("config", [LLAMA_3, QWEN_25, QWEN_3], ids=["llama_3", "qwen_2.5", "qwen_3"])
EPS = np.finfo(np.float32).eps

forward = jax.jit(decoder.forward, static_argnums=1)


@functools.cache
def params_of(config: ModelConfig) -> Any:
    """Random in every array, those too that start as ones or zeros."""
    leaves, tree = jax.tree.flatten(init_params(config, jax.random.key(1)))
    rng = np.random.default_rng(0)
    return tree.unflatten([leaf + rng.normal(0, 0.2, leaf.shape).astype(np.float32) for leaf in leaves])


def close(result: Any, expected: Any) -> None:
    """Equal up to float32 rounding: some hundred operations in a row, each off by half an epsilon of the largest value."""
    np.testing.assert_allclose(np.asarray(result), expected, rtol=0, atol=128 * EPS * np.abs(expected).max())


# ---- the oracle
def norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / math.sqrt(sum(v * v for v in x) / len(x) + eps) * scale


def angle(config: ModelConfig, i: int) -> float:
    """Per position, of pair i; with Llama 3.1's scaling as its authors wrote it."""
    freq = config.rope_theta ** (-2 * i / config.head_dim)
    if (s := config.rope_scaling) is None:
        return freq
    wavelength = 2 * math.pi / freq
    if wavelength < s.original_max_positions / s.high_freq_factor:
        return freq
    if wavelength > s.original_max_positions / s.low_freq_factor:
        return freq / s.factor
    smooth = (s.original_max_positions / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    return (1 - smooth) * freq / s.factor + smooth * freq


def turned(config: ModelConfig, x: np.ndarray, position: int) -> np.ndarray:
    half, out = config.head_dim // 2, np.zeros_like(x)
    for i in range(half):
        cos, sin = math.cos(position * angle(config, i)), math.sin(position * angle(config, i))
        out[i], out[i + half] = x[i] * cos - x[i + half] * sin, x[i + half] * cos + x[i] * sin
    return out


def oracle(config: ModelConfig, params: Any, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states and logits of one sequence, token by token and head by head."""
    c, p = config, jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    states = [p["embedding"][i] for i in ids]
    for layer in p["layers"]:
        qs, ks, vs = [], [], []
        for position, x in enumerate(states):
            h = norm(x, layer["attention_norm"], c.norm_eps)
            q, k, v = [], [], []
            for head in range(c.num_kv_heads):
                group = [h @ layer["qkv"][:, head, j] for j in range(c.queries_per_kv + 2)]
                if c.qkv_bias:
                    group = [y + layer["qkv_bias"][head, j] for j, y in enumerate(group)]
                *queries, key, value = group
                if c.qk_norm:
                    queries = [norm(y, layer["q_norm"], c.norm_eps) for y in queries]
                    key = norm(key, layer["k_norm"], c.norm_eps)
                q.append([turned(c, y, position) for y in queries])
                k.append(turned(c, key, position))
                v.append(value)
            qs.append(q), ks.append(k), vs.append(v)
        for t, x in enumerate(states):
            mixed = np.zeros_like(x)
            for head in range(c.num_kv_heads):
                for j in range(c.queries_per_kv):
                    scores = [math.exp(qs[t][head][j] @ ks[s][head] / math.sqrt(c.head_dim)) for s in range(t + 1)]
                    seen = sum(w * vs[s][head] for s, w in enumerate(scores)) / sum(scores)
                    mixed = mixed + seen @ layer["attention_out"][head, j]
            x = x + mixed
            h = norm(x, layer["mlp_norm"], c.norm_eps)
            gate, up = h @ layer["gate_up"][:, 0], h @ layer["gate_up"][:, 1]
            states[t] = x + (gate / (1 + np.exp(-gate)) * up) @ layer["down"]
    hidden = np.stack([norm(x, p["final_norm"], c.norm_eps) for x in states])
    return hidden, hidden @ (p["embedding"].T if c.tie_embeddings else p["head"])


def row(*chains: list[int], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens, positions, end = (np.zeros((1, length), np.int32) for _ in range(3))
    at = 0
    for chain in chains:
        span = slice(at, at + len(chain))
        tokens[0, span], positions[0, span], end[0, span] = chain, np.arange(len(chain)), span.stop
        at = span.stop
    return tokens, positions, end


def words(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 40, count).tolist()


@pytest.mark.slow
# ---- the tests
@FAMILIES
def test_forward_is_that_of_loops_in_float64(config: ModelConfig) -> None:
    first, second = words(0, 37), words(1, 9)  # over the end of an attention block of 32, and beside another chain
    hidden = forward(params_of(config), config, *row(first, second, length=64))[0]
    logits = decoder.logits(params_of(config), config, hidden)
    for chain, span in ((first, slice(0, 37)), (second, slice(37, 46))):
        expected, expected_logits = oracle(config, params_of(config), chain)
        close(hidden[span], expected)
        close(logits[span], expected_logits)


@pytest.mark.slow
def test_a_critic_is_linear_in_the_hidden_state() -> None:
    params, hidden = params_of(QWEN_25), np.random.default_rng(0).normal(size=(3, 24)).astype(np.float32)
    close(decoder.values(params, hidden), hidden.astype(np.float64) @ np.asarray(params["value_head"], np.float64))
    np.testing.assert_array_equal(decoder.values(params_of(LLAMA_3), hidden), np.zeros(3, np.float32))


@pytest.mark.parametrize("scaling", [None, LLAMA_SCALING, RopeScaling(32.0, 1.0, 4.0, 8192)])
def test_rope_frequencies_are_the_formula(scaling: RopeScaling | None) -> None:
    config = dataclasses.replace(QWEN_25, head_dim=64, rope_theta=500_000.0, rope_scaling=scaling)
    expected = np.array([angle(config, i) for i in range(32)], np.float64).astype(np.float32)
    # Both are computed in float64 and rounded once: they can land on neighbouring floats.
    np.testing.assert_array_max_ulp(frequencies(config), expected, maxulp=1)


def test_nobody_sees_padding_or_another_chain() -> None:
    chain = words(2, 20)
    tokens, positions, end = row(words(3, 12), chain, words(4, 15), length=64)
    hidden = forward(params_of(QWEN_25), QWEN_25, tokens, positions, end)
    outside = np.ones(64, bool)
    outside[12:32] = False
    tokens[0, outside] = np.random.default_rng(5).integers(1, 40, outside.sum())
    positions[0, 47:] = 2**30  # what stands in padding is nobody's business
    changed = forward(params_of(QWEN_25), QWEN_25, tokens, positions, end)
    np.testing.assert_array_equal(changed[0, 12:32], hidden[0, 12:32])
    assert np.isfinite(np.asarray(changed)).all()


def test_no_gradient_reaches_what_only_padding_or_another_chain_read() -> None:
    tokens, positions, end = row([1, 2, 3], [4, 5, 6], length=32)
    tokens[0, 6:] = 7

    @jax.jit
    def gradient(params: Any) -> Any:
        config = dataclasses.replace(LLAMA_3, num_layers=1)  # untied: the embedding is read as input only
        return jax.grad(lambda p: jnp.sum(decoder.forward(p, config, tokens, positions, end)[0, 5]))(params)["embedding"]

    touched = np.asarray(jnp.any(gradient(params_of(dataclasses.replace(LLAMA_3, num_layers=1))) != 0, axis=-1))
    np.testing.assert_array_equal(np.flatnonzero(touched), [4, 5, 6])


def test_a_token_in_a_trie_sees_its_ancestors_only() -> None:
    """A trunk of four tokens with two branches: `end` of the trunk covers both, that of a branch only itself."""
    trunk, left, right = words(6, 4), words(7, 5), words(8, 3)
    tokens, positions, end = (np.zeros((1, 32), np.int32) for _ in range(3))
    tokens[0, :12], positions[0, :12] = trunk + left + right, [*range(9), 4, 5, 6]
    end[0, :12] = [12] * 4 + [9] * 5 + [12] * 3
    hidden = forward(params_of(LLAMA_3), LLAMA_3, tokens, positions, end)[0]
    close(hidden[:9], oracle(LLAMA_3, params_of(LLAMA_3), trunk + left)[0])
    close(hidden[9:12], oracle(LLAMA_3, params_of(LLAMA_3), trunk + right)[0][4:])


@pytest.mark.slow
@FAMILIES
def test_the_cache_extends_to_what_forward_computes(config: ModelConfig) -> None:
    """Two conversations in slots 3 and 1 of four, read in chunks of eight, then on by single tokens in all slots."""
    chains = np.array([words(9, 20), words(10, 20)])
    expected = [forward(params_of(config), config, *row(chain.tolist(), length=32))[0, :20] for chain in chains]
    run = jax.jit(extend, static_argnums=1)
    cache = init_cache(config, slots=4, length=32)
    slots = np.array([3, 1, 4], np.int32)  # 4: a row that writes nothing
    result = np.zeros((2, 20, config.hidden_size), np.float32)
    for start in (0, 8):
        tokens = np.zeros((3, 8), np.int32)
        tokens[:2] = chains[:, start : start + 8]
        hidden, cache = run(params_of(config), config, cache, slots, tokens, np.full(3, start, np.int32))
        result[:, start : start + 8] = hidden[:2]
    for at in range(16, 20):
        tokens, start = np.zeros((4, 1), np.int32), np.full(4, 32, np.int32)  # idle slots: past the end
        tokens[[3, 1], 0], start[[3, 1]] = chains[:, at], at
        hidden, cache = run(params_of(config), config, cache, None, tokens, start)
        result[:, at] = np.asarray(hidden)[[3, 1], 0]
    for chain in range(2):
        close(result[chain], np.asarray(expected[chain]))
    for keys in cache.keys:
        np.testing.assert_array_equal(np.asarray(keys)[[0, 2]], 0)


@FAMILIES
def test_parameters_are_counted(config: ModelConfig) -> None:
    assert count_params(config) == sum(leaf.size for leaf in jax.tree.leaves(params_of(config)))


def test_another_array_changes_no_array() -> None:
    plain = init_params(QWEN_3, jax.random.key(0))
    more = init_params(dataclasses.replace(QWEN_3, tie_embeddings=False, qkv_bias=True), jax.random.key(0))
    np.testing.assert_array_equal(plain["embedding"], more["embedding"])
    for name, array in plain["layers"][0].items():
        np.testing.assert_array_equal(array, more["layers"][0][name])


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads=4 must be a multiple of num_kv_heads=3"):
        dataclasses.replace(QWEN_25, num_kv_heads=3)
    with pytest.raises(ValueError, match="head_dim=5 must be even"):
        dataclasses.replace(QWEN_25, head_dim=5)
