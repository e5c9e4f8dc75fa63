"""The lab's results as a page: what was measured, who is ahead, who is level with whom, and who loses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lightningrl.lab.intervals import Interval, difference, draw_seeds

REFERENCE, SAME = "lightningrl", "identical + group_norm"
REFERENCES = {"recipe": REFERENCE, "assigner": SAME, "advantage": SAME}  # what a family's pairs are compared with
FAMILIES = {
    "recipe": "Recipes, as they are named",
    "assigner": "Assigners: everything else held fixed",
    "advantage": "Advantages, of `identical` credit: everything else held fixed",
}
MARGIN = 0.005  # of regret, below which nothing is better or worse
Number = float | None
Results = Mapping[str, Any]


def report_text(results: Results) -> str:
    """Markdown; every number in it is one of the results, or a difference of two of them with its interval."""
    less = {n: less_than(results, n, REFERENCES[p["family"]]) for n, p in results["pairs"].items()}
    parts = [
        _head(results),
        _summary(results, less),
        _difficulties(results, less),
        *(_family(results, family, less) for family in FAMILIES),
        _twins(results),
        _producers(results),
        _steps(results),
        _left_out(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def ranked(results: Results, family: str, *, told: bool | None = None) -> list[str]:
    """Names of a family's pairs, least regret first; only of those that are told the truth, or are not, if that is asked for."""
    pairs = results["pairs"]
    names = [n for n, p in pairs.items() if p["family"] == family and told in (None, p["told"])]
    return sorted(names, key=lambda n: pairs[n]["overall"]["regret"][0])


def level_with_first(results: Results, names: Sequence[str], process: int | None) -> list[str]:
    """Pairs whose interval of regret in a process, or over all, overlaps that of the pair with the least, which comes first."""
    regret = {n: _regret(results, n, process) for n in names}
    order = sorted(names, key=lambda n: regret[n][0])
    return [n for n in order if regret[n][1] <= regret[order[0]][2]]


def less_than(results: Results, ours: str, theirs: str) -> list[Interval]:
    """Regret of one pair less that of another on the same seeds: for each process, and last for the mean over all of them."""
    regret, other = ({"regret": np.array(results["pairs"][n]["regret_by_seed"])} for n in (ours, theirs))
    return difference(regret, other, "regret", draw_seeds(regret["regret"].shape[1]))


def verdict(less: Sequence[float]) -> str:
    """Of a difference in regret with its interval: a tie where that holds 0, and where nobody would notice the difference."""
    point, low, high = less
    if abs(point) < MARGIN:
        return "tie"
    return "better" if high < 0 else "worse" if low > 0 else "tie"


def mark(pair: Mapping[str, Any]) -> str:
    """† for a pair that is told what no learner knows, ‡ for one that is given a designer's guess."""
    return "†" if pair["told"] else "‡" if "potential" in pair["needs"] else ""


def counted(less: Sequence[Interval]) -> dict[str, int]:
    """In how many processes a pair is better than what it is compared with, level with it, or worse."""
    verdicts = [verdict(x) for x in less[:-1]]
    return {v: verdicts.count(v) for v in ("better", "tie", "worse")}


def _regret(results: Results, name: str, process: int | None) -> Sequence[float]:
    pair = results["pairs"][name]
    return pair["overall"]["regret"] if process is None else pair["by_process"]["regret"][process]


def _head(results: Results) -> str:
    s, v = results["settings"], results["versions"]
    rates = ", ".join(f"{x:g}" for x in s["learning_rates"])
    rate = f"learning rate {rates}" if len(s["learning_rates"]) == 1 else f"for each pair the best of the learning rates {rates}"
    flag = " --full" if s["full"] else " --smoke" if s["smoke"] else ""
    told = sum(pair["told"] for pair in results["pairs"].values())
    return f"""# The credit lab

{len(results["pairs"])} pairs on {len(results["processes"])} tabular processes in which everything is known exactly. Made by

    python -m experiments.credit_lab{flag}

in {results["seconds"] / 60:.1f} minutes ({results["seconds"]:.0f} s) on {results["cpus"]} {results["backend"].upper()} cores,
JAX {v["jax"]}, NumPy {v["numpy"]}, Python {v["python"]}; repeated, it gives the same numbers.
{s["seeds"]} seeds (random policies to start from); brackets are 95 % bootstrap intervals over them. All numbers: `results.json`.

Every pair has {s["steps"]} environment steps a batch, extra rollouts included: whoever branches gets fewer groups (of {s["group_size"]}
rollouts), and whoever needs a critic or a running baseline gives half of the steps to an earlier batch when a gradient is measured, and
in learning knows what earlier batches left.

- **regret**: how much of what there was to gain was not gained, averaged over {s["iterations"]} batches × {s["epochs"]} updates of Adam,
  {rate}; 0 is the best policy from the first update on, 1 a policy that did not learn.
- **correlation** of what a call was credited with and its true advantage, over calls of {s["batches"]} batches at the policies that
  learning starts from.
- **cosine** of one batch's gradient and the true one. **bias**: the part of the *expected* gradient that is at right angles to the true one
  (all of it where it points backwards), as a share of its norm; a constant factor is no bias. It is estimated from {s["batches"]} batches a
  seed, less what their noise adds; where an interval reaches 0 no bias was seen. **noise**: standard deviation of a batch's gradient over
  the norm of the expected one.
- **against** the pair at the head of the column: mean regret less that of it on the same seeds, *better* or *worse* where its interval
  leaves out 0 and it is at least {MARGIN:g}, else a *tie*. The last column counts processes. Among so many comparisons some are chance.
  Recipes are compared with `{REFERENCE}`, all others with `{SAME}`: it has what they hold fixed.
- **†**: told something that no learner knows, exact values or (`judged`) the best action, four times in five. {told} pairs; they are in no
  ranking. **‡**: given a designer's guess of how far along each state is, as potential-based shaping is; it is good in most of these
  processes and says nothing in `key_used_late`, and nobody else has it.

At the first update no ratio differs from 1: recipes that differ in their loss alone have nearly one gradient there, and differ in regret
only. These processes are small and their states recur: what looks at equal states has it easy here, and no model has to generalise. One
learning rate for all favours those whose steps are of a size that suits it. Chances of success are those of the processes, not of any
language task."""


Less = Mapping[str, Sequence[Interval]]


def _summary(results: Results, less: Less) -> str:
    parts = [_in_short(results, family, less) for family in FAMILIES if ranked(results, family, told=False)]
    return "## In short\n\n" + "\n".join(parts) if parts else ""


def _in_short(results: Results, family: str, less: Less) -> str:
    names = ranked(results, family, told=False)
    first, *level = level_with_first(results, names, None)
    numbers = {n: _interval(_regret(results, n, None)) for n in (first, names[-1])}
    against: dict[str, list[str]] = {"better": [], "tie": [], "worse": []}
    for name in names:
        if name != REFERENCES[family]:
            against[verdict(less[name][-1])].append(f"`{name}`")
    title = FAMILIES[family].split(",")[0].split(":")[0]
    unaided = next((n for n in names if not mark(results["pairs"][n])), first)
    aside = "" if unaided == first else f" (‡), and without a designer's guess `{unaided}` {_interval(_regret(results, unaided, None))}"
    return (
        f"- **{title}** ({len(names)}): least regret `{first}` {numbers[first]}{aside}; level with the first, intervals overlapping: "
        f"{', '.join(f'`{n}`' for n in level) or 'nobody'}. Most regret `{names[-1]}` {numbers[names[-1]]}.\n"
        + "\n".join(
            f"  - {what} `{REFERENCES[family]}` over all processes, {len(found)}: {', '.join(found) or 'none'}."
            for what, found in (
                ("Better than", against["better"]),
                ("Level with", against["tie"]),
                ("Worse than", against["worse"]),
            )
        )
    )


def _difficulties(results: Results, less: Less) -> str:
    names = ranked(results, "assigner", told=False)
    if not names:
        return ""
    rows = [["difficulty", "least regret", "level with it", "`identical`", "most regret"]]
    for i, process in enumerate(results["processes"]):
        level = level_with_first(results, names, i)
        last = max(names, key=lambda n: _regret(results, n, i)[0])
        same = _interval(_regret(results, SAME, i)) if SAME in names else "—"
        first, most = (f"{_short(n)} {_interval(_regret(results, n, i))}" for n in (level[0], last))
        rows.append([f"`{process}`", first, ", ".join(map(_short, level[1:])) or "none", same, most])
    text = "## Which assigner for which difficulty\n\nLevel: the intervals of regret overlap.\n\n" + _table(rows)
    rows = [["regret", *(f"`{p}`" for p in results["processes"]), "mean"]]
    for name in names:
        cells = [_cell(results, name, names, i, less) for i in [*range(len(results["processes"])), None]]
        rows.append([_short(name) + mark(results["pairs"][name]), *cells])
    note = "**Bold**: level with the least of its column. − : worse than `identical` on the same seeds; + : better."
    return f"{text}\n\n{note}\n\n" + _table(rows)


def _cell(results: Results, name: str, names: Sequence[str], process: int | None, less: Less) -> str:
    number = f"{_regret(results, name, process)[0]:.2f}"
    bold = f"**{number}**" if name in level_with_first(results, names, process) else number
    return bold + {"better": " +", "tie": "", "worse": " −"}[verdict(less[name][-1 if process is None else process])]


def _family(results: Results, family: str, less: Less) -> str:
    names = ranked(results, family)
    if not names:
        return ""
    rows = [["pair", "regret", "correlation", "cosine", "bias", "noise", f"against `{REFERENCES[family]}`", "better / tie / worse"]]
    for name in names:
        pair = results["pairs"][name]
        numbers = [_interval(pair["overall"][m]) for m in ("regret", "correlation", "cosine", "bias", "noise")]
        itself = name == REFERENCES[family]
        against = "—" if itself else f"{verdict(less[name][-1])} {_signed(less[name][-1])}"
        counts = "—" if itself else " / ".join(str(n) for n in counted(less[name]).values())
        rows.append([f"`{name}`{mark(pair)}", *numbers, against, counts])
    return f"## {FAMILIES[family]}\n\n" + _table(rows)


def _twins(results: Results) -> str:
    """Pairs with exact evidence beside the same with evidence that was learned or sampled."""
    pairs = results["pairs"]
    twins = [(n, p["learned"]) for n, p in pairs.items() if p["learned"] in pairs]
    if not twins:
        return ""
    rows = [["learned", "correlation", "exact: correlation", "regret", "exact: regret", "exact less learned"]]
    for exact, learned in twins:
        numbers = [_interval(pairs[n]["overall"][m]) for m in ("correlation", "regret") for n in (learned, exact)]
        rows.append([f"`{learned}`", *numbers, _signed(less_than(results, exact, learned)[-1])])
    note = "The same pair with evidence that was learned or sampled from the rollouts, and with evidence without an error; means over all."
    return f"## What an imperfect model costs\n\n{note}\n\n" + _table(rows)


def _producers(results: Results) -> str:
    if not results["producers"]:
        return ""
    rows = [["producer", "extra steps", "error, mean over processes", *(f"`{p}`" for p in results["processes"])]]
    for name, found in results["producers"].items():
        points = [x[0] for x in found["error"]]
        steps = sum(x[0] for x in found["steps"]) / len(points)
        mean = sum(points) / len(points)
        rows.append([name, f"{steps:.1f} ×" if steps else "none", f"{mean:.2f}", *(f"{x:.2f}" for x in points)])
    note = """Root mean square of what a producer says less the truth it stands for, relative to that of the true advantages: an error of 1
is as large as what is to be told apart. Restarts are the Monte-Carlo estimate, which costs steps: as many times those of the batch as the
second column says. Critics have seen earlier batches, which learning pays for anyway. `hindsight by counting` is a probability, and its
error is not relative to anything. Coalitions are compared with the expectation given the calls at their turns."""
    return f"## Producers against Monte-Carlo and the truth\n\n{note}\n\n" + _table(rows)


def _steps(results: Results) -> str:
    """Whose steps differ from the reference's by more than 5 % in some process."""
    theirs = results["pairs"][REFERENCE]
    rows = [["pair", "measuring", "learning"]]
    for name, pair in results["pairs"].items():
        ratios = {k: [a / b for a, b in zip(pair[k], theirs[k], strict=True)] for k in ("steps_per_batch", "steps_of_learning")}
        if any(max(r) > 1.05 or min(r) < 0.95 for r in ratios.values()):
            rows.append([f"`{name}`", *(f"{min(r):.2f} … {max(r):.2f}" for r in ratios.values())])
    note = """How many groups there are follows from what a group costs on average, which is computed exactly, so steps are equal in
expectation; what was really taken differs by chance."""
    if len(rows) == 1:
        return f"## Steps\n\n{note} No pair's differ from those of `{REFERENCE}` by more than 5 % in any process."
    return f"## Steps\n\n{note} Where by more than 5 % in some process, relative to `{REFERENCE}`, least and most:\n\n" + _table(rows)


def _left_out(results: Results) -> str:
    rows = [["no pair of its own", "why"], *([f"{name}", why] for name, why in results["not_applicable"].items())]
    return "## Not in the lab\n\n" + _table(rows)


def _short(name: str) -> str:
    return f"`{name.split(' + ')[0]}`"


def _interval(x: Sequence[Number]) -> str:
    point, low, high = x
    if point is None:
        return "no signal"
    return f"{point:.2f} [{_number(low)}, {_number(high)}]"


def _number(x: Number) -> str:
    return "∞" if x is None else f"{x:.2f}"


def _signed(x: Sequence[float]) -> str:
    return f"{x[0]:+.3f} [{x[1]:+.3f}, {x[2]:+.3f}]"


def _table(rows: Iterable[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))
