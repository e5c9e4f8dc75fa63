"""Adapters on disk: one safetensors file each, apart from the base that they were trained on and only fit."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import jax
import numpy as np
import safetensors
import safetensors.numpy

from lightningrl.errors import UserError
from lightningrl.model.config import ModelConfig
from lightningrl.model.lora import Adapter, LoraSettings, adapter_shapes
from lightningrl.model.params import Params

HEADER = "lightningrl_lora"  # the one entry of the file's header: several would be written in an order of chance


def base_hash(params: Params) -> str:
    """SHA-256 of all weights but a critic's, as float32 under their names: which base an adapter is for."""
    digest = hashlib.sha256()
    for name, array in sorted(_named(params).items()):
        if name != "value_head":
            digest.update(f"{name}{array.shape}".encode() + np.ascontiguousarray(array, np.float32).tobytes())
    return digest.hexdigest()


def save_adapter(path: Path, adapter: Adapter, settings: LoraSettings, base: str) -> None:
    """Writes the arrays, each under its dotted path, and in the file's header the settings and the base's hash; atomically.

    Args:
      base: `base_hash` of the parameters that the adapter lies on.
    """
    about = {"rank": settings.rank, "alpha": settings.alpha, "targets": list(settings.targets), "base": base}
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(_named(adapter), partial, metadata={HEADER: json.dumps(about)})
    os.replace(partial, path)


def load_adapter(path: Path, config: ModelConfig, base: str) -> tuple[Adapter, LoraSettings]:
    """Reads what `save_adapter` wrote, every bit as written.

    Raises:
      UserError: the file is missing or no adapter of ours, or it was trained on another base or for a model of another shape.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read as an adapter ({error})") from error
    if HEADER not in metadata:
        raise UserError(f"{path} is no adapter of ours: its header has no entry {HEADER}")
    about = json.loads(metadata[HEADER])
    if about["base"] != base:
        raise UserError(
            f"{path} was trained on another base (hash {about['base'][:12]}, not {base[:12]}): give the one of its run, OUT/start"
        )
    settings = LoraSettings(about["rank"], about["alpha"], tuple(about["targets"]))
    like = adapter_shapes(config, settings)
    if {name: array.shape for name, array in tensors.items()} != {name: leaf.shape for name, leaf in _leaves(like)}:
        raise UserError(f"{path} is an adapter for a model of another shape: give the base of its run, OUT/start")
    return jax.tree_util.tree_map_with_path(lambda at, _: jax.numpy.asarray(tensors[_name(at)]), like), settings


def _name(path: object) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")  # type: ignore[arg-type]


def _leaves(tree: Adapter) -> list[tuple[str, jax.Array]]:
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _named(tree: Adapter) -> dict[str, np.ndarray]:
    # safetensors reads the buffer as it lies, so it has to be in C order.
    return {name: np.asarray(jax.device_get(leaf), order="C") for name, leaf in _leaves(tree)}
