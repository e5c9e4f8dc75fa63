"""Several processes do what one does, and fail together."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from lightningrl import distributed
from lightningrl.distributed import check_settings, check_shared, from_first, is_first, joined, share, wait_for_all
from lightningrl.errors import UserError
from lightningrl.loop import checkpoint_tree
from lightningrl.metrics import read_metrics, without_timings
from lightningrl.model.params import init_params
from lightningrl.policies import EVERY_ROLE, adapter_name, load_adapted
from lightningrl.policy import load_policy
from lightningrl.rollout_bytes import decode, encode
from lightningrl.runtime.store import Store
from tests import two_processes
from tests.two_processes import RECORDED, SHAPE, five_updates, step_on

ROOT = pathlib.Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(*arguments: str, devices: int = 1) -> subprocess.Popen[str]:
    # Optimised code would take longer to compile than to run.
    xla = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    flags = {"XLA_FLAGS": xla, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
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
    assert len({float(update["grad_norm"]) for update in expected}) == 5  # every update is another one
    assert max(float(np.abs(update["gradient0"]).max()) for update in expected) > 1e-3

    # Written by two processes on four devices, read by one on one, every bit.
    alone = {"moments": np.zeros(3, np.float32)}
    like = checkpoint_tree({EVERY_ROLE: step_on(1, 1, 1).init(init_params(SHAPE, jax.random.key(1)))}, alone)
    saved = two_processes.checkpoints(tmp_path)
    restored, host = saved.restore(5, like)
    saved.close()
    assert host == {"iteration": 5}
    np.testing.assert_array_equal(restored["evidence"]["moments"], [0.0, 1.0, 2.0])
    with np.load(tmp_path / "of_0.npz") as seen:
        for k, leaf in enumerate(jax.tree.leaves(restored["params"])):
            assert leaf.sharding.is_fully_replicated
            np.testing.assert_array_equal(leaf, seen[f"params{k}"])


# The command on two processes

FIT = {
    "agent": "tests.two_processes:agent",
    "iterations": 4,
    "learning_rate": 1e-3,
    "tasks_per_iteration": 2,
    "rollouts_per_task": 4,
    "max_tokens": 3,
    "eval_every": 2,
    "slots": 8,
    "vocab_size": 263,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 2,
    "intermediate_size": 32,
    "context_length": 64,
}


def fit_command(folder: pathlib.Path, **settings: Any) -> list[str]:
    tasks = folder / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"say": f"word {i}"}) + "\n" for i in range(5)))
    flags = FIT | {"tasks": tasks, "cache": folder / "cache", "out": folder / "out"} | settings
    return ["-m", "lightningrl.fit", *(f"--{name}={value}" for name, value in flags.items())]


def two(folder: pathlib.Path, of_each: Sequence[dict[str, Any]] = ({}, {}), **settings: Any) -> list[subprocess.Popen[str]]:
    settings |= {"coordinator": f"127.0.0.1:{free_port()}", "processes": 2, "fsdp": 2}
    return [start(*fit_command(folder, process=i, **settings, **own)) for i, own in enumerate(of_each)]


def sentence(stderr: str) -> str:
    """What was said, without gloo's own line."""
    return "\n".join(line for line in stderr.splitlines() if "Gloo" not in line)


@pytest.mark.slow
def test_a_run_of_two_processes_killed_and_gone_on_with_is_that_of_one(tmp_path: pathlib.Path) -> None:
    """Same rollouts, and metrics equal up to rounding: Adam divides a gradient by its size, so where it is all but 0 its
    rounding is a step of another size, up to the learning rate, in a parameter that matters as little as its gradient."""
    (tmp_path / "one").mkdir()
    alone = start(*fit_command(tmp_path / "one"))
    both = two(tmp_path)
    metrics = tmp_path / "out" / "metrics.jsonl"
    while all(process.poll() is None for process in both) and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.02)
    for process in both:
        process.kill()
    assert {code for code, _, _ in results(both)} == {-signal.SIGKILL}
    before = read_metrics(tmp_path / "out")
    assert len(before) < 5
    (code, said, stderr), (other, nothing, stderr_of_other) = results(two(tmp_path))
    assert code == other == 0, stderr + stderr_of_other
    assert "held-out reward" in said and sentence(nothing) == sentence(stderr_of_other) == ""
    assert results([alone])[0][0] == 0
    rows, expected = read_metrics(tmp_path / "out"), read_metrics(tmp_path / "one" / "out")
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4] and rows[: len(before) - 1] == before[:-1]
    for row, other_row in zip(map(without_timings, rows), map(without_timings, expected), strict=True):
        assert row == pytest.approx(other_row, rel=1e-4, abs=1e-5)
    assert any(row.get("grad_norm", 0) > 1e-3 for row in rows)
    one, other_params = (load_policy(tmp_path / place / "policy").params for place in ("out", "one/out"))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other_params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_an_adapter_for_a_role_is_trained_by_two_processes_as_by_one(tmp_path: pathlib.Path) -> None:
    """With a moving mean as reference: the same rollouts, and the same adapter and base in OUT/policy."""
    settings = {"recipe": "grpo", "train_roles": "speaker", "lora_per_role": True, "lora_rank": 2, "reference": "ema", "iterations": 2}
    (tmp_path / "one").mkdir()
    ((code, _, stderr),) = results([start(*fit_command(tmp_path / "one", **settings))])
    assert code == 0, stderr
    (code, _, stderr), (other, _, stderr_of_other) = results(two(tmp_path, **settings))
    assert code == other == 0, stderr + stderr_of_other
    rows, expected = (map(without_timings, read_metrics(tmp_path / place)) for place in ("out", "one/out"))
    for row, other_row in zip(rows, expected, strict=True):
        assert row == pytest.approx(other_row, rel=1e-4, abs=1e-5)
    assert row["grad_norm/speaker"] > 1e-3 and row["kl/speaker"] > 0
    a, b = (load_adapted(folder, folder / adapter_name("speaker")) for folder in (tmp_path / "out/policy", tmp_path / "one/out/policy"))
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-3)
    base = load_policy(tmp_path / "out/policy").params
    assert not np.array_equal(a.params["layers"][0]["qkv"], base["layers"][0]["qkv"])


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.slow
def test_one_that_fails_stops_the_other_with_one_sentence(tmp_path: pathlib.Path, busy_port: int) -> None:
    """Process 0, whose gateway finds its port taken, then process 1, which has other settings."""
    wrong = f"port {busy_port} on 127.0.0.1 is in use by another program"
    (first, _, said), (second, _, told) = results(two(tmp_path, port=busy_port))
    assert first == second == 1
    assert sentence(said).startswith(f"error: {wrong}") and sentence(said).count("\n") == 0
    assert sentence(told).startswith(f"error: process 0 stopped: {wrong}") and sentence(told).count("\n") == 0

    (first, _, told), (second, _, said) = results(two(tmp_path, ({}, {"learning_rate": 0.5})))
    assert first == second == 1
    wrong = "process 1 has other settings than process 0: give every process the same flags and files"
    assert sentence(said) == f"error: {wrong}" and sentence(told) == f"error: process 1 stopped: {wrong}"


def test_one_whose_coordinator_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "JOINING_SECONDS", 0)
    with pytest.raises(UserError, match="process 1 found no process 0 at 127.0.0.1:1 within 0 s .*: start it with --process=0"):
        with joined("127.0.0.1:1", 2, 1):
            pass
