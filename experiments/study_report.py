"""From the cells of a study to its numbers, its table and its figures.

Intervals are 95 % bootstrap intervals over seeds; with three seeds they are rough, and say at best what is not noise.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.ticker import MaxNLocator

from experiments.training import write_whole
from lightningrl.lab.intervals import Interval, draw_seeds, interval_of_mean

MORE_SUPERVISED = "more_supervised"


@dataclasses.dataclass(frozen=True)
class Point:
    """An evaluation, and what had been spent on it."""

    iteration: int
    rollouts: int  # to train on; branched ones and others that the recipe had run are counted
    tokens: int  # of prompts and responses, of such extra rollouts too; not of what they repeat
    heldout_reward: float
    unseen_reward: float | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """A finished run."""

    task: str
    arm: str
    seed: int
    variant: str
    command: Sequence[str]
    curve: Sequence[Point]
    train_reward: Sequence[float]  # of every iteration
    equal_compute_steps: int  # supervised updates that compute as much
    heldout_questions: int
    seconds: float
    made_with: Mapping[str, Any]


def write_report(out: Path, cells: Sequence[Cell], command: str) -> None:
    """Writes results.json, report.md and, where there is a curve, the figures."""
    results = results_of(cells, command)
    write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_whole(out / "report.md", report_text(results))
    if cells:
        curves(cells).savefig(out / "curves.png", dpi=110)
        efficiency(results).savefig(out / "efficiency.png", dpi=110)


def results_of(cells: Sequence[Cell], command: str) -> dict[str, Any]:
    """The numbers of the report, for every task and arm: its own over its seeds, comparisons over those that the first arm has too."""
    tasks: dict[str, Any] = {}
    for task in dict.fromkeys(cell.task for cell in cells):
        of_task = [cell for cell in cells if cell.task == task]
        arms = list(dict.fromkeys(cell.arm for cell in of_task))
        first = {cell.seed: cell for cell in of_task if cell.arm == arms[0]}
        tasks[task] = {
            "heldout_questions": of_task[0].heldout_questions,
            "arms": {arm: of_arm([cell for cell in of_task if cell.arm == arm], first) for arm in arms},
        }
    made_with = [dict(cell.made_with) for cell in cells]
    return {"command": command, "tasks": tasks, "made_with": [m for i, m in enumerate(made_with) if m not in made_with[:i]]}


def of_arm(cells: Sequence[Cell], first: Mapping[int, Cell]) -> dict[str, Any]:
    """One arm's numbers.

    `after_equal_rollouts` is the held-out reward when as many rollouts were run as the shorter of the two runs has, between
    evaluations on a straight line. `at_half` is the reward after half of the first arm's rollouts, less what that arm has at its end:
    an interval of 0 and more shows that half of them are enough. `share_of_rollouts` is what part of the first arm's rollouts it took to
    come to the reward which that arm, from the same warm start, has at its end; a run that never came there counts as its own whole
    length, so that the mean is a lower bound where `reached` is less than `seeds`. It shows nothing by itself: a noisy
    curve comes somewhere early by chance, and the share of a run of the same length can't be more than 1.

    Compared are seeds of the same warm start, which those are that have the same reward before training.
    """
    paired = [cell for cell in cells if cell.seed in first and same_start(cell, first[cell.seed])]
    numbers: dict[str, Any] = {
        "seeds": [cell.seed for cell in cells],
        "before": over_seeds([cell.curve[0].heldout_reward for cell in cells]),
        "after": over_seeds([cell.curve[-1].heldout_reward for cell in cells]),
        "gain": over_seeds([cell.curve[-1].heldout_reward - first.get(cell.seed, cell).curve[0].heldout_reward for cell in cells]),
        "seconds": [round(cell.seconds, 1) for cell in cells],
    }
    if cells[0].arm == MORE_SUPERVISED:
        numbers["before"] = over_seeds([first[cell.seed].curve[0].heldout_reward for cell in paired])
        numbers["less_first"] = over_seeds([cell.curve[-1].heldout_reward - first[cell.seed].curve[-1].heldout_reward for cell in paired])
        return numbers
    if any(cell.curve[-1].unseen_reward is not None for cell in cells):
        numbers["unseen_before"] = over_seeds([cell.curve[0].unseen_reward or 0.0 for cell in cells])
        numbers["unseen_after"] = over_seeds([cell.curve[-1].unseen_reward or 0.0 for cell in cells])
    numbers["compared"] = [cell.seed for cell in paired]
    if not paired:
        return numbers
    budgets = [min(cell.curve[-1].rollouts, first[cell.seed].curve[-1].rollouts) for cell in paired]
    ours = [reward_at(cell.curve, budget) for cell, budget in zip(paired, budgets, strict=True)]
    theirs = [reward_at(first[cell.seed].curve, budget) for cell, budget in zip(paired, budgets, strict=True)]
    reached = [spent_until(cell.curve, first[cell.seed].curve[-1].heldout_reward) for cell in paired]
    ends = [(cell.curve[-1].rollouts, cell.curve[-1].tokens) for cell in paired]
    spent = [point or end for point, end in zip(reached, ends, strict=True)]
    whole = [first[cell.seed].curve[-1].rollouts for cell in paired]
    return numbers | {
        "after_equal_rollouts": over_seeds(ours),
        "less_first": over_seeds(np.subtract(ours, theirs)),
        "at_half": over_seeds(
            [reward_at(cell.curve, n / 2) - first[cell.seed].curve[-1].heldout_reward for cell, n in zip(paired, whole, strict=True)]
        ),
        "reached": sum(point is not None for point in reached),
        "rollouts_to_first": over_seeds([rollouts for rollouts, _ in spent]),
        "tokens_to_first": over_seeds([tokens for _, tokens in spent]),
        "share_of_rollouts": over_seeds([rollouts / total if total else 1.0 for (rollouts, _), total in zip(spent, whole, strict=True)]),
    }


def same_start(cell: Cell, first: Cell) -> bool:
    return cell.arm == MORE_SUPERVISED or cell.curve[0].heldout_reward == first.curve[0].heldout_reward


def over_seeds(values: Any) -> Interval:
    """Mean, and its 95 % bootstrap interval."""
    x = np.asarray(values, np.float64)
    return interval_of_mean(x, draw_seeds(len(x)))


def reward_at(curve: Sequence[Point], rollouts: float) -> float:
    """The held-out reward after so many rollouts, between evaluations on a straight line."""
    return float(np.interp(rollouts, [p.rollouts for p in curve], [p.heldout_reward for p in curve]))


def spent_until(curve: Sequence[Point], reward: float) -> tuple[float, float] | None:
    """Rollouts and tokens until the held-out reward first was `reward`, between evaluations on a straight line; None if it never was."""
    if curve[0].heldout_reward >= reward:
        return (0.0, 0.0)
    for before, after in zip(curve, curve[1:], strict=False):
        if after.heldout_reward >= reward:
            part = (reward - before.heldout_reward) / (after.heldout_reward - before.heldout_reward)
            return before.rollouts + part * (after.rollouts - before.rollouts), before.tokens + part * (after.tokens - before.tokens)
    return None


def report_text(results: Mapping[str, Any]) -> str:
    lines = ["# A study", "", f"    {results['command']}", ""]
    for task, of_task in results["tasks"].items():
        arms = of_task["arms"]
        first = next(iter(arms))
        lines += [
            f"## {task}",
            "",
            f"Greedy reward on {of_task['heldout_questions']} held-out questions; means over seeds, with 95 % bootstrap intervals. "
            f"*Less* compares with `{first}` from the same warm starts after equal numbers of rollouts, extra ones counted; "
            f"*at half* after half of the rollouts of `{first}`, with what that has at its end. Every recipe is evaluated after equal "
            "numbers of rollouts, to within an iteration of its own; between evaluations the reward is taken to be on a straight line. "
            "*Rollouts* and *tokens* are those until that reward, and *share* is their part of its rollouts, which may be below 1 by "
            "chance. *Unseen* are questions about databases that were not trained on.",
            "",
            f"| recipe | seeds | before | after | unseen before → after | less `{first}` | at half | came there "
            "| rollouts | tokens | share | minutes a run |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
            *(arm_row(arm, numbers) for arm, numbers in arms.items()),
            "",
        ]
    lines += ["Made with:", ""] + [
        f"- commit {m['commit']}, Python {m['python']}, jax {m['versions'].get('jax')}, {m['machine']}" for m in results["made_with"]
    ]
    return "\n".join(lines) + "\n"


def arm_row(arm: str, numbers: Mapping[str, Any]) -> str:
    reached = numbers.get("reached")
    compared = len(numbers.get("compared", numbers["seeds"]))
    bound = "≥ " if reached is not None and reached < compared else ""
    unseen = "unseen_after" in numbers
    cells = [
        f"`{arm}`",
        str(len(numbers["seeds"])),
        f"{numbers['before'][0]:.3f}",
        text_of(numbers["after"]),
        f"{numbers['unseen_before'][0]:.3f} → {text_of(numbers['unseen_after'])}" if unseen else "",
        text_of(numbers["less_first"], "+.3f") if compared else "another warm start",
        "" if reached is None else text_of(numbers["at_half"], "+.3f"),
        "" if reached is None else f"{reached} of {compared}",
        "" if reached is None else f"{bound}{numbers['rollouts_to_first'][0]:,.0f}",
        "" if reached is None else f"{bound}{numbers['tokens_to_first'][0] / 1e6:.2f} M",
        "" if reached is None else bound + text_of(numbers["share_of_rollouts"], ".2f"),
        f"{np.mean(numbers['seconds']) / 60:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def text_of(interval: Interval, form: str = ".3f") -> str:
    point, low, high = interval
    return f"{point:{form}} [{low:{form}}, {high:{form}}]"


def curves(cells: Sequence[Cell]) -> matplotlib.figure.Figure:
    """Reward, a column a task: held out over rollouts above, in training over iterations below; the band is the range of the seeds."""
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    figure = matplotlib.figure.Figure(figsize=(5.2 * len(tasks), 6.4), layout="constrained")
    panels = figure.subplots(2, len(tasks), squeeze=False)
    for column, task in enumerate(tasks):
        of_task = [cell for cell in cells if cell.task == task]
        for number, arm in enumerate(dict.fromkeys(cell.arm for cell in of_task)):
            of_arm = [cell for cell in of_task if cell.arm == arm]
            if arm == MORE_SUPERVISED:
                after = np.mean([cell.curve[-1].heldout_reward for cell in of_arm])
                panels[0, column].axhline(after, color=f"C{number}", ls=":", label=arm)
                continue
            band(panels[0, column], *over_rollouts(of_arm), arm, number, "o")
            length = min(len(cell.train_reward) for cell in of_arm)
            band(panels[1, column], range(1, 1 + length), [cell.train_reward[:length] for cell in of_arm], arm, number, "")
        panels[0, column].set_title(task)
        panels[0, column].set_xlabel("rollouts, extra ones counted")
        panels[1, column].set_xlabel("iteration")
        panels[1, column].xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0, column].legend(frameon=False, fontsize=8)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("held-out reward, greedy")
    panels[1, 0].set_ylabel("training reward, sampled")
    return figure


def over_rollouts(cells: Sequence[Cell]) -> tuple[Sequence[float], list[list[float]]]:
    """Where the first seed was evaluated, as far as all seeds go, and the reward of each there: branches are not as many for every seed."""
    end = min(cell.curve[-1].rollouts for cell in cells)
    x = np.unique([min(point.rollouts, end) for point in cells[0].curve]).tolist()
    return x, [[reward_at(cell.curve, rollouts) for rollouts in x] for cell in cells]


def band(axes: Any, x: Sequence[float], runs: Sequence[Sequence[float]], label: str, number: int, marker: str) -> None:
    if len(x) == 0:
        return
    values = np.array(runs)
    axes.plot(x, values.mean(0), color=f"C{number}", marker=marker, ms=4, lw=1.6, label=label)
    axes.fill_between(x, values.min(0), values.max(0), color=f"C{number}", alpha=0.15, lw=0)


def efficiency(results: Mapping[str, Any]) -> matplotlib.figure.Figure:
    """Rollouts until the first arm's final reward, as a share of its own; arms that not every seed brought there are hollow."""
    tasks = results["tasks"]
    figure = matplotlib.figure.Figure(
        figsize=(5.2 * len(tasks), 1.6 + 0.35 * max(len(t["arms"]) for t in tasks.values())), layout="constrained"
    )
    for axes, (task, of_task) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True):
        arms = {arm: n for arm, n in of_task["arms"].items() if "share_of_rollouts" in n}
        for y, (_, numbers) in enumerate(arms.items()):
            point, low, high = numbers["share_of_rollouts"]
            all_there = numbers["reached"] == len(numbers["seeds"])
            axes.barh(y, point, color=f"C{y}" if all_there else "white", edgecolor=f"C{y}", height=0.7)
            axes.errorbar(point, y, xerr=[[point - low], [high - point]], color="black", lw=1, capsize=3)
        axes.axvline(1, color="grey", ls=":")
        axes.set_yticks(range(len(arms)), list(arms), fontsize=9)
        axes.invert_yaxis()
        axes.set_title(task)
        axes.set_xlabel(
            f"rollouts to the final reward of {next(iter(arms))}, as a share of its own\n(hollow: not with every seed)", fontsize=8
        )
        axes.spines[["top", "right"]].set_visible(False)
    return figure
