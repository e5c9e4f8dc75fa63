"""Trains the AutoGen agent that solves word problems with a calculator, every setting a flag.

    python -m experiments.math_tool --out=runs/math                          # on problems that it makes up itself
    python -m experiments.math_tool --out=runs/gsm8k --data_dir=DIR --context_length=384 --vocab_size=4096

The reward is numeric exact match of the final answer and nothing else; `--answer_tolerance=0.01` makes it the loose match of Calc-X.
Held-out problems are never trained on, nor shown in the warm start. With real data, `heldout` are problems of GSM8K's test set and
`unseen` those of SVAMP's challenge set.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from experiments import training
from experiments.agents import math_autogen
from experiments.training import Data, Experiment, TrainingConfig
from lightningrl import flags
from lightningrl.config import setting
from lightningrl.errors import UserError
from lightningrl.fit import Fitted
from lightningrl.runtime.store import Store
from lightningrl.tasks.math_tool.calculator import calculate
from lightningrl.tasks.math_tool.data import ends_in_answer, load_problems
from lightningrl.tasks.math_tool.demonstrations import Prompts, demonstrate
from lightningrl.tasks.math_tool.metric import CALC_X_TOLERANCE, numeric_match
from lightningrl.tasks.math_tool.problems import Problem, generate_problems, split_problems
from lightningrl.types import Task

PROMPTS = Prompts(
    system=math_autogen.SYSTEM,
    tool={"type": "function", "function": math_autogen.tool(calculate).schema},
    argument="expression",
    answer=math_autogen.ANSWER,
    role=math_autogen.MODEL,
)


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """The quickstart's settings."""

    out: str = setting("runs/math_tool", "folder for everything the run leaves; a run that is there already goes on", free=True)
    data_dir: str | None = setting(None, "GSM8K, SVAMP and MAWPS with chains: train.jsonl, eval_gsm8k.jsonl, eval_svamp.jsonl")
    iterations: int = setting(30, "times the agents run and the policy is updated")
    reading_steps: int = setting(200, "updates in which a new policy learns to read the demonstrations, prompts included")
    imitation_steps: int = setting(240, "updates on the demonstrations' responses after that")
    # None and not 0: runs from before there was this setting go on.
    answer_tolerance: float | None = setting(
        None, "share of the right answer that an answer may be off by and still be paid, in Calc-X 0.01; none: exact match"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answer_tolerance is not None and not 0 <= self.answer_tolerance < math.inf:  # NaN too
            raise UserError(f"answer_tolerance={self.answer_tolerance} must be at least 0, and finite")


def load_data(config: Config, folder: Path) -> Data[Problem]:
    """The problems that the settings ask for."""
    if config.data_dir:
        heldout, unseen = (load_problems(config.data_dir, split, with_mistakes=False) for split in ("eval_gsm8k", "eval_svamp"))
        train = load_problems(config.data_dir, "train")
        return Data(train, heldout[: config.heldout_questions], unseen[: config.heldout_questions])
    problems = generate_problems(config.seed, config.questions)
    return Data(*split_problems(problems, config.heldout_questions, config.seed))


def problem_from(fields: dict[str, Any]) -> Problem:
    """The problem of `dataclasses.asdict`, whose tuples have become lists on the way between processes."""

    def chain(calls: Any) -> tuple[tuple[str, str], ...]:
        return tuple((expression, value) for expression, value in calls)

    wrong = tuple((kind, chain(calls)) for kind, calls in fields["wrong"])
    return Problem(**{**fields, "chain": chain(fields["chain"]), "wrong": wrong})


def task_of(problem: Problem) -> Task:
    """What the agent sees, and the answer that only the reward sees."""
    target = {"gold": problem.answer, "kind": problem.kind, "steps": len(problem.chain)}
    return Task(problem.id, {"question": problem.question}, target)


def reward(task: dict[str, Any], target: Any, answer: Any, *, tolerance: Fraction | float = 0) -> float:
    """Numeric exact match: 1 if the answer is the right number, or within `tolerance` of it, else 0."""
    return float(numeric_match(answer, target["gold"], relative_tolerance=tolerance))


def reward_of(config: Config) -> Callable[..., float]:
    """The reward with the tolerance of the settings, where 0.03 is three hundredths and not the float next to it."""
    return functools.partial(reward, tolerance=Fraction(str(config.answer_tolerance or 0)))


def by_steps(fitted: Fitted, data: Data[Problem]) -> Mapping[str, Any]:
    """Held-out accuracy of the last evaluation by the length of the gold chain, and under the loose metric of Calc-X.

    The first is exact whatever the reward's tolerance is. A run that failed counts as wrong.
    """
    problems = {problem.id: problem for problem in data.heldout}
    right: dict[int, list[bool]] = collections.defaultdict(list)
    loose: list[bool] = []
    with Store(fitted.out / "rollouts.sqlite") as store:
        answers = {r.task.id: r.answer for r in store.read("heldout", fitted.metrics[-1]["iteration"]) if r.status == "ok"}
    for id, problem in problems.items():
        right[len(problem.chain)].append(numeric_match(answers.get(id), problem.answer))
        loose.append(numeric_match(answers.get(id), problem.answer, relative_tolerance=CALC_X_TOLERANCE))
    levels = {str(steps): {"count": len(found), "accuracy": sum(found) / len(found)} for steps, found in sorted(right.items())}
    return {"by_steps_after": levels, "heldout_within_a_hundredth_after": sum(loose) / len(loose)}


EXPERIMENT = Experiment(
    agent=lambda config: functools.partial(math_autogen.answer, calculate=calculate),
    reward=reward_of,
    load=load_data,
    read=problem_from,
    task_of=task_of,
    demonstrate=lambda problem, rng: demonstrate(problem, PROMPTS, rng),
    shown=ends_in_answer,
    content=lambda problem: [problem.question, problem.answer],
    report=by_steps,
    roles=("policy",),
    unseen="of SVAMP's challenge set",
)

if __name__ == "__main__":
    flags.define_flags(Config)
    flags.run_app(functools.partial(training.main, Config, EXPERIMENT))
