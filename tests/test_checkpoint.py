from __future__ import annotations

import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from lightningrl.checkpoint import Checkpoints, load_config, load_params, save_params
from lightningrl.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


@struct.dataclass
class State:
    params: Any
    optimizer: Any
    key: Any
    step: Any
    evidence: Any = None


def bits(tree: Any) -> list[tuple[str, str, bytes]]:
    return [
        (jax.tree_util.keystr(path), str(leaf.dtype), np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def make_state(seed: int = 0) -> State:
    a, b = jax.random.split(jax.random.key(seed))
    params = {
        "layers": [{"w": jax.random.normal(a, (3, 4))}, {"w": jax.random.normal(b, (4, 3)).astype(jnp.bfloat16)}],
        "scale": jnp.float32(np.nextafter(np.float32(1), np.float32(2))),
        "odd": jnp.array([np.nan, -0.0, np.inf, 1e-45], jnp.float32),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0, 10))).init(params)
    return State(params, optimizer, np.array([7, 0xFFFFFFFF], np.uint32), jnp.int32(5), {"seen": np.array([True, False])})


def test_every_bit_and_the_structure_come_back(tmp_path: pathlib.Path) -> None:
    state, host = make_state(), {"cursor": 12, "seed": 2**63, "lr": 0.1 + 0.2, "roles": ["a"], "none": None}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, state, host)
    checkpoints.close()
    like = jax.tree.map(lambda x: x if isinstance(x, np.ndarray) else jax.ShapeDtypeStruct(x.shape, x.dtype), make_state(1))
    restored, restored_host = Checkpoints(tmp_path).restore(5, like)
    assert bits(restored) == bits(state) and restored_host == host
    assert str(jax.tree.structure(restored)) == str(jax.tree.structure(state))
    assert isinstance(restored.key, np.ndarray) and isinstance(restored.step, jax.Array)


def test_wide_host_integers_keep_their_dtype(tmp_path: pathlib.Path) -> None:
    state = {"counts": np.array([2**62 + 1, -1], np.int64), "x": np.array(0.1, np.float64)}
    Checkpoints(tmp_path).save(0, state, {})
    restored, _ = Checkpoints(tmp_path).restore(0, state)
    assert bits(restored) == bits(state)


def test_the_last_checkpoints_are_kept(tmp_path: pathlib.Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    for step in (1, 2, 5):
        checkpoints.save(step, {"x": jnp.float32(step)}, {"step": step})
    assert checkpoints.latest() == 5 and Checkpoints(tmp_path).latest() == 5
    state, host = checkpoints.restore(2, {"x": jax.ShapeDtypeStruct((), jnp.float32)})
    assert (float(state["x"]), host) == (2.0, {"step": 2})
    with pytest.raises(UserError, match=r"has no checkpoint 1; it has \[2, 5\]"):
        checkpoints.restore(1, {"x": jnp.float32(0)})
    with pytest.raises(ValueError, match="checkpoint 3 must come after the last one, 5"):
        checkpoints.save(3, {"x": jnp.float32(0)}, {})


def test_arrays_come_back_with_the_sharding_asked_for(tmp_path: pathlib.Path) -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    state = {"w": jnp.arange(8.0)}
    Checkpoints(tmp_path).save(0, state, {})
    restored, _ = Checkpoints(tmp_path).restore(0, {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)})
    assert restored["w"].sharding == sharding and bits(restored) == bits(state)


@pytest.mark.parametrize(
    ("like", "difference"),
    [
        ({"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}, r"array w=float32\[3, 4\], this run float32\[4, 3\]"),
        ({"w": jnp.zeros((3, 4), jnp.bfloat16), "b": jnp.zeros(3)}, r"array w=float32\[3, 4\], this run bfloat16\[3, 4\]"),
        ({"w": jnp.zeros((3, 4))}, r"it has the array b=float32\[3\], this run has none of that name"),
        (
            {"w": jnp.zeros((3, 4)), "b": jnp.zeros(3), "head": jnp.zeros(2)},
            r"it lacks the array head=float32\[2\] of this run",
        ),
    ],
)
def test_a_checkpoint_of_other_arrays_is_refused_by_name(tmp_path: pathlib.Path, like: Any, difference: str) -> None:
    Checkpoints(tmp_path).save(0, {"w": jnp.zeros((3, 4)), "b": jnp.zeros(3)}, {})
    with pytest.raises(UserError, match=f"checkpoint 0 in {tmp_path} is of another config: .*{difference}"):
        Checkpoints(tmp_path).restore(0, like)


@pytest.mark.parametrize(
    ("config", "difference"),
    [
        ({"lr": 0.2, "model": {"layers": 2}, "roles": ("a",)}, "setting lr=0.1, this run 0.2"),
        ({"lr": 0.1, "model": {"layers": 3}, "roles": ("a",)}, "setting model.layers=2, this run 3"),
        ({"lr": 0.1, "model": {"layers": 2}}, "the setting roles="),
    ],
)
def test_a_checkpoint_of_another_config_is_refused_by_name(tmp_path: pathlib.Path, config: dict, difference: str) -> None:
    same = {"lr": 0.1, "model": {"layers": 2}, "roles": ("a",)}
    Checkpoints(tmp_path, config=same).save(0, {"w": jnp.zeros(2)}, {})
    Checkpoints(tmp_path, config=same).restore(0, {"w": jnp.zeros(2)})
    with pytest.raises(UserError, match=difference):
        Checkpoints(tmp_path, config=config).restore(0, {"w": jnp.zeros(2)})


@pytest.mark.parametrize("item", ["about", "state"])
def test_a_damaged_checkpoint_gets_a_sentence_and_the_one_before_is_whole(tmp_path: pathlib.Path, item: str) -> None:
    written = Checkpoints(tmp_path)
    for step in (0, 1):
        written.save(step, {"w": jnp.full(2, step)}, {"step": step})
    for file in [path for path in (tmp_path / "1" / item).rglob("*") if path.is_file()]:
        file.write_bytes(file.read_bytes()[:3])
    with pytest.raises(UserError, match=f"checkpoint 1 in {tmp_path} is damaged .*: delete its folder") as refused:
        Checkpoints(tmp_path).restore(1, {"w": jnp.zeros(2, jnp.int32)})
    assert "\n" not in str(refused.value)
    shutil.rmtree(tmp_path / "1")
    again = Checkpoints(tmp_path)
    assert again.latest() == 0 and again.restore(0, {"w": jnp.zeros(2, jnp.int32)})[1] == {"step": 0}


@pytest.mark.parametrize(("leaf", "message"), [(jax.random.key(0), "store jax.random.key_data of it"), (3, "not an array")])
def test_leaves_that_would_not_come_back_are_refused(tmp_path: pathlib.Path, leaf: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Checkpoints(tmp_path).save(0, {"key": leaf}, {})


# One process loads orbax once and forks: each child saves checkpoints 1, 2, 3 … and is killed, at the n-th file operation of
# its run or after a delay; another child then restores what is left and writes what it found as a line of JSON.
CRASHES = """
import json, os, pathlib, signal, sys, time, traceback
import jax, numpy as np
from lightningrl.checkpoint import Checkpoints

root, mode, points = pathlib.Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])

def state(step):
    return {"w": np.full((256, 256), step, np.float32), "key": np.array([step, ~step & 0xFFFFFFFF], np.uint32)}

def save(directory, point):
    seen = 0
    def count(event, arguments):
        nonlocal seen
        if event in ("open", "os.mkdir", "os.remove", "os.rmdir", "os.rename") and str(directory) in str(arguments[0]):
            seen += 1
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)
    if mode == "operation":
        sys.addaudithook(count)
    checkpoints = Checkpoints(directory, keep=1)
    for step in range((checkpoints.latest() or 0) + 1, 1_000_000):
        checkpoints.save(step, state(step), {"step": step})
        # In one stroke: the process is killed at any moment, this line included.
        saved = directory.parent / f"{directory.name}.saved"
        saved.with_suffix(".new").write_text(str(step))
        saved.with_suffix(".new").replace(saved)

def look(directory):
    checkpoints = Checkpoints(directory, keep=1)
    step = checkpoints.latest()
    whole = None
    if step is not None:
        found, host = checkpoints.restore(step, state(0))
        whole = host == {"step": step} and all(np.array_equal(found[k], v) for k, v in state(step).items())
    checkpoints.save((step or 0) + 1, state(0), {})
    saved = directory.parent / f"{directory.name}.saved"
    print(json.dumps({"step": step, "whole": whole, "saved": int(saved.read_text()) if saved.exists() else 0}), flush=True)

def child(function, *arguments):
    pid = os.fork()
    if pid == 0:
        try:
            function(*arguments)
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid

for number, point in enumerate(points):
    directory = root / str(number)
    pid = child(save, directory, point)
    if mode == "delay":
        time.sleep(point)
        os.kill(pid, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    print(json.dumps({"point": point, "killed": killed}), flush=True)
    os.waitpid(child(look, directory), 0)
"""


def crash(directory: pathlib.Path, mode: str, points: list[Any]) -> None:
    program = directory / "crashes.py"
    program.write_text(CRASHES)
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(program), str(directory), mode, json.dumps(points)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == 2 * len(points), result.stderr
    for run, found in zip(lines[::2], lines[1::2], strict=True):
        # A checkpoint whose save returned is there; one that was under way may be.
        assert run["killed"], run
        assert found["step"] is None and found["saved"] == 0 or found["whole"], (run, found)
        assert found["saved"] <= (found["step"] or 0) <= found["saved"] + 1, (run, found)


@pytest.mark.slow
def test_a_process_killed_at_a_file_operation_leaves_whole_checkpoints(tmp_path: pathlib.Path) -> None:
    crash(tmp_path, "operation", random.Random(0).sample(range(1, 70), 8))


@pytest.mark.slow
def test_a_process_killed_at_any_file_operation_leaves_whole_checkpoints(tmp_path: pathlib.Path) -> None:
    # A save is about 25 operations; from the end of the first through the second, which also deletes the first.
    crash(tmp_path, "operation", list(range(22, 54)))


@pytest.mark.slow
def test_a_process_killed_at_any_time_leaves_whole_checkpoints(tmp_path: pathlib.Path) -> None:
    rng = random.Random(0)
    crash(tmp_path, "delay", [0.2 + rng.random() for _ in range(20)])


def test_ctrl_c_waits_for_the_checkpoint(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    save = checkpoints._manager.save

    def interrupted(*args: Any, **kwargs: Any) -> bool:
        signal.raise_signal(signal.SIGINT)
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoints._manager, "save", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(5, make_state(), {})
    assert checkpoints.latest() == 5 and signal.getsignal(signal.SIGINT) is before


def test_params_of_a_policy_come_back_bit_for_bit(tmp_path: pathlib.Path) -> None:
    params = make_state().params | {"transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T, "empty": jnp.zeros((0, 3))}
    (tmp_path / "tokenizer.json").write_text("{}")
    save_params(tmp_path, make_state(1).params, {"old": True})
    save_params(tmp_path, params, {"hidden_size": 4, "rope": {"theta": 1e4}})
    assert load_config(tmp_path) == {"hidden_size": 4, "rope": {"theta": 1e4}}
    loaded = load_params(tmp_path, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params))
    assert bits(loaded) == bits(params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_params_have_dotted_names_in_the_file(tmp_path: pathlib.Path) -> None:
    import safetensors

    save_params(tmp_path, {"layers": [{"w": jnp.zeros(2)}], "norm": jnp.ones(2)}, {})
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert sorted(file.keys()) == ["layers.0.w", "norm"]


def test_a_directory_without_a_policy_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="holds no policy"):
        load_config(tmp_path)
    with pytest.raises(UserError, match="holds no policy"):
        load_params(tmp_path, {"w": jnp.zeros(2)})
    (tmp_path / "config.json").write_text("[]")
    (tmp_path / "model.safetensors").write_text("not one")
    with pytest.raises(UserError, match="should be a JSON object"):
        load_config(tmp_path)
    with pytest.raises(UserError, match="holds no policy"):
        load_params(tmp_path, {"w": jnp.zeros(2)})
    save_params(tmp_path, {"w": jnp.zeros(2)}, {})
    with pytest.raises(UserError, match=r"array w=float32\[2\], this run float32\[3\]"):
        load_params(tmp_path, {"w": jnp.zeros(3)})
