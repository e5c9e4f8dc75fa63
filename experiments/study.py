"""Task × recipe × seed: a study of one's own, or one of the paper's, as one command that can be stopped and gone on with.

    python -m experiments.study --task=sql --recipes=lightningrl,gigpo,ppo --seeds=3 --out=runs/study
    python -m experiments.study --task=sql --recipes=lightningrl,lightningrl@writer,lightningrl@writer+rewriter --out=runs/roles
    python -m experiments.study --task=all --recipes=lightningrl,rft,more_supervised --seeds=5 --out=runs/baselines
    python -m experiments.study --recipes=lightningrl,gigpo,vineppo --rollouts=9000 --settings=iterations=60 --out=runs/credit

What is compared is a recipe; `RECIPE@ROLE+ROLE` trains the calls of those roles only, and `more_supervised` spends what the first
recipe computed on more supervised steps. `--rollouts` ends every run when it has run so many, branched ones counted. Each cell is
the experiment's own command, from one warm start for a task and seed. A cell that is done is a file in OUT/cells, and is not run again.
Without OUT/runs a seed's warm start is made anew, on another machine with other rounding: keep them until a seed has all its recipes.
OUT/report.md, results.json and the figures are written anew after every cell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tqdm

from experiments import math_tool, multi_hop_qa, text_to_sql
from experiments.study_report import MORE_SUPERVISED, Cell, Point, write_report
from experiments.training import SMOKE, check_roles, equal_compute_steps, write_whole
from lightningrl import flags
from lightningrl.config import setting
from lightningrl.errors import UserError, settings_of_a_person
from lightningrl.metrics import read_metrics
from lightningrl.recipes import get_recipe

TASKS: Mapping[str, Any] = {"sql": text_to_sql, "qa": multi_hop_qa, "math": math_tool}
MANIFEST = ("commit", "machine", "python", "versions")
OWN = ("out", "seed", "recipe", "train_roles", "policy", "rollout_budget")  # settings that a study makes
LENGTH = ("iterations", "tasks_per_iteration", "rollouts_per_task")  # settings that say how many rollouts a run has at least
TUNING_SEED = 1000  # for choosing settings, and never reported


@dataclasses.dataclass(frozen=True)
class Config:
    task: str = setting("sql", "sql, qa, math, several of them comma-separated, or all")
    recipes: tuple[str, ...] = setting(("lightningrl", "reinforce_pp", "gigpo", "ppo"), "what is compared with the first of them")
    seeds: int = setting(3, "runs of each")
    first_seed: int = setting(0, "the first of these seeds")
    rollouts: int = setting(0, "ends every run after the iteration in which it has run as many, extra ones counted; 0: iterations do")
    settings: tuple[str, ...] = setting((), "settings of every run, as NAME=VALUE, comma-separated")
    grid: tuple[str, ...] = setting((), "settings tried for every recipe on a seed of its own, as NAME=VALUE or several joined with +")
    out: str = setting("runs/study", "folder for the results; a study that is there already goes on")
    minutes: float = setting(0.0, "no run is begun after this time; 0: all are")
    smoke: bool = setting(False, "the same path with very little training")


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of an experiment's command."""

    task: str
    arm: str
    seed: int
    variant: str = ""  # of a grid

    @property
    def place(self) -> Path:
        return Path(self.task) / (f"{self.arm}+{self.variant}" if self.variant else self.arm) / f"seed{self.seed}"


def main() -> None:
    config = flags.config_from_flags(Config)
    config = dataclasses.replace(config, settings=with_lists(config.settings), grid=with_lists(config.grid))
    tasks = chosen_tasks(config.task)
    check(config, tasks)
    out = Path(config.out)
    same_study(out, config)
    jobs = tuning_jobs(config, tasks) + [
        Job(task, arm, config.first_seed + i) for task in tasks for i in range(config.seeds) for arm in config.recipes
    ]
    end = time.monotonic() + 60 * config.minutes if config.minutes else float("inf")
    left = [job for job in jobs if not cell_path(out, job).exists()]
    live = sys.stderr.isatty()
    with tqdm.tqdm(total=len(jobs), initial=len(jobs) - len(left), unit="run", smoothing=0.0, disable=not live) as bar:
        for job in left:
            if time.monotonic() > end:
                print(f"\n{config.minutes:g} minutes are over: the same command goes on with the other runs", file=sys.stderr)
                break
            bar.set_description(str(job.place), refresh=True)
            run_cell(config, out, job, bar)
            report(config, out, tasks)
            if not live:
                print(f"{job.place}: {read_cell(out, job).curve[-1].heldout_reward:.3f}", file=sys.stderr, flush=True)
    report(config, out, tasks)
    print((out / "report.md").read_text())


def with_lists(texts: Sequence[str]) -> tuple[str, ...]:
    """NAME=VALUE each, where a value may have been a list, which the flag took apart at its commas too."""
    whole: list[str] = []
    for text in texts:
        if "=" in text or not whole:
            whole.append(text)
        else:
            whole[-1] += f",{text}"
    return tuple(whole)


def chosen_tasks(text: str) -> tuple[str, ...]:
    names = tuple(TASKS) if text == "all" else tuple(text.split(","))
    for name in names:
        if name not in TASKS:
            raise UserError(f"there is no task {name!r}: choose among {', '.join(TASKS)}, or all")
    return names


def check(config: Config, tasks: Sequence[str]) -> None:
    """Refuses what can be seen to be wrong before the first run starts."""
    if config.first_seed <= TUNING_SEED < config.first_seed + config.seeds:
        raise UserError(f"seed {TUNING_SEED} is for choosing settings: report others")
    if not config.recipes or config.seeds < 1:
        raise UserError("a study needs at least one recipe and one seed")
    if config.recipes[0] == MORE_SUPERVISED:
        raise UserError(f"{MORE_SUPERVISED} spends what the first recipe computed, so a recipe has to come first")
    if len(set(config.recipes)) < len(config.recipes):
        raise UserError("a recipe is given twice")
    with settings_of_a_person():
        for recipe, roles in map(parts_of, arms_of(config)):
            get_recipe(recipe)
            for task in tasks:
                check_roles(roles, TASKS[task].EXPERIMENT)
    choices = [part for choice in config.grid for part in choice.split("+")]
    for text in (*config.settings, *choices):
        name, equals, _ = text.partition("=")
        for task in tasks:
            if not equals or name not in {field.name for field in dataclasses.fields(TASKS[task].Config)}:
                raise UserError(f"{text!r} is no NAME=VALUE of a setting of {TASKS[task].__name__}: its --help lists them")
        if name in OWN or (name == "iterations" and text in choices):
            raise UserError(f"{name} is what a study sets itself, or what its runs are compared at: leave {text!r} out")
    if config.rollouts < 0:
        raise UserError(f"rollouts={config.rollouts} must be at least 0")
    for task in tasks if config.rollouts else ():
        for choice in config.grid or ("",):
            check_length(config, TASKS[task], settings_of(config, task) | settings_in(choice.split("+")))


def arms_of(config: Config) -> list[str]:
    """What is trained with reinforcement learning."""
    return [arm for arm in config.recipes if arm != MORE_SUPERVISED]


def parts_of(arm: str) -> tuple[str, list[str]]:
    """The recipe, and the roles that are trained; none named: all."""
    recipe, at, roles = arm.partition("@")
    return recipe, roles.split("+") if at else []


def check_length(config: Config, module: Any, settings: Mapping[str, str]) -> None:
    """Refuses iterations that end before the rollouts do: runs would not be compared at equal numbers of them."""
    with settings_of_a_person():
        iterations, *each = (int(settings.get(name, getattr(module.Config(), name))) for name in LENGTH)
    if iterations * math.prod(each) < config.rollouts:
        needed = -(-config.rollouts // math.prod(each))
        raise UserError(
            f"{iterations} iterations of {module.__name__} end before {config.rollouts} rollouts: give --settings=iterations={needed}"
        )


def settings_in(texts: Sequence[str]) -> dict[str, str]:
    return dict(text.split("=", 1) for text in texts if text)


def settings_of(config: Config, task: str) -> dict[str, str]:
    """What all runs of a task are given."""
    small = SMOKE | dict(TASKS[task].EXPERIMENT.smoke) if config.smoke else {}
    budget = {"rollout_budget": str(config.rollouts)} if config.rollouts else {}
    return {name: str(value) for name, value in small.items()} | settings_in(config.settings) | budget


def same_study(out: Path, config: Config) -> None:
    """Refuses to mix runs of different settings in one folder; which recipes, tasks and seeds there are may grow."""
    path = out / "study.json"
    ours = {"settings": sorted(config.settings), "grid": sorted(config.grid), "smoke": config.smoke, "first": config.recipes[0]}
    ours |= {"rollouts": config.rollouts} if config.rollouts else {}
    if path.exists() and (theirs := json.loads(path.read_text())) != ours:
        raise UserError(f"{out} holds a study of other settings ({theirs}, now {ours}): give another --out or the same settings")
    write_whole(path, json.dumps(ours, indent=1) + "\n")


def tuning_jobs(config: Config, tasks: Sequence[str]) -> list[Job]:
    """Each recipe with each choice of the grid, on a seed that is not reported."""
    return [Job(task, arm, TUNING_SEED, choice) for task in tasks for arm in arms_of(config) for choice in config.grid]


def best_choice(config: Config, out: Path, job: Job) -> list[str]:
    """Settings of the grid with which the recipe came furthest on the tuning seed; of equals the first."""
    if job.variant or not config.grid or job.arm == MORE_SUPERVISED:
        return job.variant.split("+") if job.variant else []
    cells = [read_cell(out, Job(job.task, job.arm, TUNING_SEED, choice)) for choice in config.grid]
    return max(zip(cells, config.grid, strict=True), key=lambda pair: pair[0].curve[-1].heldout_reward)[1].split("+")


def run_cell(config: Config, out: Path, job: Job, bar: tqdm.tqdm) -> None:
    """Runs a cell, after the warm start that it shares with others, and writes down what came of it."""
    start = out / "runs" / Job(job.task, "start", job.seed).place
    module = TASKS[job.task]
    settings = settings_of(config, job.task)
    common = [f"--seed={job.seed}", *(f"--{name}={value}" for name, value in settings.items())]
    if not (start / "summary.json").exists():
        run(module, start, [*common, "--iterations=0"], bar, 0)
    folder = out / "runs" / job.place
    if job.arm == MORE_SUPERVISED:
        steps = int(settings.get("imitation_steps", module.Config().imitation_steps))
        steps += read_cell(out, dataclasses.replace(job, arm=config.recipes[0])).equal_compute_steps
        own = ["--iterations=0", f"--imitation_steps={steps}"]
    else:
        recipe, roles = parts_of(job.arm)
        chosen = [f"--{text}" for text in best_choice(config, out, job)]
        own = [f"--policy={start / 'start'}", "--imitation_steps=0", f"--recipe={recipe}", *chosen]
        own += [f"--train_roles={','.join(roles)}"] if roles else []
    command = run(module, folder, [*common, *own], bar, 1)
    write_whole(cell_path(out, job), json.dumps(dataclasses.asdict(cell_of(job, folder, command)), indent=1) + "\n")


def run(module: Any, folder: Path, own: Sequence[str], bar: tqdm.tqdm, share: float) -> list[str]:
    """Runs an experiment's command in a process of its own, and moves the bar on with its iterations.

    Returns:
      the command.

    Raises:
      UserError: it failed; where its output is.
    """
    command = ["-m", module.__name__, f"--out={folder}", *own]
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "output.log"
    begun = bar.n
    with log.open("a") as file, stopped_with_us([sys.executable, *command], file) as process:
        while process.poll() is None:
            time.sleep(0.5)
            rows = read_metrics(folder)
            if share and rows:
                bar.n = begun + share * min(part_done(folder, rows[-1]), 0.99)
                bar.set_postfix_str(f"reward {rows[-1].get('train_reward', rows[0]['heldout_reward']):.3f}")
    if process.returncode:
        said = log.read_text().strip().splitlines()
        raise UserError(f"python {' '.join(command)} failed ({said[-1] if said else 'it said nothing'}); its output is in {log}")
    bar.n = begun + share
    bar.refresh()
    return ["python", *command]


def part_done(folder: Path, row: Mapping[str, Any]) -> float:
    """How much of a run is done after the iteration of this line of its metrics."""
    config = json.loads((folder / "manifest.json").read_text())["config"]
    if budget := config.get("rollout_budget"):
        return row["rollouts_so_far"] / budget
    return row["iteration"] / max(config["iterations"], 1)


@contextlib.contextmanager
def stopped_with_us(command: Sequence[str], log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process of a group of its own, so that Ctrl-C reaches it once, from here; it is waited for, so that it can save its work.

    SIGTERM, which a batch system sends before it kills, is taken for Ctrl-C.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait()
        signal.signal(signal.SIGTERM, before)


def cell_of(job: Job, folder: Path, command: list[str]) -> Cell:
    """What a finished run came to."""
    rows = read_metrics(folder)
    summary, manifest = (json.loads((folder / name).read_text()) for name in ("summary.json", "manifest.json"))
    curve = [
        Point(row["iteration"], row["rollouts_so_far"], row["tokens_so_far"], row["heldout_reward"], row.get("unseen_reward"))
        for row in rows
        if "heldout_reward" in row
    ]
    return Cell(
        task=job.task,
        arm=job.arm,
        seed=job.seed,
        variant=job.variant,
        command=command,
        curve=curve,
        train_reward=[row["train_reward"] for row in rows if "train_reward" in row],
        equal_compute_steps=equal_compute_steps(rows),
        heldout_questions=summary["heldout_questions"],
        seconds=summary["seconds"],
        made_with={name: manifest[name] for name in MANIFEST},
    )


def cell_path(out: Path, job: Job) -> Path:
    return out / "cells" / f"{job.place}.json"


def read_cell(out: Path, job: Job) -> Cell:
    fields = json.loads(cell_path(out, job).read_text())
    return Cell(**{**fields, "curve": [Point(**point) for point in fields["curve"]]})


def report(config: Config, out: Path, tasks: Sequence[str]) -> None:
    """Writes the report of all that is done: what was asked for in its order, then what other commands have left in OUT."""
    files = (out / "cells").glob("*/*/seed*.json")
    jobs = [Job(path.parts[-3], path.parts[-2], int(path.stem.removeprefix("seed"))) for path in files]
    done = [job for job in jobs if job.seed != TUNING_SEED]
    order = {name: i for i, name in enumerate((*tasks, *config.recipes))}
    done.sort(key=lambda job: (order.get(job.task, len(order)), job.task, order.get(job.arm, len(order)), job.arm, job.seed))
    write_report(out, [read_cell(out, job) for job in done], command_of(config))


def command_of(config: Config) -> str:
    """The command line that makes the study, without the defaults."""
    given = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default and field.name != "minutes"
    }
    texts = [f"--{name}={','.join(value) if isinstance(value, tuple) else value}" for name, value in given.items()]
    return " ".join(["python -m experiments.study", *texts])


if __name__ == "__main__":
    flags.define_flags(Config)
    flags.run_app(main)
