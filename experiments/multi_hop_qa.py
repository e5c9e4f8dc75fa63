"""Trains the question-answering agent of the OpenAI Agents SDK, every setting a flag.

    python -m experiments.multi_hop_qa --out=runs/qa                                # in fictional worlds that it makes up itself
    python -m experiments.multi_hop_qa --out=runs/musique --data_dir=DIR/musique --policy=DIR

The reward is 0.9 · F1 + 0.1 · format and nothing else. Held-out questions are about worlds that are never trained on, nor shown in
the warm start; of real data they are those of eval.jsonl.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import training
from experiments.agents import qa_agents_sdk
from experiments.training import Data, Experiment, TrainingConfig
from lightningrl import flags
from lightningrl.config import cache_folder, setting
from lightningrl.errors import UserError
from lightningrl.fit import Fitted
from lightningrl.runtime.store import Store
from lightningrl.tasks.multi_hop_qa import chains, metric
from lightningrl.tasks.multi_hop_qa.data import data_sets, load_questions
from lightningrl.tasks.multi_hop_qa.demonstrations import Prompts, demonstrate
from lightningrl.tasks.multi_hop_qa.questions import Attempt, Question
from lightningrl.tasks.multi_hop_qa.retrieval import MakeRetriever, bm25, open_corpus, search_as_text
from lightningrl.tasks.multi_hop_qa.worlds import build_worlds
from lightningrl.text_encoder import DenseRetrieval, Pooling
from lightningrl.types import Rollout, Task

SEARCH = qa_agents_sdk.search
PROMPTS = Prompts(
    system=qa_agents_sdk.SYSTEM,
    request=qa_agents_sdk.REQUEST,
    answer=qa_agents_sdk.ANSWER,
    tool={
        "type": "function",
        "function": {"name": SEARCH.name, "description": SEARCH.description, "parameters": SEARCH.params_json_schema},
    },
)


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """The quickstart's settings for this task."""

    out: str = setting("runs/multi_hop_qa", "folder for everything the run leaves; a run that is there already goes on", free=True)
    data_dir: str | None = setting(
        None, "a data set with corpus.jsonl, train.jsonl and eval.jsonl, or a folder of several; none: generated"
    )
    encoder: str | None = setting(None, "for --data_dir: an encoder checkpoint, whose vectors find passages; none: BM25 does")
    encoder_pooling: Pooling = setting("first", "its vector of a text: the first token's (BGE), or the tokens' mean (E5)")
    encoder_query_prefix: str = setting("", "what it wants before a query, such as 'query: '")
    encoder_passage_prefix: str = setting("", "and before a passage")
    worlds: int = setting(60, "fictional worlds to train in; held-out questions are about others")
    iterations: int = setting(20, "times the agents run and the policy is updated")
    eval_every: int = setting(10, "iterations between evaluations on the held-out tasks")
    reading_steps: int = setting(170, "updates in which a new policy learns to read the demonstrations, prompts included")
    imitation_steps: int = setting(120, "updates on the demonstrations' responses after that")
    context_length: int = setting(320, "tokens of a prompt and its response, at most")
    max_tokens: int = setting(32, "of a response, at most, in training and evaluation")


def load_data(config: Config, folder: Path) -> Data[Question]:
    """The questions that the settings ask for; generated worlds are written into `folder`."""
    if config.encoder and not config.data_dir:
        raise UserError("--encoder is for the passages of --data_dir: generated questions are made, and shown, to be answered with BM25")
    if config.data_dir:
        retrieval_of(config)
        found = data_sets(config.data_dir)
        heldout = [q for path in found for q in load_questions(path, "eval")]
        order = np.random.default_rng([config.seed, 2]).permutation(len(heldout))
        return Data([q for path in found for q in load_questions(path, "train")], [heldout[i] for i in order[: config.heldout_questions]])
    heldout = questions_in_worlds(config, folder, config.heldout_questions, unseen=True)
    train = questions_in_worlds(config, folder, config.questions - config.heldout_questions)
    return Data(chains.split_questions(train, heldout), heldout)


def questions_in_worlds(config: Config, folder: Path, count: int, *, unseen: bool = False) -> list[Question]:
    """Equal shares about each world: about as many questions a world, whether they are trained on or held out."""
    trained = max(config.questions - config.heldout_questions, 1)
    worlds = max(1, round(config.worlds * count / trained))
    built = build_worlds(folder / "worlds", config.seed, worlds, unseen=unseen)
    shares = [count // worlds + (i < count % worlds) for i in range(worlds)]
    return [
        question
        for i, ((world, corpus), share) in enumerate(zip(built, shares, strict=True))
        for question in chains.generate_questions(
            world, corpus, open_corpus(corpus), np.random.default_rng([config.seed, 3, int(unseen), i]), share
        )
    ]


def question_from(fields: dict[str, Any]) -> Question:
    """The question of `dataclasses.asdict`, whose tuples have become lists on the way between processes."""

    def attempt(given: dict[str, Any]) -> Attempt:
        return Attempt(given["kind"], tuple(given["searches"]), given["answer"])

    tuples = {name: tuple(fields[name]) for name in ("aliases", "support", "passages")}
    gold = attempt(fields["gold"]) if fields["gold"] else None
    return Question(**{**fields, **tuples, "gold": gold, "wrong": tuple(map(attempt, fields["wrong"]))})


def task_of(question: Question) -> Task:
    """What the agent sees, and what only the reward sees: the answer, and the titles of the passages that support it."""
    results = qa_agents_sdk.RESULTS if question.gold is None else chains.RESULTS
    seen = {"question": question.question, "corpus": question.corpus, "results": results}
    target = {"gold": question.answer, "aliases": list(question.aliases), "support": list(question.support), "kind": question.kind}
    return Task(question.id, seen, target)


def reward(task: dict[str, Any], target: Any, answer: Any) -> float:
    """0.9 · F1 + 0.1 · format, of the agent's last reply."""
    return metric.reward(answer, [target["gold"], *target["aliases"]]) if isinstance(answer, str) else 0.0


def report(fitted: Fitted, data: Data[Question]) -> Mapping[str, Any]:
    """Exact match and F1 on the held-out questions before and after, and the reward by hops after. A run that failed counts as 0."""
    questions = {q.id: q for q in data.heldout}
    with Store(fitted.out / "rollouts.sqlite") as store:
        before, after = (
            [(questions[r.task.id], r) for r in store.read("heldout", iteration)] for iteration in (0, fitted.metrics[-1]["iteration"])
        )
    by_hops: dict[int, list[float]] = collections.defaultdict(list)
    for question, rollout in after:
        by_hops[question.hops].append(rollout.reward if rollout.status == "ok" else 0.0)
    return {
        **{f"{name}_before": value for name, value in accuracy(before).items()},
        **{f"{name}_after": value for name, value in accuracy(after).items()},
        "by_hops_after": {hops: {"count": len(rewards), "reward": float(np.mean(rewards))} for hops, rewards in sorted(by_hops.items())},
    }


def accuracy(runs: Sequence[tuple[Question, Rollout]]) -> dict[str, float]:
    """SQuAD's numbers, without what the reward pays for form; 0 of a run that failed, which may have had an answer before it did."""

    def mean(score: Callable[[str, Sequence[str]], float]) -> float:
        scores = [score(metric.answer_in(r.answer or "") or "", q.answers) if r.status == "ok" else 0.0 for q, r in runs]
        return float(np.mean(scores)) if scores else 0.0

    return {"exact_match": mean(metric.exact_match), "f1": mean(metric.f1)}


def agent(config: Config) -> Callable[..., Any]:
    """The agent, whose searches keep the indexes of large corpora beside the warm starts."""
    find = functools.partial(search_as_text, cache=str(cache_folder(config) / "retrieval"), make=retrieval_of(config))
    return functools.partial(qa_agents_sdk.answer, find=find)


def retrieval_of(config: Config) -> MakeRetriever:
    """Raises UserError for an encoder that is not there."""
    if config.encoder is None:
        return bm25
    return DenseRetrieval(config.encoder, config.encoder_pooling, config.encoder_query_prefix, config.encoder_passage_prefix)


SEARCH_OF_A_WORLD = functools.partial(search_as_text, results=chains.RESULTS)

EXPERIMENT = Experiment(
    agent=agent,
    reward=lambda config: reward,
    load=load_data,
    read=question_from,
    task_of=task_of,
    demonstrate=lambda question, rng: demonstrate(question, PROMPTS, rng, search=SEARCH_OF_A_WORLD),
    shown=lambda question: bool(question.gold and question.wrong),
    content=lambda question: [question.question, question.answers, question.support],
    files=lambda question: [question.corpus],
    report=report,
    roles=("agent",),
    smoke={"worlds": 8},
)

if __name__ == "__main__":
    flags.define_flags(Config)
    flags.run_app(functools.partial(training.main, Config, EXPERIMENT))
