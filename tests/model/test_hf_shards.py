"""Straight to the shards: eight devices, and how much memory of the host it takes. In processes of their own."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from lightningrl.model.config import ModelConfig
from lightningrl.model.hf import save_hf
from lightningrl.model.params import shapes
from tests.model.hf_checkpoints import OURS, random_params

ROOT = pathlib.Path(__file__).parent.parent.parent


def in_a_process(code: str, *arguments: object) -> str:
    process = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout


SHARDED = """
import pathlib, sys, jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from lightningrl.model import hf
from lightningrl.sharding import make_mesh, params_sharding
from tests.model.hf_checkpoints import load, read_config

directory = pathlib.Path(sys.argv[1])
shardings = params_sharding(read_config(directory), make_mesh(data=2, fsdp=2, tensor=2))
shardings = shardings | {"value_head": shardings["final_norm"]} if (directory / hf.VALUE_HEAD).exists() else shardings
calls = []
inside = hf.assemble
hf.assemble = lambda parts, shape, index, *rest: calls.append((parts[0].name, str(index))) or inside(parts, shape, index, *rest)
params, _ = load(directory, shardings=shardings)
assert jax.tree.map(lambda x: x.sharding, params) == shardings
assert len(params["layers"][0]["qkv"].sharding.device_set) == 8
assert params["layers"][0]["qkv"].addressable_data(0).size * 4 == params["layers"][0]["qkv"].size
assert len(calls) == len(set(calls)), "devices that hold the same slice read it once"
np.savez(sys.argv[2], *[np.asarray(leaf) for leaf in jax.tree.leaves(params)])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen_2.5", "llama_3"])
def test_eight_devices_read_what_one_reads(name: str, tmp_path: pathlib.Path) -> None:
    params = random_params(OURS[name])
    save_hf(tmp_path, params, OURS[name], max_file_mb=0.01)
    in_a_process(SHARDED, tmp_path, tmp_path / "params.npz")
    with np.load(tmp_path / "params.npz") as sharded:
        for ours, leaf in zip(sharded.values(), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(ours, leaf)


# Beside what the parameters themselves take, which on this kind of device is memory of the host too.
MEMORY = """
import json, pathlib, sys, jax
jax.config.update("jax_platforms", "cpu")
from tests.model.hf_checkpoints import load

def memory(which):  # now, or at its peak; getrusage's peak would be the parent's too
    (line,) = [line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith(which)]
    return int(line.split()[1]) * 1024

load(pathlib.Path(sys.argv[1]))  # a small one first: what JAX allocates once is no part of this
before = memory("VmRSS")
params, _ = load(pathlib.Path(sys.argv[2]))
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
assert size > 200e6 and memory("VmRSS") - before > 0.9 * size  # all of it is there
# An accelerator would have the array that is on its way to it on the host too.
largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"beside": memory("VmHWM") - before - size, "largest": largest}))
"""
LARGE = ModelConfig(
    vocab_size=8192,
    hidden_size=1024,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=2816,
    max_positions=64,
)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_memory_of_the_host_is_that_of_one_file(dtype: type, tmp_path: pathlib.Path) -> None:
    """At most 1.2 × the largest file, however many there are; also where the parameters are wider than the files."""
    save_hf(tmp_path / "small", random_params(OURS["llama_3"]), OURS["llama_3"])
    save_hf(tmp_path / "large", jax.tree.map(lambda leaf: np.ones(leaf.shape, dtype), shapes(LARGE)), LARGE, max_file_mb=52)
    files = [path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors")]
    assert len(files) >= 3 and 40e6 < max(files) < 52.1e6
    memory = json.loads(in_a_process(MEMORY, tmp_path / "small", tmp_path / "large"))
    assert memory["beside"] > 0
    assert memory["beside"] + memory["largest"] <= 1.2 * max(files)
