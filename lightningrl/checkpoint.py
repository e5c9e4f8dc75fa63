"""What a run needs to go on (orbax), and the weights of a policy on their own (safetensors).

Orbax is used nowhere else. A checkpoint is written into a temporary directory and renamed when it is whole, so a process
killed at any moment leaves the previous checkpoint or the new one, never a half.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.flax
import safetensors.numpy

from lightningrl.errors import UserError

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class Checkpoints:
    """The checkpoints of one run, the last `keep` of them.

    With several processes all call every method, and each writes and reads its shards of global arrays in one shared folder.
    A checkpoint is a pytree of arrays (`state`) and a JSON object (`host`: data cursor, counters …). Arrays round-trip
    bit for bit whatever their dtype; random keys are stored as their raw uint32 words (`jax.random.key_data`). `config`
    is any JSON object; checkpoints written under another one are refused.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2, config: Mapping[str, Any] | None = None):
        self.directory = pathlib.Path(directory).absolute()
        self._config = _as_json(config or {})
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True),
        )

    def save(self, step: int, state: Any, host: Mapping[str, Any]) -> None:
        """Writes one checkpoint; when it returns, the checkpoint is whole and older ones than the last `keep` are gone.

        Raises:
            ValueError: `step` is not after the last checkpoint's.
            TypeError: a leaf of `state` is no array, or a typed key array.
        """
        state = jax.tree.map(_written_as, state)
        about = {"host": _as_json(host), "config": self._config, "layout": _layout(state)}
        with _uninterrupted():
            saved = self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)))
        if not saved:
            raise ValueError(f"checkpoint {step} must come after the last one, {self.latest()}")

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint; None if there is none."""
        return self._manager.latest_step()

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads `(state, host)` back.

        Args:
            step: a step that was saved and is still kept.
            like: the tree of `state`, its leaves `jax.ShapeDtypeStruct` or arrays. JAX leaves come back with the
              sharding that they name here, which need not be the one they were saved with; NumPy leaves as NumPy.

        Raises:
            UserError: no such checkpoint, it is damaged, or it was written under another config or for another tree; the
              sentence names the first thing that differs.
        """
        if step not in self._manager.all_steps():
            raise UserError(f"{self.directory} has no checkpoint {step}; it has {sorted(self._manager.all_steps())}")
        about = self._read(step, "about", ocp.args.JsonRestore())
        _check_same(f"checkpoint {step} in {self.directory}", "setting", _flat(about["config"]), _flat(self._config))
        _check_same(f"checkpoint {step} in {self.directory}", "array", about["layout"], _layout(like))
        target = jax.tree.map(_restored_as, like)
        return self._read(step, "state", ocp.args.StandardRestore(target)), about["host"]

    def _read(self, step: int, item: str, how: Any) -> Any:
        try:
            with _uninterrupted():
                return self._manager.restore(step, args=ocp.args.Composite(**{item: how}))[item]
        except Exception as error:  # orbax, tensorstore and json each have their own for a file that is cut or gone
            damage = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"checkpoint {step} in {self.directory} is damaged ({damage[0][:200]}): delete its folder, and the run goes on "
                "from the one before it, if there is one"
            ) from error

    def close(self) -> None:
        """Frees the threads that orbax holds."""
        with _uninterrupted():
            self._manager.close()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: in the middle of orbax it leaves coroutines behind, and warnings on the terminal."""
    if threading.current_thread() is not threading.main_thread():  # no other thread gets the signal
        yield
        return
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted.is_set():
        signal.raise_signal(signal.SIGINT)


def save_params(directory: str | os.PathLike[str], params: Any, config: Mapping[str, Any]) -> None:
    """Writes a policy: `model.safetensors`, each array under its dotted path in the tree, and `config.json` (a JSON object).

    Other files in `directory`, such as a tokenizer's, are left alone. Each of the two files is replaced atomically.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # safetensors reads the buffer as it lies, so it has to be in C order.
    tensors = {name: np.asarray(jax.device_get(leaf), order="C") for name, leaf in _named_leaves(params)}
    weights, text = directory / WEIGHTS, directory / CONFIG
    safetensors.numpy.save_file(tensors, _partial(weights))
    _partial(text).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(_partial(weights), weights)
    os.replace(_partial(text), text)


def load_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save_params` got as `config`. Raises UserError if `directory` holds no policy."""
    path = pathlib.Path(directory) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} holds no policy: {path} cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{directory} holds no policy: {path} should be a JSON object")
    return config


def load_params(directory: str | os.PathLike[str], like: Any) -> Any:
    """Reads the arrays that `save_params` wrote into the tree, dtypes and shardings of `like`; every bit as written.

    Raises UserError if the file is missing or broken, or an array of it has another name, shape or dtype than in `like`.
    """
    path = pathlib.Path(directory) / WEIGHTS
    try:
        tensors = safetensors.flax.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{directory} holds no policy: {path} cannot be read ({error})") from error
    _check_same(str(path), "array", _layout(tensors), {name: _describe(name, leaf) for name, leaf in _named_leaves(like)})

    def place(path: Any, leaf: Any) -> Any:
        return jax.device_put(tensors[_name(path)], getattr(leaf, "sharding", None))

    return jax.tree_util.tree_map_with_path(place, like)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _describe(name: str, leaf: Any) -> str:
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise TypeError(f"{name or 'the state'} is a {type(leaf).__name__}, not an array")
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise TypeError(f"{name or 'the state'} is a typed array ({leaf.dtype}); store jax.random.key_data of it")
    return f"{leaf.dtype}{list(leaf.shape)}"


def _layout(tree: Any) -> dict[str, str]:
    return {name: _describe(name, leaf) for name, leaf in _named_leaves(tree)}


def _written_as(leaf: Any) -> Any:
    """With several processes, an array that each of them holds whole for itself is written once, by the first."""
    alone = jax.process_count() > 1 and isinstance(leaf, jax.Array) and leaf.is_fully_addressable
    return np.asarray(leaf) if alone else leaf


def _restored_as(leaf: Any) -> Any:
    leaf = _written_as(leaf)
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_same(where: str, what: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for name in sorted(theirs.keys() | ours.keys()):
        if name not in ours:
            raise UserError(f"{where} is of another config: it has the {what} {name}={theirs[name]}, this run has none of that name")
        if name not in theirs:
            raise UserError(f"{where} is of another config: it lacks the {what} {name}={ours[name]} of this run")
        if theirs[name] != ours[name]:
            raise UserError(f"{where} is of another config: it has {what} {name}={theirs[name]}, this run {ours[name]}")


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """A nested JSON object with dotted keys; lists are values."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{name}.{key}" if name else key).items()}


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(value))


def _partial(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".partial")
