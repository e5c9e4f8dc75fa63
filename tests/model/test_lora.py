"""Adapters: what is merged is what is computed, the gradient is the chain rule's, and any change of a matrix can be written as one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningrl.model import decoder
from lightningrl.model.lora import (
    TARGETS,
    LoraSettings,
    abstract_adapter,
    adapter_shapes,
    adapter_sharding,
    count_adapter,
    init_lora,
    merge,
    unmerge,
)
from lightningrl.model.params import ArrayInfo, shapes
from lightningrl.sharding import make_mesh, params_sharding
from tests.model.test_decoder import FAMILIES, LLAMA_3, QWEN_25, forward

SETTINGS = LoraSettings(rank=3, alpha=6.0)
EPS = np.finfo(np.float32).eps
init = jax.jit(init_lora, static_argnums=(0, 2))


def random_params(config: Any) -> Any:
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes(config))


def random_adapter(config: Any, settings: LoraSettings = SETTINGS) -> Any:
    """Random in every array, B too."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), adapter_shapes(config, settings))


def as_matrix(array: Any, inputs: int) -> np.ndarray:
    shape = np.shape(array)
    return np.asarray(array, np.float64).reshape(int(np.prod(shape[:inputs])), -1)


@FAMILIES
def test_a_new_adapter_changes_no_bit_and_every_target_changes_its_array_alone(config: Any) -> None:
    params = random_params(config)
    nothing = jax.tree.map(lambda x, info: x * (info.init == "normal"), random_adapter(config), abstract_adapter(config, SETTINGS))
    jax.tree.map(np.testing.assert_array_equal, merge(params, nothing, 2.0), params)
    for name in TARGETS:
        merged = merge(params, random_adapter(config, dataclasses.replace(SETTINGS, targets=(name,))), 2.0)
        changed = {
            jax.tree_util.keystr(path, simple=True, separator=".").split(".")[-1]
            for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(merged), jax.tree.leaves(params), strict=True)
            if not np.array_equal(a, b)
        }
        assert changed == {name} | ({"value_head"} if config.value_head else set())


@FAMILIES
def test_merged_is_base_plus_low_rank_product(config: Any) -> None:
    params, adapter = random_params(config), random_adapter(config)
    merged = merge(params, adapter, SETTINGS.scale)
    for layer, base, pairs in zip(merged["layers"], params["layers"], adapter["layers"], strict=True):
        for name, inputs in TARGETS.items():
            a, b = as_matrix(pairs[name]["a"], inputs), as_matrix(pairs[name]["b"], 1)
            expected = as_matrix(base[name], inputs) + 6.0 / 3 * a @ b
            assert np.linalg.matrix_rank(a @ b) == 3
            # A sum of three products, then one of two numbers.
            np.testing.assert_allclose(as_matrix(layer[name], inputs), expected, rtol=0, atol=8 * EPS * np.abs(expected).max())
    again = unmerge(merged, adapter, SETTINGS.scale)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=4 * EPS * max(np.abs(y).max(), 1)), again, params)


def test_merged_and_beside_compute_the_same() -> None:
    """x·(W + s·A·B) of the merged decoder, and x·W + s·(x·A)·B as the paper writes it, of every target in a decoder of one layer."""
    config = dataclasses.replace(QWEN_25, num_layers=1)
    params, adapter = random_params(config), random_adapter(config)
    rows = {"tokens": np.arange(12, dtype=np.int32)[None], "positions": np.arange(12, dtype=np.int32)[None]}
    end = np.full((1, 12), 12, np.int32)
    merged = forward(merge(params, adapter, SETTINGS.scale), config, **rows, end=end)

    class Beside:
        """A matrix that multiplies as base and adapter, one beside the other."""

        __array_priority__ = 1000

        def __init__(self, w: Any, a: Any, b: Any) -> None:
            self.w, self.a, self.b = w, a, b

        def reshape(self, *shape: int) -> Any:
            fan_in = int(np.prod(self.a.shape[:-1]))
            return Beside(self.w.reshape(*shape), self.a.reshape(fan_in, -1), self.b.reshape(self.b.shape[0], -1))

        def __rmatmul__(self, x: Any) -> Any:
            return x @ self.w + SETTINGS.scale * ((x @ self.a) @ self.b)

    pairs = adapter["layers"][0]
    layer = {k: Beside(w, pairs[k]["a"], pairs[k]["b"]) if k in pairs else w for k, w in params["layers"][0].items()}
    beside = jax.jit(lambda: decoder.forward({**params, "layers": [layer]}, config, **rows, end=end))()
    base = forward(params, config, **rows, end=end)
    np.testing.assert_allclose(merged, beside, rtol=0, atol=128 * EPS * np.abs(beside).max())
    assert np.abs(merged - base).max() > 0.1


def test_an_adapter_of_full_rank_is_any_change_of_a_matrix() -> None:
    config = LLAMA_3
    rank = 24  # the smaller side of its largest matrix
    settings = LoraSettings(rank=rank, alpha=float(rank))
    params, rng = random_params(config), np.random.default_rng(0)
    adapter = random_adapter(config, settings)
    changes: list[dict[str, np.ndarray]] = []
    for layer, pairs in zip(params["layers"], adapter["layers"], strict=True):
        changes.append({name: rng.normal(0, 1, layer[name].shape) for name in TARGETS})
        for name, inputs in TARGETS.items():
            u, s, v = np.linalg.svd(as_matrix(changes[-1][name], inputs), full_matrices=False)
            assert len(s) <= rank
            a, b = np.zeros((len(u), rank)), np.zeros((rank, v.shape[1]))
            a[:, : len(s)], b[: len(s)] = u * s, v
            pairs[name] = {k: x.reshape(pairs[name][k].shape).astype(np.float32) for k, x in (("a", a), ("b", b))}
    merged = merge(params, adapter, settings.scale)
    for layer, base, change in zip(merged["layers"], params["layers"], changes, strict=True):
        for name in TARGETS:
            np.testing.assert_allclose(layer[name], base[name] + change[name], rtol=0, atol=64 * EPS * np.abs(change[name]).max())


def test_the_gradient_is_the_chain_rule_through_the_matrix() -> None:
    """dA = s·G·Bᵀ and dB = s·Aᵀ·G in float64, G the gradient of a loss in W that plain NumPy writes down: Σ tanh(x W)²."""
    with jax.enable_x64(True):
        rng, scale, inputs = np.random.default_rng(0), 1.7, TARGETS["attention_out"]
        w, a, b = rng.normal(size=(2, 2, 3, 5)), rng.normal(size=(2, 2, 3, 4)), rng.normal(size=(4, 5))
        x = rng.normal(size=(7, 12))

        def loss(adapter: Any) -> jax.Array:
            weights = merge({"layers": [{"attention_out": jnp.asarray(w)}]}, adapter, scale)["layers"][0]["attention_out"]
            return jnp.sum(jnp.tanh(x @ weights.reshape(12, 5)) ** 2)

        gradient = jax.grad(loss)({"layers": [{"attention_out": {"a": jnp.asarray(a), "b": jnp.asarray(b)}}]})["layers"][0]["attention_out"]
        y = np.tanh(x @ (as_matrix(w, inputs) + scale * as_matrix(a, inputs) @ b))
        g = x.T @ (2 * y * (1 - y**2))
        assert gradient["a"].dtype == np.float64
        np.testing.assert_allclose(as_matrix(gradient["a"], inputs), scale * g @ b.T, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(gradient["b"], scale * as_matrix(a, inputs).T @ g, rtol=1e-12, atol=1e-12)


def test_a_critic_is_trained_whole_whatever_the_scale() -> None:
    params = random_params(QWEN_25)
    adapter = random_adapter(QWEN_25)
    np.testing.assert_array_equal(merge(params, adapter, 2.0)["value_head"], params["value_head"] + adapter["value_head"])
    assert "value_head" not in abstract_adapter(LLAMA_3, SETTINGS)


def test_the_start_is_random_in_a_alone_and_of_its_place() -> None:
    config = dataclasses.replace(LLAMA_3, hidden_size=64)
    one, other = (init(config, jax.random.key(0), LoraSettings(8, targets=targets)) for targets in (("down",), ("qkv", "down")))
    np.testing.assert_array_equal(one["layers"][1]["down"]["a"], other["layers"][1]["down"]["a"])
    drawn = [np.asarray(pair["a"]).ravel()[:8] for layer in other["layers"] for pair in layer.values()]
    assert len({x.tobytes() for x in drawn}) == 4
    assert not any(np.asarray(pair["b"]).any() for layer in other["layers"] for pair in layer.values())
    a = np.asarray(other["layers"][0]["qkv"]["a"])  # 512 numbers: their deviation is within a tenth of what it should be
    np.testing.assert_allclose(a.std(), 1 / np.sqrt(64), rtol=0.1)
    assert count_adapter(config, LoraSettings(8, targets=("qkv", "down"))) == sum(np.size(x) for x in jax.tree.leaves(other))


def test_shardings_are_what_the_rules_say_of_the_logical_axes() -> None:
    at = params_sharding(QWEN_25, make_mesh())
    shardings, infos = adapter_sharding(at, QWEN_25, SETTINGS), abstract_adapter(QWEN_25, SETTINGS)
    rules = {"embed": "fsdp", "kv_heads": "tensor", "mlp": "tensor", None: None}
    expected = jax.tree.map(lambda info: tuple(rules[axis] for axis in info.axes), infos, is_leaf=lambda x: isinstance(x, ArrayInfo))
    assert jax.tree.map(lambda s: tuple(s.spec), shardings) == expected


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank": 0}, "an adapter's rank is 0: it must be at least 1"),
        ({"rank": 2, "alpha": 0.0}, "an adapter's alpha is 0.0: it must be more than 0"),
        ({"rank": 2, "targets": ()}, "an adapter needs a target: choose from qkv, attention_out, gate_up, down"),
        ({"rank": 2, "targets": ("qkv", "head")}, "no adapter can be put on 'head': choose from qkv, attention_out, gate_up, down"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as refused:
        LoraSettings(**settings)
    assert str(refused.value) == sentence
