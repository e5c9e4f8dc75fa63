"""Every recipe on the text-to-SQL agent for a few iterations, from one warm policy: does each run, and move the policy?

    python -m experiments.every_recipe --policy runs/quickstart/start --out runs/every_recipe

Too short to rank anything. It writes a line for each recipe into OUT/every_recipe.json, and goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import text_to_sql, training
from lightningrl import flags
from lightningrl.config import setting
from lightningrl.errors import UserError
from lightningrl.recipes import RECIPES
from lightningrl.types import Rollout

MEASURED = (
    "train_reward",
    "grad_norm",
    "advantage_zero_fraction",
    "failed",
    "agent_seconds",
    "sample_seconds",
    "evidence_seconds",
    "train_seconds",
)


@dataclasses.dataclass(frozen=True)
class Config(text_to_sql.Config):
    """Those of the text-to-SQL experiment, at a size that is run fifty times."""

    out: str = setting("runs/every_recipe", "folder for everything", free=True)
    iterations: int = setting(2, "times the agents run and the policy is updated, for each recipe")
    tasks_per_iteration: int = setting(6, "tasks drawn per iteration")
    rollouts_per_task: int = setting(4, "runs of the agent per task")
    updates_per_iteration: int = setting(1, "optimizer steps per iteration")
    questions: int = setting(120, "questions, training and held-out together")
    heldout_questions: int = setting(8, "of those, held out")
    unseen_databases: int = setting(0, "generated databases, of other domains, to evaluate on only")
    branches_per_call: int = setting(2, "rollouts started before every call, for recipes that need the value of states so")
    judge: str | None = setting("experiments.every_recipe:judge", "for recipes with a judge: a function of a task's rollouts")
    potential: str | None = setting("experiments.every_recipe:potential", "for recipes with a potential: a function of a rollout")


def judge(rollouts: Sequence[Rollout]) -> list[list[float]]:
    """1 for a query that ran and for a check that was right, else 0."""
    return [[_well_done(rollout, t) for t in range(len(rollout.transitions))] for rollout in rollouts]


def potential(rollout: Rollout) -> list[float]:
    """1 in a state whose last query ran, else 0; and 0 at the start and at the end."""
    return [0.0] + [float(_ran(rollout, t)) for t in range(1, len(rollout.transitions))] + [0.0]


def _well_done(rollout: Rollout, turn: int) -> float:
    call = rollout.transitions[turn]
    if call.role == "checker":
        return float(("INCORRECT" not in call.text) == (rollout.reward == 1.0))
    return float(turn + 1 == len(rollout.transitions) or _ran(rollout, turn + 1))


def _ran(rollout: Rollout, turn: int) -> bool:
    """Whether what the call was shown is a result and no error."""
    return "Result: error" not in str(rollout.transitions[turn].messages[-1].get("content"))


def measure(config: Config, data: training.Data[Any], name: str) -> dict[str, Any]:
    started = time.time()
    fitted = training.run(dataclasses.replace(config, recipe=name, out=f"{config.out}/{name}"), text_to_sql.EXPERIMENT, data, ())
    rows = [{key: row[key] for key in MEASURED} for row in fitted.metrics[1:]]
    return {"recipe": name, "iterations": rows, "seconds": time.time() - started}


def main() -> None:
    config = flags.config_from_flags(Config)
    if not config.policy:
        raise UserError("give --policy, a folder with a warm policy such as OUT/start of a quickstart")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "every_recipe.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    data = text_to_sql.load_data(config, out)
    for name in RECIPES:
        if name in results:
            continue
        results[name] = measure(config, data, name)
        training.write_whole(path, json.dumps(results, indent=1) + "\n")
        norms = ", ".join(f"{row['grad_norm']:.3f}" for row in results[name]["iterations"])
        print(f"{name}: gradient norms {norms}; {results[name]['seconds']:.0f} s")
    still = [name for name, result in results.items() if not any(row["grad_norm"] > 0 for row in result["iterations"])]
    print(f"{len(results)} recipes in {path}; " + (f"no gradient in {', '.join(still)}" if still else "each had a gradient"))


if __name__ == "__main__":
    flags.define_flags(Config)
    flags.run_app(main)
