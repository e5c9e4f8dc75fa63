"""A study: what it refuses, what it runs, and that it goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import study, text_to_sql
from experiments.study import TUNING_SEED, Config, Job, cell_of, check, chosen_tasks, command_of, same_study, tuning_jobs
from experiments.study_report import MORE_SUPERVISED, Cell, Point
from lightningrl.errors import UserError
from tests.runtime.running import until

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"recipes": ("lightningrl", "gigpoo")}, "gigpoo"),
        ({"recipes": ()}, "at least one recipe"),
        ({"seeds": 0}, "at least one recipe and one seed"),
        ({"first_seed": 998, "seeds": 3}, "seed 1000 is for choosing settings"),
        ({"recipes": (MORE_SUPERVISED, "lightningrl")}, "a recipe has to come first"),
        ({"recipes": ("gigpo", "gigpo")}, "given twice"),
        ({"settings": ("learning_rat=1e-3",)}, "no NAME=VALUE of a setting of experiments.text_to_sql"),
        ({"settings": ("controls",)}, "no NAME=VALUE"),
        ({"settings": ("seed=3",)}, "what a study sets itself"),
        ({"grid": ("learning_rate=1e-3+iterations=5",)}, "no NAME=VALUE|what its runs are compared at"),
        ({"grid": ("iterations=5",)}, "what its runs are compared at"),
        ({"settings": ("rollout_budget=5",)}, "what a study sets itself"),
        ({"recipes": ("lightningrl", "lightningrl@writer+cheker")}, "no role 'cheker': choose among writer, checker, rewriter$"),
        ({"recipes": ("lightningrl@",)}, "no role ''"),
        ({"recipes": ("lightningrl", f"{MORE_SUPERVISED}@writer")}, f"no recipe '{MORE_SUPERVISED}'"),
        ({"rollouts": -1}, "rollouts=-1 must be at least 0"),
        ({"rollouts": 8641}, "^45 iterations of experiments.text_to_sql end before 8641 rollouts: give --settings=iterations=46$"),
        ({"rollouts": 8640, "grid": ("rollouts_per_task=8", "rollouts_per_task=4")}, "iterations=90"),
        ({"rollouts": 100, "settings": ("iterations=x",)}, "'x'"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(changes: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check(dataclasses.replace(Config(), **changes), ("sql",))


def test_every_run_of_a_study_gets_its_rollouts() -> None:
    config = Config(rollouts=8640, settings=("learning_rate=1e-3",), recipes=("lightningrl", "lightningrl@writer+rewriter"))
    check(config, ("sql",))
    assert study.settings_of(config, "sql") == {"learning_rate": "1e-3", "rollout_budget": "8640"}
    assert study.parts_of("lightningrl@writer+rewriter") == ("lightningrl", ["writer", "rewriter"])
    assert command_of(config).endswith("--rollouts=8640 --settings=learning_rate=1e-3")


def test_tasks_by_name() -> None:
    assert chosen_tasks("all") == ("sql", "qa", "math") and chosen_tasks("math,sql") == ("math", "sql")
    with pytest.raises(UserError, match="there is no task 'go': choose among sql, qa, math"):
        chosen_tasks("sql,go")


def test_a_setting_may_be_a_list() -> None:
    assert study.with_lists(("intermediate=tool_error", "better_draft", "seed=3")) == ("intermediate=tool_error,better_draft", "seed=3")
    assert study.with_lists(("controls", "x=1")) == ("controls", "x=1")


def test_a_folder_holds_one_study(tmp_path: Path) -> None:
    same_study(tmp_path, Config())
    same_study(tmp_path, Config(recipes=("lightningrl", "rft"), seeds=5, minutes=3.0, task="all"))
    for other in (Config(settings=("iterations=5",)), Config(rollouts=5)):
        with pytest.raises(UserError, match="holds a study of other settings"):
            same_study(tmp_path, other)


def test_the_command_of_a_study_makes_it_again() -> None:
    config = Config(task="qa", recipes=("lightningrl", "rft"), settings=("iterations=5", "eval_every=5"), minutes=9.0)
    assert command_of(config) == "python -m experiments.study --task=qa --recipes=lightningrl,rft --settings=iterations=5,eval_every=5"


def write_cell(out: Path, job: Job, reward: float) -> None:
    made_with = {"commit": "c", "machine": "m", "python": "3", "versions": {}}
    made = Cell(job.task, job.arm, job.seed, job.variant, [], [Point(0, 0, 0, reward)], [], 1, 8, 1.0, made_with)
    path = study.cell_path(out, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(made)))


def test_every_recipe_gets_the_same_grid_and_its_own_best(tmp_path: Path) -> None:
    config = Config(recipes=("lightningrl", "gigpo", MORE_SUPERVISED), grid=("learning_rate=2e-4", "learning_rate=1e-3"))
    jobs = tuning_jobs(config, ("sql",))
    assert [(job.arm, job.variant) for job in jobs] == [(arm, choice) for arm in ("lightningrl", "gigpo") for choice in config.grid]
    assert {job.seed for job in jobs} == {study.TUNING_SEED}
    for job, reward in zip(jobs, (0.4, 0.6, 0.5, 0.3), strict=True):
        write_cell(tmp_path, job, reward)
    best = [study.best_choice(config, tmp_path, Job("sql", arm, 0)) for arm in config.recipes]
    assert best == [["learning_rate=1e-3"], ["learning_rate=2e-4"], []]


def test_a_cell_has_what_its_run_has_counted(tmp_path: Path) -> None:
    rows = [
        {"iteration": 0, "rollouts_so_far": 0, "tokens_so_far": 0, "heldout_reward": 0.2},
        {"iteration": 1, "rollouts_so_far": 24, "tokens_so_far": 4000, "train_reward": 0.3, "trained_tokens": 1000},
        {"iteration": 2, "rollouts_so_far": 50, "tokens_so_far": 8576, "train_reward": 0.4, "trained_tokens": 1000}
        | {"heldout_reward": 0.5, "unseen_reward": 0.1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "summary.json").write_text(json.dumps({"heldout_questions": 8, "seconds": 5.0}))
    (tmp_path / "manifest.json").write_text(json.dumps({name: "x" for name in study.MANIFEST}))
    cell = cell_of(Job("sql", "gigpo", 3), tmp_path, ["python"])
    assert cell.curve == [Point(0, 0, 0, 0.2), Point(2, 50, 8576, 0.5, 0.1)] and cell.train_reward == [0.3, 0.4]
    assert cell.equal_compute_steps == round((4 * 2000 + 8576) / (3 * 4096))


def test_the_report_is_of_all_that_is_there(tmp_path: Path) -> None:
    """A second command for one task takes nothing out of the report of the first."""
    for job in (Job("sql", "lightningrl", 0), Job("qa", "gigpo", 3), Job("qa", "lightningrl", 3), Job("sql", "lightningrl", TUNING_SEED)):
        write_cell(tmp_path, job, 0.5)
    study.report(Config(task="qa", recipes=("lightningrl",), seeds=1), tmp_path, ("qa",))
    tasks = json.loads((tmp_path / "results.json").read_text())["tasks"]
    assert {task: {arm: x["seeds"] for arm, x in of_task["arms"].items()} for task, of_task in tasks.items()} == {
        "qa": {"lightningrl": [3], "gigpo": [3]},
        "sql": {"lightningrl": [0]},
    }
    assert list(tasks) == ["qa", "sql"] and list(tasks["qa"]["arms"]) == ["lightningrl", "gigpo"]


TINY = "iterations=2,eval_every=1"
TINY += ",heldout_questions=4,questions=40,demonstrations=40,tasks_per_iteration=2,rollouts_per_task=2,unseen_databases=0"
TINY += ",databases=1,reading_steps=2,imitation_steps=2,hidden_size=32,num_layers=1,intermediate_size=32,vocab_size=512,max_tokens=8"
TINY += ",context_length=512"


@pytest.mark.slow
def test_a_study_stopped_by_ctrl_c_goes_on_and_runs_nothing_twice(tmp_path: Path) -> None:
    settings = f"{TINY},cache={tmp_path / 'cache'}"
    arms = f"lightningrl,lightningrl@writer,spo_tree,{MORE_SUPERVISED}"
    command = [
        sys.executable,
        "-m",
        "experiments.study",
        "--recipes",
        arms,
        "--seeds=1",
        "--smoke",
        "--rollouts=8",
        f"--settings={settings}",
        f"--out={tmp_path}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    first = tmp_path / "cells" / "sql" / "lightningrl" / "seed0.json"
    deadline = time.monotonic() + 300
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "interrupted" in said
    kept = first.stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == kept and "| `lightningrl@writer` | 1 |" in done.stdout
    cells = [json.loads(path.read_text()) for path in (tmp_path / "cells").rglob("lightningrl*/seed0.json")]
    assert len(cells) == 2 and len({cell["curve"][0]["heldout_reward"] for cell in cells}) == 1
    assert all([point["rollouts"] for point in cell["curve"]] == [0, 4, 8] for cell in cells)
    manifest = json.loads((tmp_path / "runs" / "sql" / "lightningrl@writer" / "seed0" / "manifest.json").read_text())
    assert manifest["settings"]["train_roles"] == ["writer"]
    tree = json.loads((tmp_path / "cells" / "sql" / "spo_tree" / "seed0.json").read_text())["curve"]
    assert [(point["iteration"], point["rollouts"]) for point in tree] == [(0, 0), (1, 12)]  # and no second iteration
    refused = subprocess.run([*command, "--settings=iterations=2"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1 and "holds a study of other settings" in refused.stderr


@pytest.mark.slow
def test_a_run_that_fails_says_where_its_output_is(tmp_path: Path) -> None:
    with study.tqdm.tqdm(total=1, disable=True) as bar, pytest.raises(UserError, match=r"no such file.*output.log"):
        study.run(text_to_sql, tmp_path, [f"--data_dir={tmp_path / 'none'}"], bar, 1)


PROGRAM = """
import subprocess, sys
from experiments.study import stopped_with_us

run = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); print('runs', flush=True); time.sleep(100)"
with open(sys.argv[1], "wb") as log, stopped_with_us([sys.executable, "-c", run], log) as process:
    print(process.pid, flush=True)
    process.wait()
"""


def test_a_study_that_is_terminated_ends_its_run_too(tmp_path: Path) -> None:
    log = tmp_path / "output.log"
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(log)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as it:
        assert it.stdout is not None
        run = int(it.stdout.readline())
        until(lambda: "runs" in log.read_text())
        it.terminate()
        _, said = it.communicate(timeout=60)
    assert said.strip().endswith("KeyboardInterrupt") and "KeyboardInterrupt" in log.read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(run, 0)
