"""Trains the LangGraph text-to-SQL agent: the quickstart's job, every setting a flag.

    python -m experiments.text_to_sql --out=runs/sql                            # on databases that it builds itself
    python -m experiments.text_to_sql --out=runs/mine --database=mine.sqlite    # on a database of one's own
    python -m experiments.text_to_sql --out=runs/spider --data_dir=SPIDER --policy=DIR
    python -m experiments.text_to_sql --out=runs/small --data_dir=SPIDER --context_length=640 --max_schema_chars=500   # from scratch

The reward is execution match and nothing else. Held-out questions are never trained on, nor shown in the warm start; unseen ones are about
databases that are not either. Of Spider those are dev.json's, and held-out ones are about its training databases.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import training
from experiments.agents import sql_langgraph
from experiments.training import Data, Experiment, TrainingConfig
from lightningrl import flags
from lightningrl.config import setting
from lightningrl.errors import UserError
from lightningrl.fit import Fitted
from lightningrl.runtime.store import Store
from lightningrl.tasks.text_to_sql.databases import build_databases
from lightningrl.tasks.text_to_sql.demonstrations import Prompts, demonstrate, run_as_text
from lightningrl.tasks.text_to_sql.metric import execution_match
from lightningrl.tasks.text_to_sql.questions import Question, generate_questions, split_questions
from lightningrl.tasks.text_to_sql.spider import accuracy_by_hardness, load_spider, with_mistakes
from lightningrl.types import Task

PROMPTS = Prompts(
    writer_system=sql_langgraph.WRITER_SYSTEM,
    writer_request=sql_langgraph.WRITER_REQUEST,
    checker_system=sql_langgraph.CHECKER_SYSTEM,
    checker_request=sql_langgraph.CHECKER_REQUEST,
    rewriter_request=sql_langgraph.REWRITE_REQUEST,
    max_drafts=sql_langgraph.MAX_DRAFTS,
)


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """The quickstart's settings."""

    out: str = setting("runs/text_to_sql", "folder for everything the run leaves; a run that is there already goes on", free=True)
    database: str | None = setting(None, "a SQLite file to learn about; none: generated databases")
    data_dir: str | None = setting(None, "Spider in its official layout: dev.json, train_spider.json, tables.json, database/")
    max_schema_chars: int = setting(0, "of a schema of Spider's, those that the question mentions first; 0: all of it")
    databases: int = setting(3, "generated databases to train on")
    unseen_databases: int = setting(3, "generated databases, of other domains, to evaluate on only")
    unseen_questions: int = setting(60, "questions about unseen databases; of Spider, of dev.json")


def load_data(config: Config, folder: Path) -> Data[Question]:
    """The questions that the settings ask for; generated databases are written into `folder`."""
    if config.database and config.data_dir:
        raise UserError("give --database or --data_dir, not both")
    if config.max_schema_chars < 0:
        raise UserError(f"max_schema_chars={config.max_schema_chars} must be at least 0")
    if config.data_dir:
        load = functools.partial(load_spider, config.data_dir, max_schema_chars=config.max_schema_chars or None)
        train, heldout = split_questions(load("train"), config.heldout_questions, config.seed)
        if not config.policy:  # someone has to show a new one how
            train = with_mistakes(train, config.seed)
        dev = load("dev")
        order = np.random.default_rng([config.seed, 2]).permutation(len(dev))  # the file has one database after another
        return Data(train, heldout, [dev[i] for i in sorted(order[: config.unseen_questions])])
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


def question_from(fields: dict[str, Any]) -> Question:
    """The question of `dataclasses.asdict`, whose tuples have become lists on the way between processes."""
    return Question(**{**fields, "wrong": tuple((kind, sql) for kind, sql in fields["wrong"])})


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


def by_hardness(fitted: Fitted, data: Data[Question]) -> Mapping[str, Any]:
    """Accuracy of the last evaluation by Spider's levels, on held-out questions and on those about unseen databases."""
    last = fitted.metrics[-1]["iteration"]
    uses = {"by_hardness_after": ("heldout", data.heldout), "unseen_by_hardness_after": ("unseen", data.unseen)}
    with Store(fitted.out / "rollouts.sqlite") as store:
        right = {name: {r.task.id: r.outcome.get("reward") == 1.0 for r in store.read(use, last)} for name, (use, _) in uses.items()}
    return {
        name: dict(accuracy_by_hardness(questions, [right[name].get(q.id, False) for q in questions]))
        for name, (_, questions) in uses.items()
        if questions
    }


EXPERIMENT = Experiment(
    agent=lambda config: functools.partial(sql_langgraph.answer, execute=run_as_text),
    reward=lambda config: reward,
    load=load_data,
    read=question_from,
    task_of=task_of,
    demonstrate=lambda question, rng: demonstrate(question, PROMPTS, rng),
    shown=lambda question: bool(question.wrong),
    content=lambda question: [question.question, question.gold, question.schema],
    files=lambda question: [question.database],
    report=by_hardness,
    roles=("writer", "checker", "rewriter"),
    smoke={"databases": 2, "unseen_databases": 1, "unseen_questions": 4},
    unseen="about unseen databases",
)

if __name__ == "__main__":
    flags.define_flags(Config)
    flags.run_app(functools.partial(training.main, Config, EXPERIMENT))
