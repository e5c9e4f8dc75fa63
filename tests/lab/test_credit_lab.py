"""The experiment from end to end, with very little of everything: what is written, and where its numbers come from."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import credit_lab
from experiments.credit_lab import Config, as_json, chosen, run
from lightningrl.errors import UserError
from lightningrl.lab.figures import write_figures
from lightningrl.lab.pairs import PAIRS
from lightningrl.lab.report import REFERENCE, counted, less_than, level_with_first, mark, ranked, report_text, verdict

pytestmark = pytest.mark.slow

RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "credit_lab"


@pytest.fixture(scope="module")
def results():
    return as_json(run(Config(smoke=True)))


def test_all_that_is_asked_for_is_measured(results):
    assert list(results["pairs"]) == [name for name in PAIRS if name in credit_lab.SMOKE["pairs"]]
    assert results["processes"] == list(credit_lab.SMOKE["processes"])
    for pair in results["pairs"].values():
        for numbers in (*pair["by_process"]["regret"], pair["overall"]["regret"]):
            assert numbers[1] <= numbers[0] <= numbers[2]
        assert all(0.5 < steps / results["settings"]["steps"] < 1.5 for steps in pair["steps_per_batch"])
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_the_report_is_made_of_the_results_and_of_nothing_else(results):
    """Another regret in the results is another regret in the report."""
    text = report_text(results)
    for name, pair in results["pairs"].items():
        point, low, high = pair["overall"]["regret"]
        assert f"`{name}`{mark(pair)} | {point:.2f} [{low:.2f}, {high:.2f}]" in text
    other = copy.deepcopy(results)
    other["pairs"][REFERENCE]["overall"]["regret"] = [7.25, 7.0, 7.5]
    assert f"`{REFERENCE}` | 7.25 [7.00, 7.50]" in report_text(other)
    assert "7.25" not in text


def test_figures_are_written(results, tmp_path):
    write_figures(results, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["learning.png", "regret.png", "signal.png"]
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())


def _made_up(results, regrets):
    """The assigners' results with other regrets in the first process."""
    other = copy.deepcopy(results)
    names = ranked(other, "assigner", told=False)
    for name, regret in zip(names, regrets, strict=True):
        other["pairs"][name]["by_process"]["regret"][0] = regret
    return other, names


def test_overlapping_intervals_are_a_tie(results):
    other, names = _made_up(results, ([0.5, 0.4, 0.6], [0.3, 0.2, 0.45]))
    assert level_with_first(other, names, 0) == [names[1], names[0]]
    table = [line for line in report_text(other).splitlines() if line.startswith("| `delayed_reward` |")][0]
    first, level, *_, most = [cell.strip() for cell in table.split("|")[2:-1]]
    assert first == f"`{names[1].split(' + ')[0]}` 0.30 [0.20, 0.45]"
    assert level == f"`{names[0].split(' + ')[0]}`"
    assert most == f"{level} 0.50 [0.40, 0.60]"
    apart, names = _made_up(results, ([0.5, 0.46, 0.6], [0.3, 0.2, 0.45]))
    assert level_with_first(apart, names, 0) == [names[1]]


def test_whoever_is_told_the_truth_is_in_no_ranking(results):
    assert "gae(exact) + whiten" in ranked(results, "assigner")
    assert "gae(exact) + whiten" not in ranked(results, "assigner", told=False)
    other = copy.deepcopy(results)
    other["pairs"]["gae(exact) + whiten"]["by_process"]["regret"][0] = [-9.0, -9.0, -9.0]
    table = [line for line in report_text(other).splitlines() if line.startswith("| `delayed_reward` |")][0]
    assert "-9.00" not in table


def test_verdicts():
    assert [verdict(x) for x in ([-0.2, -0.3, -0.1], [-0.1, -0.3, 0.1], [0.2, 0.1, 0.3])] == ["better", "tie", "worse"]
    assert verdict([-0.0004, -0.0005, -0.0003]) == "tie"  # certain, and too small to matter


def test_pairs_are_compared_on_the_same_seeds(results):
    assert counted(less_than(results, REFERENCE, REFERENCE)) == {"better": 0, "tie": 2, "worse": 0}
    other = copy.deepcopy(results)
    by_seed = other["pairs"][REFERENCE]["regret_by_seed"]
    other["pairs"]["gae + whiten"]["regret_by_seed"] = [[x - 0.25 for x in by_seed[0]], [x + 0.5 for x in by_seed[1]]]
    less = less_than(other, "gae + whiten", REFERENCE)
    np.testing.assert_allclose(less, [[-0.25] * 3, [0.5] * 3, [0.125] * 3])
    assert counted(less) == {"better": 1, "tie": 0, "worse": 1}


def test_unknown_names_get_a_sentence():
    with pytest.raises(UserError, match="no pair 'gigpoo': choose among lightningrl"):
        chosen(["gigpoo"], PAIRS, "pair")
    with pytest.raises(UserError, match="steps a batch are not enough"):
        run(dataclasses.replace(Config(smoke=True), steps=20))


def test_numbers_that_are_not_finite_are_none():
    assert as_json({"a": [float("inf"), 1.23456789], "b": (float("nan"), 3, True)}) == {"a": [None, 1.2346], "b": [None, 3, True]}


def test_the_committed_report_is_that_of_the_committed_results():
    results = json.loads((RESULTS / "results.json").read_text(encoding="utf-8"))
    assert (RESULTS / "report.md").read_text(encoding="utf-8") == report_text(results)
    assert set(results["pairs"]) <= set(PAIRS) and len(results["pairs"]) >= 55
    assert results["settings"]["seeds"] >= 20 and not results["settings"]["smoke"]
