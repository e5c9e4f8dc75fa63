"""The benchmark of credit: that it runs, and that what it times computes what it says. No timing is asserted."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl.recipes import RECIPES
from lightningrl.segments import reverse_affine_scan
from lightningrl.table import Evidence
from scripts import bench_credit, bench_credit_inputs


@pytest.mark.slow
def test_writes_its_results(tmp_path, capsys):
    path = tmp_path / "out" / "bench.json"
    assert bench_credit.main(["--json", str(path), "--max", "1000", "--tokens", "4", "--recipes", "lightningrl,ppo"]) == 0
    results = json.loads(path.read_text())
    assert results["goals"] == []  # those are of 100k transitions and more
    assert [(row["name"], row["transitions"]) for row in results["recipes"]] == [("lightningrl", 1000), ("ppo", 1000)]
    assert {row["name"] for row in results["tokens_alone"]} == set(bench_credit.LONG_FUNCTIONS)
    assert all(row["seconds"] > 0 and row["edges"] > 0 for row in results["recipes"] + results["tokens_alone"])
    assert results["scans"][0]["largest_difference"] < 1e-5
    assert capsys.readouterr().err == ""


def test_too_small_a_maximum_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_credit.main(["--json", str(tmp_path / "x.json"), "--max", "10"])
    assert "--max must be at least 1000" in capsys.readouterr().err


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_the_other_scans_are_the_same_recursion(data):
    n = data.draw(st.integers(1, 20))
    ids = np.sort(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))).astype(np.int32)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    rng = np.random.default_rng(n)
    factors, terms = rng.uniform(-1, 1, n).astype(np.float32), rng.normal(size=n).astype(np.float32)
    ids[~mask] = rng.integers(0, 5, int((~mask).sum()))  # not read
    expected = reverse_affine_scan(factors, terms, ids, mask)
    for scan in bench_credit.SCANS.values():
        np.testing.assert_allclose(scan(*map(jax.numpy.asarray, (factors, terms, ids, mask))), expected, rtol=1e-5, atol=1e-5)


def test_a_batch_is_a_table_like_any_other():
    batch = bench_credit_inputs.ragged(1000, 5, seed=0)
    table, tokens = batch.table, batch.tokens
    rollout, turn, group = (np.asarray(x) for x in (table.rollout, table.turn, table.group))
    starts = np.append(True, rollout[1:] != rollout[:-1])
    assert rollout.tolist() == (np.cumsum(starts) - 1).tolist() and (turn[starts] == 0).all() and (np.diff(turn)[~starts[1:]] == 1).all()
    assert (group == rollout // 8).all() and turn.max() < 8
    weight = np.asarray(table.weight, np.float64)
    np.testing.assert_allclose(np.bincount(rollout, weight), 1, rtol=1e-6)
    assert np.bincount(tokens.transition).tolist() == np.asarray(table.num_tokens).tolist() and np.asarray(table.num_tokens).max() == 5
    for k in range(3):
        pairs = set(zip(np.asarray(table.anchor[:, k]).tolist(), zip(group.tolist(), turn.tolist(), strict=True), strict=True))
        assert len(pairs) == len({state for state, _ in pairs})  # a state belongs to one group and one turn
    ends = np.append(starts[1:], True)
    assert (np.asarray(table.next_anchor)[ends] == -1).all()
    assert (np.asarray(table.next_anchor)[:-1][~ends[:-1]] == np.asarray(table.anchor)[1:, 0][~ends[:-1]]).all()


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_gets_the_evidence_it_needs(name):
    batch = bench_credit_inputs.ragged(1000, 3, seed=0)
    needs = RECIPES[name].needs
    evidence = bench_credit_inputs.make_evidence(batch, needs)
    assert all(getattr(evidence, need) is not None for need in needs)
    loss, _ = jax.eval_shape(lambda *x: bench_credit.objective(RECIPES[name], *x), batch.table, batch.tokens, evidence)
    assert loss.shape == ()


def test_every_field_of_evidence_can_be_made():
    batch = bench_credit_inputs.ragged(1000, 3, seed=0)
    fields = list(Evidence.__dataclass_fields__)
    evidence = bench_credit_inputs.make_evidence(batch, fields)
    assert evidence.branch_value.shape == (1000, 2) and evidence.sum_pi2.shape == batch.tokens.mask.shape
    assert evidence.coalition.shape == (int(batch.table.rollout[-1]) + 1, 256)


def test_goals_are_ratios_of_one_run():
    rows = [{"name": "a", "transitions": n, "seconds": s} for n, s in ((100_000, 1.0), (1_000_000, 13.0))]
    assert list(bench_credit.growth_goals(rows, "recipe")) == [
        {"name": "recipe a: seconds of 1M transitions / 100k", "value": 13.0, "goal": 12.0, "met": False}
    ]
    compared = [
        {"library": "verl", "name": "grpo", "transitions": n, "seconds": 0.5, "their_seconds": 10.0, "goal": g}
        for n, g in ((10_000, 10.0), (100_000, 10.0), (100_000, None))
    ]
    assert list(bench_credit.speed_goals(compared)) == [
        {"name": "verl's grpo: times as fast at 100k transitions", "value": 20.0, "goal": 10.0, "met": True}
    ]
