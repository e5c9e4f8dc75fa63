"""Checkpoints of random tiny decoders, for tests."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightningrl.model.config import ModelConfig
from lightningrl.model.hf import VALUE_HEAD, load_arrays
from lightningrl.model.hf_config import config_from_hf
from lightningrl.model.hf_layout import hf_sources
from lightningrl.model.params import shapes
from tests.model.test_decoder import LLAMA_3, QWEN_3, QWEN_25

OURS = {"llama_3": LLAMA_3, "qwen_2.5": QWEN_25, "qwen_3": dataclasses.replace(QWEN_3, value_head=True)}


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


def equal(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
