"""bench_gpu without a GPU: what it counts, how it makes an update fit, that it refuses, and all of it once on little."""

from __future__ import annotations

import json
import math
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningrl.model.config import ModelConfig
from lightningrl.model.params import shapes
from lightningrl.packing.rows import RowSettings, pack
from lightningrl.train import score_edges
from lightningrl.types import Rollout, Task, Transition

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))
import bench_gpu
import bench_gpu_work as work
import bench_train

SMALL = ModelConfig(96, 64, 2, 4, 2, 16, 160, 512)


def calls(*prompts_and_responses: tuple[list[int], list[int]]) -> list[Rollout]:
    """A rollout of one call each."""
    made = []
    for i, (prompt, response) in enumerate(prompts_and_responses):
        ids = np.array(prompt, np.int32), np.array(response, np.int32)
        call = Transition(*ids, np.full(len(response), -1.0, np.float32), 1.0, 0, "policy", 0)
        made.append(Rollout(f"task/{i}", Task("task", {}), "task", i, 0, (call,), {"reward": float(i)}, "ok"))
    return made


def test_flops_of_a_trie_by_hand() -> None:
    """Prompt 1 2 3 is shared; then 4 5 and 6. Six nodes, at depths 1 2 3 4 5 and 4; three actions."""
    ours = bench_train.Ours(SMALL, calls(([1, 2, 3], [4, 5]), ([1, 2, 3], [6])), RowSettings((8,), 8, 8))
    layer = 64 * (4 * 16) + 64 * (2 * 2 * 16) + (4 * 16) * 64 + 3 * 64 * 160
    pairs = 1 + 2 + 3 + 4 + 5 + 4
    by_hand = 6 * 2 * layer * 6 + 6 * 96 * 64 * 3 + 12 * 2 * 4 * 16 * pairs
    assert ours.packed.computed_tokens == 6 and sum(map(bench_train.seen, ours.packed.rows)) == pairs
    assert ours.flops() == by_hand


def test_flops_of_a_plain_row_are_those_of_its_gradient() -> None:
    """One row of 64, all visible to the tokens after. XLA counts what is not matrix products, and scores that the mask hides, too."""
    ids = np.random.default_rng(0).integers(0, 96, 64).tolist()
    ours = bench_train.Ours(SMALL, calls((ids[:1], ids[1:])), RowSettings((64,), 64, 64))
    rows, edges = ours.packed.rows[0], jax.tree.map(lambda x: x[0], ours.packed.edges)

    def objective(params: Any) -> jax.Array:
        return jnp.sum(score_edges(params, SMALL, rows, edges).logp)

    analysis = jax.jit(jax.grad(objective)).lower(shapes(SMALL)).cost_analysis()
    assert analysis is not None
    counted = analysis["flops"]
    hidden = 12 * 2 * 4 * 16 * (64 * 64 - 64 * 65 / 2)
    assert ours.flops() + hidden < counted < 1.15 * (ours.flops() + hidden)


def test_longer_calls_share_what_the_recorded_ones_share() -> None:
    recorded = bench_train.recorded()
    packed = []
    for times, rows in ((1, RowSettings((256,), 1024, 256)), (16, work.SIZES["1b"].rows)):
        transitions = [t for r in work.lengthened(recorded, times) for t in r.transitions]
        assert max(int(t.response_ids.max()) for t in transitions) < work.SIZES["1b"].model.vocab_size
        packed.append(pack(transitions, range(len(transitions)), rows))
    short, long = packed
    assert long.row_tokens == 16 * short.row_tokens and int(long.edges.mask.sum()) == 16 * int(short.edges.mask.sum())
    assert long.reuse_ratio == pytest.approx(short.reuse_ratio, rel=0.05)  # where tries are cut depends on the rows


@pytest.mark.parametrize(
    ("size", "gigabytes", "trained", "remat"),
    [
        ("1b", math.inf, "all parameters", "none"),
        ("1b", 76, "all parameters", "none"),
        ("1b", 40, "all parameters", "layers"),
        ("1b", 24, "an adapter of rank 16", "layers"),
        ("3b", 133, "all parameters", "none"),
        ("3b", 76, "all parameters", "layers"),
        ("3b", 40, "an adapter of rank 16", "layers"),
        ("3b", 8, "an adapter of rank 16", "layers"),
    ],
)
def test_what_is_trained_is_what_fits(size: str, gigabytes: float, trained: str, remat: str) -> None:
    way = work.way_to_train(work.SIZES[size], gigabytes * 1e9)
    assert (way.trained, way.remat) == (trained, remat)
    assert way.bytes <= 0.9 * gigabytes * 1e9 or gigabytes == 8


def test_an_update_that_was_not_measured_is_not_met() -> None:
    shares = {"b": 0.4, "c": 0.5}
    updates = {size: {"update": {"share_of_matmul_rate": share}} for size, share in shares.items()}
    none, low, high = bench_gpu.goals({"a": {}, **updates})
    assert (none["value"], none["met"]) == (None, False)
    assert (low["met"], high["met"]) == (False, True) and high["name"].startswith("c: ")


def test_without_a_gpu_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    for size in ([], ["--size", "1b"], ["--size", "tiny,3b"]):
        assert bench_gpu.main(["--json", str(tmp_path / "out.json"), *size]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("bench_gpu.py: JAX sees no GPU, only cpu: run it") and said.err.count("\n") == 1 and said.out == ""
    assert not (tmp_path / "out.json").exists()


def test_a_measure_that_fails_is_named_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bench_gpu, "MEASURES", {"update": fails, "decode": lambda *_: [1.0]})
    results, problems = bench_gpu.measure("1b", bench_gpu.Rates(1.0, 1.0))
    assert results == {"decode": [1.0]} and problems == {"1b: update": "RuntimeError: out of memory"}


def numbers(tree: Any) -> list[float]:
    if isinstance(tree, dict | list):
        return [x for part in (tree.values() if isinstance(tree, dict) else tree) for x in numbers(part)]
    return [tree] if isinstance(tree, int | float) and not isinstance(tree, bool) else []


@pytest.mark.slow
def test_it_writes_what_it_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(bench_gpu, "REPEATS", 1)
    assert bench_gpu.main(["--json", str(tmp_path / "out.json"), "--size", "tiny"]) == 0
    said = json.loads((tmp_path / "out.json").read_text())
    assert said["chip"] and said["date"] and said["versions"]["jax"] == jax.__version__ and said["problems"] == {}
    tiny = said["results"]["tiny"]
    gap = tiny["attention"].pop("largest_difference")
    assert all(math.isfinite(x) and x > 0 for x in numbers(said))
    # Of outputs of about 1, a few of bfloat16's roundings, as p is rounded before the product with v.
    assert 0 <= gap <= 4 * float(jnp.finfo(jnp.bfloat16).eps)
    assert [row["slots"] for row in tiny["decode"]] == [1, 8, 64] and tiny["update"]["trained"] == "all parameters"
    (goal,) = said["goals"]
    assert goal["name"].startswith("tiny: update") and goal["met"] == (tiny["update"]["share_of_matmul_rate"] >= bench_gpu.GOAL)
