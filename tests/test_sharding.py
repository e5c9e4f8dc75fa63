"""Sharding on one device; the tests of eight are in `eight_devices.py`, run here in a process that forces so many."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from lightningrl.sharding import HOST, gathered, local, make_mesh, place, replicated, sampling_mesh
from tests.tiny import tiny_policy

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_on_eight_devices() -> None:
    # Optimised code would take longer to compile than to run.
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/eight_devices.py"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | flags, timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " skipped" not in done.stdout


def test_a_mesh_larger_than_the_machine_is_refused() -> None:
    with pytest.raises(ValueError, match="a mesh of 4 × 2 × 8 needs 64 devices, but there are"):
        make_mesh(4, 2, 8)


def test_what_lies_right_is_not_copied_and_what_is_gathered_is() -> None:
    mesh, params = make_mesh(), tiny_policy().params
    assert sampling_mesh(mesh) is mesh
    placed = place(params, replicated(mesh))
    assert all(a is b for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(params), strict=True))
    assert local(placed)["embedding"] is placed["embedding"]
    for copy in (gathered(placed, replicated(mesh)), gathered(placed, HOST)):
        jax.tree.map(np.testing.assert_array_equal, copy, params)
        assert not any(a is b for a, b in zip(jax.tree.leaves(copy), jax.tree.leaves(params), strict=True))
    copy = gathered(placed, replicated(mesh))
    assert copy["embedding"].unsafe_buffer_pointer() != placed["embedding"].unsafe_buffer_pointer()
    assert jax.tree.leaves(gathered(placed, None)) == []
