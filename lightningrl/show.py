"""A rollout in the terminal, call by call, with what each call earned under any recipe.

    python -m lightningrl.show runs/sql                                              # lists the last iteration, shows one
    python -m lightningrl.show runs/sql --rollout=train/45/shop-1/2 --recipe=lightningrl,gigpo,salt

Credit is relative to the group, so that all rollouts of the iteration are read and the one is shown.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lightningrl.advantages import broadcast
from lightningrl.errors import UserError, settings_of_a_person
from lightningrl.recipe import Recipe, describe
from lightningrl.recipes import get_recipe
from lightningrl.runtime.store import Place, Store
from lightningrl.table import Array, Credit, CreditKind, Evidence, TransitionTable
from lightningrl.tabulate import trained_rollouts
from lightningrl.tabulate_tree import own_calls, table_from_branched_rollouts
from lightningrl.types import Rollout, Transition

DEFAULT_RECIPE = "lightningrl"
PROMPT_LINES = 3  # of the message in front of a call; the response is shown whole
LABEL = 12


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a recipe gives the calls of one rollout, in order of their turns."""

    recipe: Recipe
    kind: CreditKind
    credit: np.ndarray  # float32 [calls]
    advantage: np.ndarray  # float32 [calls]


def latest(where: Mapping[str, Place]) -> Place:
    """The last iteration's training, or what else there is of it."""
    last = max(place.iteration for place in where.values())
    found = sorted({place.phase for place in where.values() if place.iteration == last})
    return Place("train" if "train" in found else found[0], last)


def run_recipe(run: Path) -> str:
    """The name of the recipe that the run was trained with, by its manifest; `lightningrl` without one."""
    path = run / "manifest.json"
    if not path.exists():
        return DEFAULT_RECIPE
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["config"].get("recipe", DEFAULT_RECIPE))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not the manifest of a run ({error}): name a recipe with --recipe") from error


def most_telling(rollouts: Sequence[Rollout]) -> Rollout:
    """The longest rollout of a group in which rewards differ most: there credit has something to tell apart."""
    rewards: dict[str, list[float]] = {}
    for rollout in trained_rollouts(rollouts):
        rewards.setdefault(rollout.group, []).append(rollout.reward)

    def tells(rollout: Rollout) -> tuple[bool, float, int]:
        counts = bool(trained_rollouts([rollout]))
        return counts, float(np.ptp(rewards[rollout.group])) if counts else 0.0, len(rollout.transitions)

    return max(rollouts, key=tells)


def verdict(recipe: Recipe, rollouts: Sequence[Rollout], shown: Rollout) -> Verdict:
    """Credit and advantage of `shown` among all rollouts of its iteration; among branches of rollouts only where those are trained on.

    Raises:
        UserError: the recipe needs what no store has, or rewards that can't be tabulated.
    """
    if recipe.needs:
        raise UserError(f"{recipe.name} needs {', '.join(recipe.needs)}, which a run does not store: its credit cannot be shown")
    if recipe.branches is None and shown.parent is None:
        rollouts = [rollout for rollout in rollouts if rollout.parent is None]
    own, calls = own_calls(rollouts), sum(len(rollout.transitions) for rollout in trained_rollouts(rollouts))
    with settings_of_a_person():
        table = table_from_branched_rollouts(rollouts, size=sum(len(rollout.transitions) for rollout in own), pairs=calls)
    path = table.tree.path_valid & (table.tree.path_rollout == [rollout.id for rollout in own].index(shown.id))
    mine = table.tree.path_node[path]  # calls that it repeats among them, as they are shared
    credit, advantage = assign(recipe, table)
    return Verdict(recipe, credit.kind, np.asarray(credit.value)[mine], np.asarray(advantage)[mine])


@functools.partial(jax.jit, static_argnums=0)
def assign(recipe: Recipe, table: TransitionTable) -> tuple[Credit, Array]:
    credit = recipe.credit(table, Evidence())
    return credit, recipe.advantage(table, credit, Evidence())


def list_lines(rollouts: Sequence[Rollout], place: Place, run: Path) -> Iterator[str]:
    """One line a rollout, and how to pick one."""
    yield f"{plural(len(rollouts), 'rollout')} of {place.phase}, iteration {place.iteration}:"
    wide = max(len("id"), *(len(rollout.id) for rollout in rollouts))
    yield f"  {'id':<{wide}}  {'status':<9}  reward  calls"
    for rollout in rollouts:
        reward = number(rollout.reward) if "reward" in rollout.outcome else "-"
        yield f"  {plain(rollout.id):<{wide}}  {rollout.status:<9}  {reward:>6}  {len(rollout.transitions):>5}"
    yield f"Pick one with: python -m lightningrl.show {run} --rollout=ID"
    yield ""


def rollout_lines(rollout: Rollout, group: Sequence[Rollout], verdicts: Sequence[Verdict], notes: Sequence[str]) -> Iterator[str]:
    """The rollout, call by call."""
    yield f"{plain(rollout.id)}: {rollout.status}, {plural(len(rollout.transitions), 'call')}"
    for name, value in rollout.outcome.items():
        yield from field(name, number(value))
    for name, value in rollout.task.input.items():
        yield from field(name, shown(value), lines=PROMPT_LINES)
    if rollout.task.target is not None:
        yield from field("target", shown(rollout.task.target), lines=PROMPT_LINES)
    if rollout.answer is not None:
        yield from field("answer", shown(rollout.answer), lines=PROMPT_LINES)
    others = " ".join(number(r.reward) for r in trained_rollouts(group))
    yield from field("group", f"{rollout.group}: {plural(len(group), 'rollout')}, rewards {others or '-'}")
    if rollout.parent is not None:
        yield from field("parent", f"{rollout.parent}, whose first {plural(int(rollout.metrics['replayed_calls']), 'call')} it repeats")
    if rollout.error:
        yield from field("error", rollout.error.strip().splitlines()[-1])
    for line in (*map(recipe_line, verdicts), *notes):
        yield from wrapped(line, "  ", "    ")
    for index, call in enumerate(sorted(rollout.transitions, key=lambda t: t.turn)):
        yield ""
        yield from call_lines(call, index, verdicts)


def call_lines(call: Transition, index: int, verdicts: Sequence[Verdict]) -> Iterator[str]:
    """What was asked and said, and what it earned."""
    remarks = [] if call.trainable else ["not trained"]
    remarks += ["cut off at max_tokens"] if call.finish_reason == "length" else []
    yield f"call {call.turn}, {plain(call.role)}" + "".join(f", {remark}" for remark in remarks)
    if call.messages:
        message = call.messages[-1]
        yield from field(str(message.get("role", "asked")), shown(message.get("content")), lines=PROMPT_LINES)
    yield from field("response", call.text)
    yield from field("reward", f"{number(call.reward)} (intermediate)")
    wide = max((len(v.recipe.name) for v in verdicts), default=0)
    for v in verdicts:
        credit, advantage = number(v.credit[index]), number(v.advantage[index])
        yield from field("earned", f"{v.recipe.name:<{wide}}  credit {credit:>6}  advantage {advantage:>6}")


def recipe_line(v: Verdict) -> str:
    recipe, already = v.recipe, " (an advantage already)" if v.kind == "advantage" else ""
    line = f"{recipe.name}: credit {describe(recipe.credit)}{already}, advantage {describe(recipe.advantage)}"
    if recipe.spread is not broadcast:
        line += f"; tokens then get theirs by {describe(recipe.spread)}"
    return line


def field(name: str, text: str, lines: int | None = None) -> Iterator[str]:
    """Text beside its name, in the width of the terminal; cut after some lines if said so."""
    first = f"  {plain(name):<{LABEL}}"
    first += "" if first.endswith(" ") else " "
    body = [line for part in (text.splitlines() or [""]) for line in wrapped(part, " " * len(first), " " * len(first))]
    if lines is not None and len(body) > lines:
        body = [*body[:lines], f"{' ' * len(first)}…"]
    yield first + body[0][len(first) :]
    yield from body[1:]


def wrapped(text: str, first: str, later: str) -> list[str]:
    width = max(40, min(140, shutil.get_terminal_size().columns))
    return textwrap.wrap(plain(text), width, initial_indent=first, subsequent_indent=later) or [first]


def plain(text: str) -> str:
    """Without what a terminal would obey: a model may write anything."""
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in text).expandtabs(4)


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def number(value: float) -> str:
    """Three decimals, none for whole numbers; what is exactly 0 is `0`, what is nearly so is not."""
    if value == round(value, 0) and abs(value) < 1e6:
        return f"{value + 0.0:.0f}"  # -0.0 + 0.0 is 0.0
    return f"{value:.3f}" if 0.001 <= abs(value) < 1e6 else f"{value:.1e}"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def show(run: Path, rollout_id: str | None, names: Sequence[str]) -> Iterator[str]:
    """All that the command prints.

    Raises:
        UserError: no such folder, store, rollout or recipe.
    """
    path = run / "rollouts.sqlite"
    if not run.is_dir():
        raise UserError(f"there is no folder {run}: give the folder of a run")
    if not path.is_file():
        raise UserError(f"{run} has no rollouts.sqlite: give the folder of a run, which has one as soon as an agent has run")
    with settings_of_a_person():
        recipes = [get_recipe(name) for name in (names or [run_recipe(run)])]
    with Store(path) as store:
        where = store.places()
        if not where:
            raise UserError(f"{path} has no rollouts yet: wait for the first one to end")
        if rollout_id is not None and rollout_id not in where:
            near = difflib.get_close_matches(rollout_id, where, n=3, cutoff=0.3)
            raise UserError(f"{run} has no rollout {rollout_id!r}; near it: {', '.join(near) or next(reversed(where))}")
        place = latest(where) if rollout_id is None else where[rollout_id]
        rollouts = store.read(place.phase, place.iteration)
        beside = {"train": "branch", "branch": "train"}.get(place.phase)
        related = [*rollouts, *(store.read(beside, place.iteration) if beside else [])]
    if rollout_id is None:
        yield from list_lines(rollouts, place, run)
        rollout = most_telling(rollouts)
    else:
        (rollout,) = (each for each in rollouts if each.id == rollout_id)

    verdicts, notes = [], []
    if trained_rollouts([rollout]):
        for recipe in recipes:
            try:
                verdicts.append(verdict(recipe, related, rollout))
            except UserError as error:
                notes.append(f"{error}.")
    elif rollout.transitions:
        notes.append(f"A rollout that {rollout.status.replace('_', ' ')} is in no statistic and earns no credit.")
    yield from rollout_lines(rollout, [each for each in rollouts if each.group == rollout.group], verdicts, notes)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lightningrl.show", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="folder of a run")
    parser.add_argument("--rollout", metavar="ID", help="which one; without it, the last iteration is listed and one is shown")
    parser.add_argument("--recipe", metavar="NAME[,NAME…]", default="", help="whose credit and advantage; by default the run's own")
    given = parser.parse_args(arguments)
    try:
        for line in show(given.run, given.rollout, [name for name in given.recipe.split(",") if name]):
            print(line)
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` ends it without a traceback
    sys.exit(main())
