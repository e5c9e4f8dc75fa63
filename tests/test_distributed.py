"""Several processes do what one does, and fail together."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from lightningrl import distributed
from lightningrl.checkpoint import Checkpoints
from lightningrl.distributed import check_settings, check_shared, from_first, is_first, joined, share, wait_for_all
from lightningrl.errors import UserError
from lightningrl.loop import checkpoint_tree
from lightningrl.metrics import read_metrics, without_timings
from lightningrl.model.params import init_params
from lightningrl.runtime.rollout_bytes import decode, encode
from lightningrl.runtime.store import Store
from tests import two_processes
from tests.two_processes import RECORDED, SHAPE, five_updates, step_on

ROOT = pathlib.Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(*arguments: str, devices: int = 1) -> subprocess.Popen[str]:
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results(processes: Sequence[subprocess.Popen[str]], timeout: float = 400) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each; none is left running."""
    deadline = time.monotonic() + timeout
    try:
        said = [process.communicate(timeout=max(deadline - time.monotonic(), 1)) for process in processes]
        return [(process.returncode, *text) for process, text in zip(processes, said, strict=True)]
    finally:
        for process in processes:
            process.kill()


# Rollouts as bytes


def test_rollouts_read_back_from_bytes_as_they_were() -> None:
    with Store(RECORDED / "rollouts.sqlite") as store:
        rollouts = store.read("train", 4)
    failed = dataclasses.replace(rollouts[0], transitions=(), outcome={}, status="failed", error="lost \udce4", answer={"a": [1, None]})
    given = [*rollouts, failed]
    back = decode(encode(given))
    assert len(back) == len(given) == 25
    for one, other in zip(back, given, strict=True):
        assert dataclasses.replace(one, transitions=()) == dataclasses.replace(other, transitions=())
        for a, b in zip(one.transitions, other.transitions, strict=True):
            for name in ("prompt_ids", "response_ids", "logprobs"):
                x, y = getattr(a, name), getattr(b, name)
                np.testing.assert_array_equal(x, y)
                assert x.dtype == y.dtype
            assert _kept(a) == _kept(b)
    assert decode(encode([])) == []
    assert decode(encode([failed])) == [failed]


def _kept(transition: Any) -> dict[str, Any]:
    fields = {field.name: getattr(transition, field.name) for field in dataclasses.fields(transition)}
    return {name: value for name, value in fields.items() if not isinstance(value, np.ndarray)}


def test_what_json_cannot_hold_gets_its_sentence() -> None:
    with Store(RECORDED / "rollouts.sqlite") as store:
        rollout = dataclasses.replace(store.read("train", 4)[0], answer=object())
    with pytest.raises(UserError, match="cannot be told to the other processes as JSON"):
        encode([rollout])


# One process


def test_one_process_is_alone(tmp_path: pathlib.Path) -> None:
    with joined(None, 1, 0):
        assert is_first() and not jax.distributed.is_initialized()
        assert share(b"abc") == b"abc"
        assert from_first(lambda: (1, 2)) == (1, 2)
        wait_for_all("nowhere")
        check_shared(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ((None, 2, 0), "processes=2 need --coordinator=HOST:PORT, the address of process 0, or --coordinator=auto"),
        (("somewhere", 2, 0), "coordinator=somewhere must be HOST:PORT, the address of process 0, or auto"),
        (("somewhere:x", 2, 0), "coordinator=somewhere:x must be HOST:PORT"),
        (("somewhere:1", 2, 2), "process=2 must be from 0 to 1, as processes=2"),
    ],
)
def test_settings_that_do_not_fit_together(settings: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_settings(*settings)


# Two processes


def close(result: np.ndarray, expected: np.ndarray, scale: float) -> None:
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6 * max(scale, 1.0))


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_leave_one_checkpoint(tmp_path: pathlib.Path) -> None:
    """Two processes of two devices against one device: five updates on recorded rollouts, and what they leave."""
    port = str(free_port())
    both = [start("-m", "tests.two_processes", port, "2", str(i), str(tmp_path), devices=2) for i in range(2)]
    state, expected = five_updates(step_on(1, 1, 1))
    for code, _, stderr in results(both):
        assert code == 0, stderr
    for i in range(2):
        with np.load(tmp_path / f"of_{i}.npz") as seen:
            for u, update in enumerate(expected):
                for name, value in update.items():
                    close(seen[f"{u}/{name}"], value, float(np.abs(value).max()))
            for k, leaf in enumerate(jax.tree.leaves(state.params)):
                close(seen[f"params{k}"], np.asarray(leaf), float(np.abs(leaf).max()))
    assert len({float(update["loss"]) for update in expected}) == 5  # every update is another one
    assert max(float(np.abs(update["gradient0"]).max()) for update in expected) > 1e-3

    # Written by two processes on four devices, read by one on one, every bit.
    alone = {"moments": np.zeros(3, np.float32)}
    like = checkpoint_tree(step_on(1, 1, 1).init(init_params(SHAPE, jax.random.key(1))), alone)
    saved = two_processes.checkpoints(tmp_path)
    restored, host = saved.restore(5, like)
    saved.close()
    assert host == {"iteration": 5}
    np.testing.assert_array_equal(restored["evidence"]["moments"], [0.0, 1.0, 2.0])
    with np.load(tmp_path / "of_0.npz") as seen:
        for k, leaf in enumerate(jax.tree.leaves(restored["params"])):
            assert leaf.sharding.is_fully_replicated
            np.testing.assert_array_equal(leaf, seen[f"params{k}"])
