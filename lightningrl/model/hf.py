"""Weights in and out: safetensors files to sharded arrays, and to a checkpoint that `transformers` loads.

Loading reads of each file only what the devices of this process hold, one array after another, in small blocks that are
turned and cast into the array's buffer: on the host stands at most one array beside what is being read of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from lightningrl.errors import UserError
from lightningrl.model.config import ModelConfig
from lightningrl.model.hf_config import config_to_hf
from lightningrl.model.hf_layout import Source, assemble, hf_sources, tensor_of
from lightningrl.model.params import Params, shapes

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
VALUE_HEAD = "value_head.safetensors"  # no architecture of transformers has one, so it stands in a file of its own
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}


def load_arrays(directory: Path, config: ModelConfig, sources: Params, *, dtype: Any = jnp.float32, shardings: Any = None) -> Params:
    """Reads a decoder's parameters from the safetensors files of a folder, straight to their shards.

    Args:
      directory: holds `model.safetensors`, or several files and `model.safetensors.index.json`; and `value_head.safetensors`
        where the value head is apart.
      sources: which tensors the arrays are made of: `hf_sources(config)` or `own_sources(config)`.
      dtype: of the arrays, whatever the files'; the value head is always float32.
      shardings: one sharding, or the tree of `sharding.params_sharding`; None: all on the first device.

    Raises:
      UserError: a file is missing or broken, a tensor is missing, or is of another shape or of a type that is not
        float32, bfloat16 or float16; or the files hold tensors that the decoder has no place for.
    """
    files = _files(directory)
    wanted = dict(_tensors(sources, config))
    extra = [name for name in files if name not in wanted and not _needless(name, config)]
    if extra:
        raise UserError(f"{directory} has the tensor {sorted(extra)[0]!r}, for which a decoder of its config.json has no place")
    _check(directory, files, wanted)

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        # Opened anew for each block: while a file is open, all that was read of it counts as this process's memory.
        with safetensors.safe_open(files[name], framework="np") as file:
            return file.get_slice(name)[index]

    def load(path: Any, parts: tuple[Source, ...], info: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
        made: dict[str, np.ndarray] = {}  # devices that hold the same slice share what is read for it
        to = np.dtype(np.float32 if "value_head" in jax.tree_util.keystr(path) else dtype)

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            index = (slice(None),) * len(info.shape) if index is None else index
            if str(index) not in made:
                made[str(index)] = assemble(parts, info.shape, index, to, read)
            return made[str(index)]

        array = jax.make_array_from_callback(info.shape, sharding, shard, dtype=to)
        return jax.block_until_ready(array)  # else buffers of arrays on their way to a device would pile up

    infos = shapes(config)
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        one = shardings or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: one, infos)
    return jax.tree_util.tree_map_with_path(load, sources, infos, shardings, is_leaf=_is_sources)


def save_hf(
    directory: Path,
    params: Params,
    config: ModelConfig,
    *,
    dtype: Any = None,
    max_file_mb: float = 5000,
    token_ids: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint that `transformers` loads: `config.json` and safetensors files; a value head beside them.

    Weights that `directory` held before are removed, as a reader would prefer some of them to the new ones. One file after
    another is gathered on the host. Every array has to be addressable from this process.

    Args:
      params: the parameters, of any sharding.
      dtype: float32, bfloat16 or float16; None: that of the parameters.
      max_file_mb: a new file begins before one would become larger than so many MB (10⁶ bytes); a larger tensor has a
        file of its own.
      token_ids: what else `config.json` should say, such as `eos_token_id`.

    Raises:
      UserError: no architecture of `transformers` computes what this decoder does, or `max_file_mb` is not positive.
    """
    if not max_file_mb > 0:
        raise UserError(f"max_file_mb={max_file_mb} must be more than 0")
    to = np.dtype(params["embedding"].dtype if dtype is None else dtype)
    fields = config_to_hf(config, to.name)
    sources = hf_sources(config)
    head = sources.pop("value_head", None)
    arrays = {key: value for key, value in params.items() if key != "value_head"}
    placed = [
        (source, array)
        for parts, array in zip(jax.tree.leaves(sources, is_leaf=_is_sources), _leaves_like(sources, arrays), strict=True)
        for source in parts
    ]
    directory.mkdir(parents=True, exist_ok=True)
    for stale in [*directory.glob("model*.safetensors"), directory / INDEX, directory / VALUE_HEAD]:
        stale.unlink(missing_ok=True)

    groups = list(_grouped(placed, to.itemsize, max_file_mb * 1e6))
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = WEIGHTS if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        _write(directory / file, {source.name: _host_tensor(array, source, to) for source, array in group})
        weight_map |= {source.name: file for source, _ in group}
    if len(groups) > 1:
        total = sum(int(np.prod(source.shape(array.shape))) for source, array in placed) * to.itemsize
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if head is not None:
        _write(directory / VALUE_HEAD, {"value_head": _host_tensor(params["value_head"], head[0], np.dtype(np.float32))})
    _write_json(directory / "config.json", {**fields, **(token_ids or {})})


def _is_sources(x: Any) -> bool:
    return isinstance(x, tuple)


def _leaves_like(sources: Params, arrays: Params) -> list[Any]:
    return jax.tree.leaves(jax.tree.map(lambda _, array: array, sources, arrays, is_leaf=_is_sources))


def _tensors(sources: Params, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each tensor that the arrays are made of."""
    for parts, info in zip(jax.tree.leaves(sources, is_leaf=_is_sources), _leaves_like(sources, shapes(config)), strict=True):
        yield from ((source.name, source.shape(info.shape)) for source in parts)


def _needless(name: str, config: ModelConfig) -> bool:
    """Tensors that some checkpoints hold beyond need: the head that is the embedding, and the constants of RoPE."""
    return (name == "lm_head.weight" and config.tie_embeddings) or name.endswith("rotary_emb.inv_freq")


def _files(directory: Path) -> dict[str, Path]:
    """The file of each tensor. Like `transformers`, takes `model.safetensors` before the files of an index."""
    single, index = directory / WEIGHTS, directory / INDEX
    if single.exists():
        files = {name: single for name in _names(single)}
    elif index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {name: directory / file for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} cannot be read as the index of a checkpoint: it should be JSON with a weight_map") from error
    else:
        raise UserError(f"{directory} holds no weights: there is neither {WEIGHTS} nor {INDEX}; other formats are not read")
    if (directory / VALUE_HEAD).exists():
        files = {name: directory / VALUE_HEAD for name in _names(directory / VALUE_HEAD)} | files
    return files


def _names(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


def _opened(path: Path) -> Any:
    if not path.exists():
        raise UserError(f"{path} is missing, though {INDEX} names it: copy the checkpoint again")
    try:
        return safetensors.safe_open(path, framework="np")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}): copy the checkpoint again") from error


def _check(directory: Path, files: Mapping[str, Path], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Reads the header of every file, so that what doesn't fit is said before the first gigabyte is read."""
    for name in wanted:
        if name not in files:
            raise UserError(f"{directory} lacks the tensor {name!r}, which a decoder of its config.json has")
    for path in sorted(set(files.values())):
        with _opened(path) as file:
            held = set(file.keys())
            for name in (name for name in wanted if files[name] == path):
                if name not in held:
                    raise UserError(f"{path} lacks the tensor {name!r}, though {INDEX} says that it holds it")
                header = file.get_slice(name)
                if (shape := tuple(header.get_shape())) != wanted[name]:
                    raise UserError(f"{path} has {name!r} of shape {list(shape)}, but by config.json it is {list(wanted[name])}")
                if header.get_dtype() not in DTYPES:
                    raise UserError(f"{path} has {name!r} stored as {header.get_dtype()}; supported are {', '.join(DTYPES)}")


def _grouped(placed: list[tuple[Source, Any]], itemsize: int, limit: float) -> Iterator[list[tuple[Source, Any]]]:
    """The tensors in order, cut into files of at most `limit` bytes."""
    group: list[tuple[Source, Any]] = []
    size = 0
    for source, array in placed:
        more = int(np.prod(source.shape(array.shape))) * itemsize
        if group and size + more > limit:
            yield group
            group, size = [], 0
        group.append((source, array))
        size += more
    yield group


def _host_tensor(array: Any, source: Source, dtype: np.dtype) -> np.ndarray:
    # safetensors writes the buffer as it lies, so it has to be in C order.
    return np.asarray(tensor_of(np.asarray(jax.device_get(array)), source), dtype=dtype, order="C")


def _write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    partial = path.with_name(path.name + ".partial")
    safetensors.numpy.save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, path)


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
