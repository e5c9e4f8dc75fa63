"""The lab's results as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.axes
import matplotlib.figure
import numpy as np
from PIL import Image

from lightningrl.lab.report import FAMILIES, REFERENCE, mark, ranked

COLOURS = {"recipe": "#4477aa", "assigner": "#cc3344", "advantage": "#228833"}
CURVES = (
    REFERENCE,
    "last_only + group_norm",
    "rudder + group_norm",
    "gae + whiten",
    "gigpo + whiten",
    "hindsight + whiten",
    "vineppo + whiten",
    "spo_tree + whiten",
)
Results = Mapping[str, Any]


def write_figures(results: Results, folder: Path) -> None:
    for name, draw in (("regret", regret_map), ("learning", learning_curves), ("signal", signal_and_regret)):
        path = folder / f"{name}.png"
        draw(results).savefig(path, dpi=100, bbox_inches="tight")
        with Image.open(path) as picture:
            picture.convert("RGB").quantize(128).save(path, optimize=True)  # a third of the size, and looks the same


def regret_map(results: Results) -> matplotlib.figure.Figure:
    """Regret of every pair in every process, a panel a family, least regret first."""
    families = [f for f in FAMILIES if ranked(results, f)]
    names = [ranked(results, f) for f in families]
    figure = matplotlib.figure.Figure(figsize=(10, 1.6 + 0.2 * sum(map(len, names)) + 0.4 * len(names)), layout="constrained")
    panels = figure.subplots(len(families), 1, squeeze=False, height_ratios=[len(n) for n in names])[:, 0]
    images = [_regret_panel(axes, results, family, n) for axes, family, n in zip(panels, families, names, strict=True)]
    panels[0].xaxis.tick_top()
    panels[0].set_xticks(
        range(len(results["processes"]) + 1), [p.replace("_", "\n") for p in results["processes"]] + ["mean over\nall"], fontsize=8
    )
    bar = figure.colorbar(images[0], ax=list(panels), location="bottom", shrink=0.6, aspect=50, pad=0.01)
    bar.set_label(
        "regret: 0 is the best policy at once, 1 nothing learned; † is told what no learner knows, ‡ a designer's guess", fontsize=8
    )
    figure.align_ylabels(panels)
    return figure


def _regret_panel(axes: matplotlib.axes.Axes, results: Results, family: str, names: Sequence[str]) -> Any:
    pairs = results["pairs"]
    values = np.array([[x[0] for x in [*pairs[n]["by_process"]["regret"], pairs[n]["overall"]["regret"]]] for n in names])
    image = axes.imshow(values, aspect="auto", cmap="RdYlGn_r", vmin=0, vmax=1, alpha=0.8)
    for (y, x), value in np.ndenumerate(values):
        axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7)
    axes.axvline(len(results["processes"]) - 0.5, color="white", lw=4)
    axes.set_xticks([])
    axes.set_yticks(range(len(names)), [n + mark(pairs[n]) for n in names], fontsize=7.5)
    axes.set_ylabel(f"{family}s", fontsize=10, fontweight="bold")
    return image


def learning_curves(results: Results) -> matplotlib.figure.Figure:
    """Exact mean return of the policy over batches, of a few pairs."""
    names = [n for n in CURVES if n in results["pairs"]]
    columns = min(4, len(results["processes"]))
    rows = -(-len(results["processes"]) // columns)
    figure = matplotlib.figure.Figure(figsize=(3.4 * columns, 2.7 * rows + 0.7))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (i, process) in zip(grid, enumerate(results["processes"]), strict=False):
        for number, name in enumerate(names):
            style: dict[str, Any] = {"color": f"C{number}", "lw": 1.4}
            if name == REFERENCE:
                style = {"color": "black", "lw": 2.2, "zorder": 9}
            axes.plot(results["pairs"][name]["curve"][i], label=name, **style)
        axes.axhline(results["best_return"][i], color="grey", ls=":", lw=1)
        axes.set_title(process.replace("_", " "), fontsize=9)
        axes.tick_params(labelsize=7)
    for axes in grid[len(results["processes"]) :]:
        axes.axis("off")
    for axes in grid[::columns]:
        axes.set_ylabel("return (dotted: best possible)", fontsize=8)
    for axes in grid[-columns:]:
        axes.set_xlabel(f"batches of {results['settings']['steps']} environment steps", fontsize=8)
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    figure.legend(*grid[0].get_legend_handles_labels(), loc="lower center", ncol=4, fontsize=9, frameon=False)
    return figure


def signal_and_regret(results: Results) -> matplotlib.figure.Figure:
    """Does what is seen at a fixed policy foretell learning?"""
    figure = matplotlib.figure.Figure(figsize=(11, 4.8))
    panels = figure.subplots(1, 2, sharey=True)
    texts = {"correlation": "correlation of credit and true advantage", "cosine": "cosine of a batch's gradient and the true one"}
    for axes, (metric, text) in zip(panels, texts.items(), strict=True):
        for family, colour in COLOURS.items():
            for told in (False, True):
                whole = [results["pairs"][n]["overall"] for n in ranked(results, family, told=told)]
                if whole:
                    _points(axes, whole, metric, colour, f"{family}s" + (" †" if told else ""), told)
        axes.set_xlabel(text)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("regret, mean over processes")
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def _points(axes: matplotlib.axes.Axes, whole: Sequence[Mapping[str, Any]], metric: str, colour: str, label: str, hollow: bool) -> None:
    x, y = (np.array([w[m] for w in whole], float).T for m in (metric, "regret"))
    to_x, to_y = ([z[0] - z[1], z[2] - z[0]] for z in (x, y))
    fill = "white" if hollow else colour
    axes.errorbar(x[0], y[0], xerr=to_x, yerr=to_y, fmt="o", ms=4.5, lw=0.6, color=colour, mfc=fill, alpha=0.85, label=label)
