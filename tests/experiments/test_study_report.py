"""A study's numbers, from curves that were made up so that the numbers can be told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.study_report import MORE_SUPERVISED, Cell, Point, over_rollouts, results_of, reward_at, spent_until, write_report

MADE_WITH = {"commit": "0" * 40, "machine": "Linux", "python": "3.11", "versions": {"jax": "0.10.2"}}


def cell(arm: str, seed: int, rewards: list[float], rollouts_each: int = 100, task: str = "sql") -> Cell:
    curve = [Point(10 * i, rollouts_each * i, 1000 * rollouts_each * i, reward) for i, reward in enumerate(rewards)]
    return Cell(task, arm, seed, "", ["python"], curve, [0.5] * 10 * (len(rewards) - 1), 7, 240, 60.0, MADE_WITH)


FIRST = [cell("lightningrl", seed, [0.2, 0.4, 0.6]) for seed in (0, 1)]
FASTER = [cell("gigpo", seed, [0.2, 0.6, 0.7]) for seed in (0, 1)]
SLOWER = [cell("ppo", 0, [0.2, 0.3, 0.4]), cell("ppo", 1, [0.2, 0.4, 0.6])]
BRANCHED = [cell("vineppo", seed, [0.2, 0.6, 0.8], rollouts_each=300) for seed in (0, 1)]
SUPERVISED = [cell(MORE_SUPERVISED, seed, [0.3]) for seed in (0, 1)]
ALL = [*FIRST, *FASTER, *SLOWER, *BRANCHED, *SUPERVISED]


def numbers(arm: str) -> dict:
    return results_of(ALL, "python")["tasks"]["sql"]["arms"][arm]


def test_between_evaluations_the_reward_is_on_a_straight_line() -> None:
    assert reward_at(FIRST[0].curve, 150) == pytest.approx(0.5)
    assert reward_at(FIRST[0].curve, 900) == 0.6  # of what was run
    assert spent_until(FIRST[0].curve, 0.5) == pytest.approx((150.0, 150_000.0))
    assert spent_until(FIRST[0].curve, 0.1) == (0.0, 0.0)
    assert spent_until(FIRST[0].curve, 0.61) is None


def test_a_plateau_is_reached_when_it_begins() -> None:
    assert spent_until(cell("a", 0, [0.2, 0.6, 0.6, 0.6]).curve, 0.6) == (100.0, 100_000.0)


def test_the_first_recipe_is_compared_with_itself() -> None:
    first = numbers("lightningrl")
    assert (first["less_first"], first["share_of_rollouts"], first["reached"]) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 2)
    assert (first["before"][0], first["after"][0], first["gain"][0]) == pytest.approx((0.2, 0.6, 0.4))


def test_half_the_rollouts_is_half_the_rollouts() -> None:
    faster = numbers("gigpo")
    assert faster["share_of_rollouts"] == pytest.approx((0.5, 0.5, 0.5))
    assert (faster["rollouts_to_first"][0], faster["tokens_to_first"][0]) == pytest.approx((100, 100_000))
    assert faster["less_first"][0] == pytest.approx(0.1)


def test_a_run_that_never_came_there_counts_whole_and_is_said() -> None:
    slower = numbers("ppo")
    assert slower["reached"] == 1 and slower["share_of_rollouts"] == (1.0, 1.0, 1.0)
    assert slower["after"][0] == pytest.approx(0.5) and slower["after"][1:] == pytest.approx((0.4, 0.6))  # of two seeds, the range


def test_extra_rollouts_count() -> None:
    """200 rollouts bought the first recipe's run; of 300 an iteration this one had two thirds of one by then."""
    branched = numbers("vineppo")
    assert branched["after_equal_rollouts"][0] == pytest.approx(0.2 + 0.4 * 2 / 3)
    assert branched["less_first"][0] == pytest.approx(0.2 + 0.4 * 2 / 3 - 0.6)
    assert branched["share_of_rollouts"][0] == pytest.approx(1.5)


def test_more_supervised_steps_have_no_rollouts_to_count() -> None:
    more = numbers(MORE_SUPERVISED)
    assert more["gain"][0] == pytest.approx(0.1) and more["less_first"][0] == pytest.approx(-0.3) and "reached" not in more


def test_a_seed_that_the_first_recipe_has_not_yet_is_not_compared() -> None:
    results = results_of([FIRST[0], *FASTER], "python")["tasks"]["sql"]["arms"]["gigpo"]
    assert results["seeds"] == [0, 1] and results["share_of_rollouts"] == pytest.approx((0.5, 0.5, 0.5))


def test_half_of_the_rollouts_against_the_end() -> None:
    """After 100 of 200 rollouts gigpo has 0.6, all that the first recipe has at its end; the first itself has 0.4."""
    assert numbers("gigpo")["at_half"] == pytest.approx((0.0, 0.0, 0.0))
    assert numbers("lightningrl")["at_half"] == pytest.approx((-0.2, -0.2, -0.2))
    assert numbers("vineppo")["at_half"][0] == pytest.approx(0.2 + 0.4 / 3 - 0.6)


def test_two_runs_of_one_process_are_no_saving_at_half() -> None:
    """Shares of noisy runs of the same process are below 1 nearly always; `at_half` says that half is not enough."""
    rng = np.random.default_rng(0)
    shares, halves = [], []
    for _ in range(40):
        noisy = lambda arm: [cell(arm, s, [0.2, *(x + 0.03 * rng.normal() for x in (0.5, 0.7, 0.75, 0.76))]) for s in range(5)]  # noqa: E731
        arm = results_of([*noisy("lightningrl"), *noisy("gigpo")], "python")["tasks"]["sql"]["arms"]["gigpo"]
        shares.append(arm["share_of_rollouts"][2] < 1)
        halves.append(arm["at_half"][1] >= 0)
    assert np.mean(shares) > 0.3 and np.mean(halves) < 0.05


def test_another_warm_start_is_not_compared() -> None:
    other = cell("gigpo", 0, [0.3, 0.6, 0.7])
    arm = results_of([*FIRST, other, FASTER[1]], "python")["tasks"]["sql"]["arms"]["gigpo"]
    assert (arm["seeds"], arm["compared"]) == ([0, 1], [1]) and arm["less_first"][0] == pytest.approx(0.1)
    alone = results_of([*FIRST, other], "python")["tasks"]["sql"]["arms"]["gigpo"]
    assert alone["compared"] == [] and "less_first" not in alone


def test_seeds_of_which_one_branched_more_are_drawn_as_far_as_both_go() -> None:
    x, rewards = over_rollouts([BRANCHED[0], cell("vineppo", 1, [0.2, 0.4, 0.6], rollouts_each=200)])
    assert x == [0, 300, 400]
    assert rewards == [pytest.approx([0.2, 0.6, 0.6 + 0.2 / 3]), pytest.approx([0.2, 0.5, 0.6])]


def test_what_is_written_can_be_read_and_seen(tmp_path: Path) -> None:
    cells = [*ALL, cell("lightningrl", 0, [0.1, 0.2], task="math")]
    write_report(tmp_path, cells, "python -m experiments.study --seeds=2")
    text = (tmp_path / "report.md").read_text()
    assert "python -m experiments.study --seeds=2" in text and "| `gigpo` | 2 | 0.200 | 0.700 [0.700, 0.700] |  | +0.100" in text
    assert "≥ 200" in text and "## math" in text and text.count("- commit") == 1
    assert json.loads((tmp_path / "results.json").read_text())["tasks"]["sql"]["arms"]["gigpo"]["reached"] == 2
    for name in ("curves", "efficiency"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 500


def test_a_study_of_which_nothing_is_done_has_a_report(tmp_path: Path) -> None:
    write_report(tmp_path, [], "python")
    assert json.loads((tmp_path / "results.json").read_text())["tasks"] == {}
