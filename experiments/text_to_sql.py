"""Trains the LangGraph text-to-SQL agent: the quickstart's job, every setting a flag.

    python -m experiments.text_to_sql --out=runs/sql                            # on databases that it builds itself
    python -m experiments.text_to_sql --out=runs/mine --database=mine.sqlite    # on a database of one's own
    python -m experiments.text_to_sql --out=runs/spider --data_dir=SPIDER --policy=DIR

The reward is execution match and nothing else. Held-out questions are never trained on, nor shown in the warm start.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.agents import sql_langgraph
from lightningrl import flags
from lightningrl.config import FitConfig, setting
from lightningrl.distributed import from_first, is_first, joined
from lightningrl.errors import UserError
from lightningrl.fit import Fitted, fit
from lightningrl.runtime.store import Store
from lightningrl.tasks.text_to_sql.databases import build_databases
from lightningrl.tasks.text_to_sql.demonstrations import Habits, Prompts, demonstrate, run_as_text
from lightningrl.tasks.text_to_sql.metric import execution_match
from lightningrl.tasks.text_to_sql.questions import Question, generate_questions, split_questions
from lightningrl.tasks.text_to_sql.spider import accuracy_by_hardness, load_spider
from lightningrl.types import Rollout, Task
from lightningrl.warm_start import Demonstration

PROMPTS = Prompts(
    writer_system=sql_langgraph.WRITER_SYSTEM,
    writer_request=sql_langgraph.WRITER_REQUEST,
    checker_system=sql_langgraph.CHECKER_SYSTEM,
    checker_request=sql_langgraph.CHECKER_REQUEST,
    rewriter_request=sql_langgraph.REWRITE_REQUEST,
    max_drafts=sql_langgraph.MAX_DRAFTS,
)


@dataclasses.dataclass(frozen=True)
class Config(FitConfig):
    """The quickstart's settings."""

    out: str = setting("runs/text_to_sql", "folder for everything the run leaves; a run that is there already goes on", free=True)
    database: str | None = setting(None, "a SQLite file to learn about; none: generated databases")
    data_dir: str | None = setting(None, "Spider in its official layout: dev.json, train_spider.json, tables.json, database/")
    databases: int = setting(3, "generated databases to train on")
    unseen_databases: int = setting(3, "generated databases, of other domains, to evaluate on only")
    questions: int = setting(2400, "questions, training and held-out together")
    heldout_questions: int = setting(240, "of those, held out")
    unseen_questions: int = setting(60, "questions about unseen databases")
    demonstrations: int = setting(6000, "runs of the imperfect demonstrator that the warm start imitates")
    smoke: bool = setting(False, "the same path with very little training")
    controls: bool = setting(False, "also run the controls: more supervised steps, and shuffled rewards", free=True)
    seconds_install: float = setting(0.0, "what installation took, for summary.json", free=True)
    started: float = setting(0.0, "when the whole began, seconds since the epoch; 0: now", free=True)


SMOKE: dict[str, Any] = {
    "iterations": 2,
    "tasks_per_iteration": 6,
    "rollouts_per_task": 4,
    "eval_every": 2,
    "databases": 2,
    "unseen_databases": 1,
    "questions": 200,
    "heldout_questions": 16,
    "unseen_questions": 4,
    "demonstrations": 200,
    "reading_steps": 15,
    "imitation_steps": 15,
}


@dataclasses.dataclass(frozen=True)
class Data:
    """Questions by use."""

    train: Sequence[Question]
    heldout: Sequence[Question]
    unseen: Sequence[Question]  # about databases that are never trained on


def load_data(config: Config, folder: Path) -> Data:
    """The questions that the settings ask for; generated databases are written into `folder`."""
    if config.database and config.data_dir:
        raise UserError("give --database or --data_dir, not both")
    if config.data_dir:
        dev = load_spider(config.data_dir, "dev")
        return Data(load_spider(config.data_dir, "train"), dev[: config.heldout_questions], ())
    if config.database:
        questions = generate_questions(config.database, config.seed, config.questions)
        if len(questions) < 2 * config.heldout_questions:  # a small file: keep at least as much to train on
            config = dataclasses.replace(config, heldout_questions=max(1, len(questions) // 3))
        train, heldout = split_questions(questions, config.heldout_questions, config.seed)
        return Data(train, heldout, ())
    seen = build_databases(folder / "databases", config.seed, config.databases)
    questions = questions_about(seen, config.seed, config.questions)
    train, heldout = split_questions(questions, config.heldout_questions, config.seed)
    if not config.unseen_databases:
        return Data(train, heldout, ())
    unseen = build_databases(folder / "databases", config.seed, config.unseen_databases, unseen=True)
    return Data(train, heldout, questions_about(unseen, config.seed, config.unseen_questions))


def same_data(config: Config, folder: Path) -> Data:
    """The questions that process 0 loads, at every process: one builds the databases."""

    def load() -> Any:
        data = load_data(config, folder)
        return {use: [dataclasses.asdict(q) for q in getattr(data, use)] for use in ("train", "heldout", "unseen")}

    def question(fields: dict[str, Any]) -> Question:
        return Question(**{**fields, "wrong": tuple((kind, sql) for kind, sql in fields["wrong"])})

    return Data(**{use: [question(fields) for fields in questions] for use, questions in from_first(load).items()})


def questions_about(databases: Sequence[Path], seed: int, count: int) -> list[Question]:
    """Equal shares about each database."""
    return [q for path in databases for q in generate_questions(path, seed, -(-count // len(databases)))][:count]


def task_of(question: Question) -> Task:
    """What the agent sees, and the gold query that only the reward sees."""
    seen = {"question": question.question, "schema": question.schema, "database": question.database}
    return Task(question.id, seen, {"gold": question.gold, "hardness": question.hardness, "kind": question.kind})


def reward(task: dict[str, Any], target: Any, answer: Any) -> float:
    """Execution match: 1 if the query gives what the gold query gives, else 0."""
    return float(isinstance(answer, str) and execution_match(target["gold"], answer, task["database"]))


def demonstrations_for(questions: Sequence[Question], config: Config) -> list[Demonstration]:
    """Runs of the imperfect demonstrator, each question as often as any other."""
    rng = np.random.default_rng([config.seed, 1])
    usable = [q for q in questions if q.wrong]
    if not usable:
        return []
    return [demonstrate(usable[i % len(usable)], PROMPTS, rng, Habits()) for i in range(config.demonstrations)]


def data_hash(data: Data) -> str:
    """Of questions, gold queries and the bytes of the databases."""
    digest = hashlib.sha256()
    for questions in (data.train, data.heldout, data.unseen):
        digest.update(json.dumps([[q.question, q.gold, q.schema] for q in questions]).encode())
    for path in sorted({q.database for questions in (data.train, data.heldout, data.unseen) for q in questions}):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def run(config: Config, data: Data, demonstrations: Sequence[Demonstration], alter: Any = None) -> Fitted:
    """One training run of the agent."""
    heldout = {"heldout": [task_of(q) for q in data.heldout]}
    if data.unseen:
        heldout["unseen"] = [task_of(q) for q in data.unseen]
    return fit(
        functools.partial(sql_langgraph.answer, execute=run_as_text),
        [task_of(q) for q in data.train],
        reward,
        config,
        heldout=heldout,
        demonstrations=demonstrations,
        data_hash=data_hash(data),
        **({} if alter is None else {"alter": alter}),
    )


def shuffled_rewards(rollouts: Sequence[Rollout], iteration: int) -> list[Rollout]:
    """The same rewards, handed to the wrong rollouts: whatever is learned from them is not from reward."""
    ok = [i for i, rollout in enumerate(rollouts) if rollout.status == "ok"]
    order = np.random.default_rng([iteration, 2]).permutation(len(ok))
    changed = list(rollouts)
    for i, j in zip(ok, order, strict=True):
        changed[i] = dataclasses.replace(rollouts[i], outcome=rollouts[ok[j]].outcome)
    return changed


def run_controls(config: Config, data: Data, demonstrations: Sequence[Demonstration], main: Fitted) -> dict[str, Any]:
    """The same compute spent on more supervised steps, and the same training with shuffled rewards."""
    before = main.metrics[0]["heldout_reward"]
    steps = config.imitation_steps + equal_compute_steps(main)
    more = dataclasses.replace(config, out=f"{config.out}/controls/more_supervised", iterations=0, imitation_steps=steps)
    supervised = run(more, data, demonstrations).metrics[-1]["heldout_reward"]
    shuffled = dataclasses.replace(config, out=f"{config.out}/controls/shuffled_rewards")
    shuffled_reward = run(shuffled, data, demonstrations, shuffled_rewards).metrics[-1]["heldout_reward"]
    return {
        "more_supervised": {"steps": steps, "heldout_reward": supervised, "gain": supervised - before},
        "shuffled_rewards": {"heldout_reward": shuffled_reward, "gain": shuffled_reward - before},
    }


def equal_compute_steps(fitted: Fitted) -> int:
    """Supervised updates that compute as much as all of RL did: a trained token is a forward and a backward pass (3 forward
    passes), a scored, read or sampled one a forward pass."""
    rows = [row for row in fitted.metrics if row["iteration"] > 0]
    passes = sum(4 * row["trained_tokens"] + row["prompt_tokens"] + row["response_tokens"] for row in rows)
    return round(passes / (3 * 4096))


def print_transcripts(out: Path, iteration: int, title: str, count: int = 3) -> None:
    """A few held-out rollouts, call by call."""
    print(f"\n{title}")
    with Store(out / "rollouts.sqlite") as store:
        rollouts = sorted(store.read("heldout", iteration), key=lambda r: hashlib.sha256(r.task.id.encode()).digest())
    for rollout in rollouts[:count]:
        print(f"\n  {rollout.task.input['question']}")
        for call in rollout.transitions:
            print(f"    {call.role:<9}{' '.join(call.text.split())}")
        print(f"    {'gold':<9}{rollout.task.target['gold']}\n    {'reward':<9}{rollout.outcome.get('reward')}")


def summarize(config: Config, data: Data, fitted: Fitted, controls: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
    """What summary.json says."""
    first, last = fitted.metrics[0], fitted.metrics[-1]
    rows = [row for row in fitted.metrics if row["iteration"] > 0]
    summary = {
        "heldout_reward_before": first["heldout_reward"],
        "heldout_reward_after": last["heldout_reward"],
        "heldout_questions": len(data.heldout),
        "seconds": seconds,
        "seconds_install": config.seconds_install,
        "seed": config.seed,
        "iterations": last["iteration"],
        "rollouts": sum(row["rollouts"] for row in rows),
        "tokens": sum(row["prompt_tokens"] + row["response_tokens"] for row in rows),
        "controls": controls,
        "continuing_calls": sum(row["continuing_calls"] for row in rows),
        "continuing_calls_exact": sum(row["continuing_calls_exact"] for row in rows),
        "logprob_gap_max": max((row["logprob_gap_max"] for row in rows), default=None),
        "logprob_gap_mean": max((row["logprob_gap_mean"] for row in rows), default=None),
        "train_questions": len(data.train),
        "by_hardness_after": by_hardness(fitted, data, last["iteration"]),
    }
    if data.unseen:
        summary |= {
            "unseen_reward_before": first["unseen_reward"],
            "unseen_reward_after": last["unseen_reward"],
            "unseen_questions": len(data.unseen),
        }
    return summary


def by_hardness(fitted: Fitted, data: Data, iteration: int) -> dict[str, Any]:
    """Held-out accuracy of the last evaluation by Spider's levels."""
    with Store(fitted.out / "rollouts.sqlite") as store:
        right = {r.task.id: r.outcome.get("reward") == 1.0 for r in store.read("heldout", iteration)}
    return dict(accuracy_by_hardness(data.heldout, [right.get(q.id, False) for q in data.heldout]))


def main() -> None:
    started = time.time()
    config = flags.config_from_flags(Config)
    started = config.started or started
    if config.smoke:
        config = dataclasses.replace(config, **SMOKE)
    with joined(config.coordinator, config.processes, config.process):
        train(config, started)


def train(config: Config, started: float) -> None:
    """Trains the agent, and says on process 0 what has come of it."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    data = same_data(config, out)
    if is_first():
        print(f"{len(data.train)} questions to train on, {len(data.heldout)} held out, {len(data.unseen)} about unseen databases")
    demonstrations = demonstrations_for(data.train, config)
    fitted = run(config, data, demonstrations)
    if not is_first():
        if config.controls:
            run_controls(config, data, demonstrations, fitted)
        return
    print_transcripts(out, 0, "Held-out questions before reinforcement learning:")
    print_transcripts(out, fitted.metrics[-1]["iteration"], "The same after:")
    seconds = time.time() - started
    controls = run_controls(config, data, demonstrations, fitted) if config.controls else None
    summary = summarize(config, data, fitted, controls, seconds)
    partial = out / "summary.json.partial"
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(partial, out / "summary.json")
    print(
        f"\nheld-out reward {summary['heldout_reward_before']:.3f} -> {summary['heldout_reward_after']:.3f} on "
        f"{summary['heldout_questions']} questions; {seconds:.0f} s; everything is in {out}"
    )


if __name__ == "__main__":
    flags.define_flags(Config)
    flags.run_app(main)
