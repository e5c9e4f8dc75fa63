"""bench_sampler's parts that need no peer: the work, the weights, the goals."""

from __future__ import annotations

import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from lightningrl.model.params import init_params

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))
import bench_sampler
import bench_sampler_work as work


@pytest.mark.parametrize("spread", [True, False])
def test_work_fits_the_context_and_groups_share_their_beginnings(spread: bool) -> None:
    agents = work.make_agents(24, spread)
    assert agents == work.make_agents(24, spread)
    assert len({tuple(a.first) for a in agents}) == 3 and len({tuple(a.first[:24]) for a in agents}) == 1
    for a in work.make_agents(64, spread):
        assert len(a.first) + sum(map(len, a.results)) + sum(a.lengths) <= work.CONTEXT
        assert all(1 <= n <= work.LONGEST for n in a.lengths)


def test_batches_go_on_from_what_was_said_and_count_what_was_wanted() -> None:
    agents = work.make_agents(5, True)
    seen: list[tuple[list[list[int]], int]] = []

    def generate(prompts: work.Prompts, tokens: int) -> list[list[int]]:
        seen.append(([list(p) for p in prompts], tokens))
        return [[7] * tokens for _ in prompts]

    assert work.batches(agents, generate, 2) == sum(sum(a.lengths) for a in agents)
    assert [len(prompts) for prompts, _ in seen] == [2, 2, 1] * work.TURNS
    assert seen[0][1] == max(agents[0].lengths[0], agents[1].lengths[0])
    assert seen[3][0][0] == agents[0].first + [7] * agents[0].lengths[0] + agents[0].results[0]


@pytest.mark.slow
def test_weights_are_laid_out_as_llama_has_them() -> None:
    params, c = init_params(bench_sampler.CONFIG, jax.random.key(0)), bench_sampler.CONFIG
    weights = bench_sampler.llama_weights(params)
    query = weights["model.layers.1.self_attn.q_proj.weight"]
    head = 3  # the second query head of the second key/value head
    np.testing.assert_array_equal(query[head * c.head_dim : (head + 1) * c.head_dim], params["layers"][1]["qkv"][:, 1, 1].T)
    assert query.shape == (c.num_heads * c.head_dim, c.hidden_size)
    assert sum(w.size for w in weights.values()) == sum(x.size for x in jax.tree.leaves(params))


def test_a_goal_that_was_not_measured_is_not_met() -> None:
    speed = {"spread": {"ours": 30.0, "transformers": 10.0}, "latency": {"ours": 8.0, "transformers": 4.0}}
    times, tunix, latency = bench_sampler.goals(speed)
    assert (times["value"], times["met"]) == (3.0, True)
    assert (tunix["value"], tunix["met"]) == (None, False)
    assert (latency["value"], latency["met"]) == (0.5, True)


@pytest.mark.slow
def test_it_runs_without_peers(tmp_path: pathlib.Path) -> None:
    assert bench_sampler.main(["--json", str(tmp_path / "out.json"), "--no_peers", "--rounds", "1", "--agents", "8"]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert {row["work"] for row in results["rounds"]} == {"spread", "even", "latency"}
    assert [goal["met"] for goal in results["goals"]] == [False] * 3
    assert results["problems"] == {"transformers": "left out", "tunix": "left out"}
