"""What the experiments have in common: questions by use, a training run of an agent, its controls, and what they leave in OUT.

An experiment is one `Experiment`: functions and an agent. Its module hands it to `main` with a Config, every setting of which is a flag.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from lightningrl import flags
from lightningrl.config import FitConfig, check_at_least_one, setting
from lightningrl.distributed import from_first, is_first, joined
from lightningrl.errors import UserError
from lightningrl.fit import Fitted, fit
from lightningrl.runtime.store import Store
from lightningrl.types import Rollout, Task
from lightningrl.warm_start import Demonstration

Q = TypeVar("Q")  # a question: a frozen dataclass, of fields that JSON can hold


@dataclasses.dataclass(frozen=True)
class TrainingConfig(FitConfig):
    """Settings that every experiment has."""

    runner: Literal["local", "processes", "ray"] = setting(
        "processes", "where agents run: in this process, in others beside it, or on the hosts of a Ray cluster", free=True
    )
    data_dir: str | None = setting(None, "real data, in its official layout; none: generated")
    questions: int = setting(2400, "questions, training and held-out together")
    heldout_questions: int = setting(240, "of those, held out")
    demonstrations: int = setting(6000, "runs of the imperfect demonstrator that the warm start imitates")
    smoke: bool = setting(False, "the same path with very little training")
    controls: bool = setting(False, "also run the controls: more supervised steps, and shuffled rewards", free=True)
    seconds_install: float = setting(0.0, "what installation took, for summary.json", free=True)
    started: float = setting(0.0, "when the whole began, seconds since the epoch; 0: now", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, ("questions", "heldout_questions"))


SMOKE: dict[str, Any] = {
    "iterations": 2,
    "tasks_per_iteration": 6,
    "rollouts_per_task": 4,
    "eval_every": 2,
    "questions": 200,
    "heldout_questions": 16,
    "demonstrations": 200,
    "reading_steps": 15,
    "imitation_steps": 15,
}


@dataclasses.dataclass(frozen=True)
class Data(Generic[Q]):
    """Questions by use."""

    train: Sequence[Q]
    heldout: Sequence[Q]
    unseen: Sequence[Q] = ()  # about what is never trained on, such as databases


@dataclasses.dataclass(frozen=True)
class Experiment(Generic[Q]):
    """An agent and what it is trained on.

    `load` gets the settings and a folder that it may write to. `read` makes a question of `dataclasses.asdict` of one. A task's target
    holds the answer as "gold", its input the question as "question". `report` adds to summary.json.
    """

    agent: Callable[[Any], Callable[..., Any]]  # of the settings
    reward: Callable[[Any], Callable[..., Any]]  # likewise
    load: Callable[[Any, Path], Data[Q]]
    read: Callable[[dict[str, Any]], Q]
    task_of: Callable[[Q], Task]
    demonstrate: Callable[[Q, np.random.Generator], Demonstration]  # one run of the imperfect demonstrator
    shown: Callable[[Q], bool]  # whether it can be demonstrated
    content: Callable[[Q], Any]  # what of a question is data, not a place on a disk
    roles: Sequence[str]  # that the agent's calls have
    smoke: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # settings of --smoke beside `SMOKE`
    files: Callable[[Q], Sequence[str]] = lambda question: ()  # that it is about, whose bytes are data
    report: Callable[[Fitted, Data[Q]], Mapping[str, Any]] = lambda fitted, data: {}
    unseen: str = "about unseen data"


def check_roles(roles: Sequence[str], experiment: Experiment[Any]) -> None:
    """Refuses a role that the agent has not: a run would end at its first update, with nothing to learn from."""
    for role in roles:
        if role not in experiment.roles:
            raise UserError(f"the agent has no role {role!r}: choose among {', '.join(experiment.roles)}")


def same_data(config: Any, experiment: Experiment[Q], folder: Path) -> Data[Q]:
    """The questions that process 0 loads, at every process: one builds what they are about."""

    def load() -> Any:
        data = experiment.load(config, folder)
        return {use: [dataclasses.asdict(q) for q in getattr(data, use)] for use in ("train", "heldout", "unseen")}

    return Data(**{use: [experiment.read(fields) for fields in questions] for use, questions in from_first(load).items()})


def data_hash(experiment: Experiment[Q], data: Data[Q]) -> str:
    """Of the content of questions and the bytes of the files that they are about."""
    digest, uses = hashlib.sha256(), (data.train, data.heldout, data.unseen)
    for questions in uses:
        digest.update(json.dumps([experiment.content(q) for q in questions]).encode())
    for path in sorted({path for questions in uses for q in questions for path in experiment.files(q)}):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def demonstrations_for(experiment: Experiment[Q], questions: Sequence[Q], config: Any) -> list[Demonstration]:
    """Runs of the imperfect demonstrator, each question that can be shown as often as any other; none where none can."""
    rng = np.random.default_rng([config.seed, 1])
    shown = [question for question in questions if experiment.shown(question)]
    return [experiment.demonstrate(shown[i % len(shown)], rng) for i in range(config.demonstrations)] if shown else []


def run(config: Any, experiment: Experiment[Q], data: Data[Q], demonstrations: Sequence[Demonstration], alter: Any = None) -> Fitted:
    """One training run of the agent."""
    heldout = {"heldout": [experiment.task_of(q) for q in data.heldout]}
    if data.unseen:
        heldout["unseen"] = [experiment.task_of(q) for q in data.unseen]
    return fit(
        experiment.agent(config),
        [experiment.task_of(q) for q in data.train],
        experiment.reward(config),
        config,
        heldout=heldout,
        demonstrations=demonstrations,
        data_hash=data_hash(experiment, data),
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


def run_controls(
    config: Any, experiment: Experiment[Q], data: Data[Q], demonstrations: Sequence[Demonstration], main: Fitted
) -> dict[str, Any]:
    """The same compute spent on more supervised steps, and the same training with shuffled rewards."""
    before = main.metrics[0]["heldout_reward"]
    steps = config.imitation_steps + equal_compute_steps(main.metrics)
    more = dataclasses.replace(config, out=f"{config.out}/controls/more_supervised", iterations=0, imitation_steps=steps)
    supervised = run(more, experiment, data, demonstrations).metrics[-1]["heldout_reward"]
    shuffled = dataclasses.replace(config, out=f"{config.out}/controls/shuffled_rewards")
    shuffled_reward = run(shuffled, experiment, data, demonstrations, shuffled_rewards).metrics[-1]["heldout_reward"]
    return {
        "more_supervised": {"steps": steps, "heldout_reward": supervised, "gain": supervised - before},
        "shuffled_rewards": {"heldout_reward": shuffled_reward, "gain": shuffled_reward - before},
    }


def equal_compute_steps(metrics: Sequence[Mapping[str, Any]]) -> int:
    """Supervised updates that compute as much as all of RL did: a trained token is a forward and a backward pass (3 forward
    passes), a scored, read or sampled one a forward pass."""
    rows = [row for row in metrics if row["iteration"] > 0]
    passes = 4 * sum(row["trained_tokens"] for row in rows) + (rows[-1]["tokens_so_far"] if rows else 0)
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


def summarize(config: Any, data: Data[Any], fitted: Fitted, seconds: float) -> dict[str, Any]:
    """What summary.json says of every experiment."""
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
        "rollouts": last["rollouts_so_far"],
        "tokens": last["tokens_so_far"],
        "controls": None,
        "continuing_calls": sum(row["continuing_calls"] for row in rows),
        "continuing_calls_exact": sum(row["continuing_calls_exact"] for row in rows),
        # Of rollouts of an older policy there is no gap between two that should be the same.
        "logprob_gap_max": max((row["logprob_gap_max"] for row in rows if "logprob_gap_max" in row), default=None),
        "logprob_gap_mean": max((row["logprob_gap_mean"] for row in rows if "logprob_gap_mean" in row), default=None),
        "train_questions": len(data.train),
        "programs_compiled": fitted.compiled,  # of the train step, by this start
    }
    if data.unseen:
        summary |= {
            "unseen_reward_before": first["unseen_reward"],
            "unseen_reward_after": last["unseen_reward"],
            "unseen_questions": len(data.unseen),
        }
    return summary


def kept_summary(out: Path) -> dict[str, Any]:
    """Of a run that was finished before: what it took, and its controls. The command given again, or with --controls, has neither."""
    try:
        before = json.loads((out / "summary.json").read_text())
    except FileNotFoundError:
        return {}
    return {name: before[name] for name in ("seconds", "seconds_install", "controls")}


def train(config: Any, experiment: Experiment[Q], started: float) -> None:
    """Trains the agent, and says on process 0 what has come of it."""
    check_roles(config.train_roles, experiment)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    data = same_data(config, experiment, out)
    kept = kept_summary(out)
    if is_first():
        unseen = f", {len(data.unseen)} {experiment.unseen}" if data.unseen else ""
        print(f"{len(data.train)} questions to train on, {len(data.heldout)} held out{unseen}")
    demonstrations = demonstrations_for(experiment, data.train, config)
    fitted = run(config, experiment, data, demonstrations)
    if not is_first():
        if config.controls:
            run_controls(config, experiment, data, demonstrations, fitted)
        return
    print_transcripts(out, 0, "Held-out questions before reinforcement learning:")
    print_transcripts(out, fitted.metrics[-1]["iteration"], "The same after:")
    seconds = time.time() - started
    if config.controls:
        kept["controls"] = run_controls(config, experiment, data, demonstrations, fitted)
    summary = summarize(config, data, fitted, seconds) | dict(experiment.report(fitted, data)) | kept
    write_whole(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(
        f"\nheld-out reward {summary['heldout_reward_before']:.3f} -> {summary['heldout_reward_after']:.3f} on "
        f"{summary['heldout_questions']} questions; {seconds:.0f} s; everything is in {out}"
    )


def write_whole(path: Path, text: str) -> None:
    """Writes a file at once: whoever reads it finds the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def main(config_class: Any, experiment: Experiment[Any]) -> None:
    """The command: settings from flags, and one run."""
    started = time.time()
    config = flags.config_from_flags(config_class)
    started = config.started or started
    if config.smoke:
        config = dataclasses.replace(config, **(SMOKE | dict(experiment.smoke)))
    with joined(config.coordinator, config.processes, config.process):
        train(config, experiment, started)
