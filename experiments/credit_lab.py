"""Which credit assignment for which difficulty? Every recipe, assigner and advantage against exact truth, in tabular processes.

    python -m experiments.credit_lab            # about seven minutes on two CPU cores
    python -m experiments.credit_lab --full     # more batches and iterations, and the best of three learning rates: an hour or so
    python -m experiments.credit_lab --smoke    # the same path with very little of everything

Every pair has the same number of environment steps, extra rollouts counted. Writes results.json, report.md and figures.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from lightningrl import flags
from lightningrl.config import setting
from lightningrl.errors import UserError, settings_of_a_person
from lightningrl.lab.difficulties import PROCESSES, stacked
from lightningrl.lab.figures import write_figures
from lightningrl.lab.intervals import METRICS, draw_seeds, interval_of_mean, intervals, regrets
from lightningrl.lab.pairs import NOT_APPLICABLE, PAIRS, Pair
from lightningrl.lab.producers import ESTIMATES, producer_errors
from lightningrl.lab.report import REFERENCE, SAME, report_text
from lightningrl.lab.study import Settings, Study
from lightningrl.recipe import describe

Measured = dict[str, np.ndarray]
MINUTES = 15  # the goal


@dataclasses.dataclass(frozen=True)
class Config:
    out: str = setting("experiments/results/credit_lab", "folder for results.json, report.md and the figures")
    processes: tuple[str, ...] = setting((), "processes, comma-separated; none given: all")
    pairs: tuple[str, ...] = setting((), "names of pairs, comma-separated; none given: all")
    seeds: int = setting(20, "policies to start from, in every process")
    batches: int = setting(24, "batches at a fixed policy, from which bias and noise are estimated")
    iterations: int = setting(30, "batches that a policy learns from")
    epochs: int = setting(2, "updates from one batch")
    learning_rate: float = setting(0.1, "Adam's")
    steps: int = setting(96, "environment steps of a batch")
    group_size: int = setting(8, "rollouts of a group")
    restarts: int = setting(2, "rollouts started from every state, by pairs that branch")
    seed: int = setting(0, "all randomness comes from it")
    threads: int = setting(2, "pairs at once")
    full: bool = setting(False, "four times the batches, twice the iterations, and the best of three learning rates for every pair")
    smoke: bool = setting(False, "two processes, four pairs, two seeds, three batches: seconds; its numbers mean nothing")
    rewrite: bool = setting(False, "measure nothing: write report.md and the figures anew from results.json")


SMOKE: dict[str, Any] = {
    "processes": ("delayed_reward", "unequal_lengths"),
    "pairs": (REFERENCE, SAME, "gae + whiten", "gae(exact) + whiten"),
    "seeds": 2,
    "batches": 3,
    "iterations": 3,
}


def chosen(given: Sequence[str], known: Mapping[str, Any], what: str) -> tuple[str, ...]:
    """The names that were given, in the order of those there are; all if none were. What others are compared with is always among them."""
    for name in given:
        if name not in known:
            raise UserError(f"There is no {what} {name!r}: choose among {', '.join(known)}.")
    return tuple(name for name in known if not given or name in given or name in (REFERENCE, SAME))


def run(config: Config) -> dict[str, Any]:
    """Everything that the report is made of."""
    config = dataclasses.replace(config, **SMOKE) if config.smoke else config
    names = chosen(config.processes, PROCESSES, "process")
    pairs = [PAIRS[name] for name in chosen(config.pairs, PAIRS, "pair")]
    with settings_of_a_person():
        fields = [field.name for field in dataclasses.fields(Settings)]
        settings = Settings(**{name: x for name, x in dataclasses.asdict(config).items() if name in fields})
    rates = [settings.learning_rate]
    if config.full:
        settings = dataclasses.replace(settings, batches=4 * settings.batches, iterations=2 * settings.iterations)
        rates = [settings.learning_rate * x for x in (0.3, 1.0, 3.0)]
    studies = [Study(stacked(names), dataclasses.replace(settings, learning_rate=rate)) for rate in rates]
    estimates = ESTIMATES[1:2] if config.smoke else ESTIMATES
    of_producers = min(4, settings.batches)
    started = time.time()
    work = len(pairs) * (settings.batches + len(rates) * settings.iterations) + len(estimates) * of_producers
    with tqdm.tqdm(total=work, unit="batch", smoothing=0.02) as bar, concurrent.futures.ThreadPoolExecutor(config.threads) as pool:
        found = pool.map(lambda pair: measure(pair, studies, bar.update), pairs)
        measured = dict(zip((pair.name for pair in pairs), found, strict=True))
        errors = producer_errors(studies[0], of_producers, estimates, bar.update)
    seconds = time.time() - started
    draws = draw_seeds(settings.seeds)
    return {
        "processes": list(names),
        "settings": dataclasses.asdict(settings) | {"learning_rates": rates, "full": config.full, "smoke": config.smoke},
        "seconds": round(seconds, 1),
        "backend": jax.default_backend(),
        "cpus": os.cpu_count(),
        "versions": {"jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "best_return": studies[0].best().tolist(),
        "pairs": {name: summary(PAIRS[name], x, draws) for name, x in measured.items()},
        "producers": {
            name: {key: [interval_of_mean(x, draws) for x in of_processes] for key, of_processes in error.items()}
            for name, error in errors.items()
        },
        "not_applicable": NOT_APPLICABLE,
        "goals": [
            {"name": "pairs", "value": len(pairs), "goal": 55, "met": len(pairs) >= 55},
            {"name": "minutes", "value": seconds / 60, "goal": MINUTES, "met": seconds / 60 <= MINUTES},
        ],
    }


def measure(pair: Pair, studies: Sequence[Study], tick: Any) -> Measured:
    """All numbers of a pair; of several learning rates those of the one with the least regret over all processes."""
    result = studies[0].measure(pair, tick)
    best = studies[0].best()
    learned = [study.learn(pair, tick) for study in studies]
    of_rates = [regrets(found["returns"], best) for found in learned]
    choice = int(np.argmin([found["regret"].mean() for found in of_rates]))
    rate = np.full(best.shape, studies[choice].settings.learning_rate)
    return (
        result | of_rates[choice] | {"curve": learned[choice]["returns"].mean(1), "learning_rate": rate, "spent": learned[choice]["steps"]}
    )


def summary(pair: Pair, found: Measured, draws: np.ndarray) -> dict[str, Any]:
    """A pair's numbers, with intervals; and its regret with every seed, so that pairs can be compared on the same ones."""
    r = pair.recipe
    stages = {what: describe(getattr(r, what)) for what in ("credit", "advantage", "spread", "loss", "aggregation")}
    metrics = {metric: intervals(found, metric, draws) for metric in METRICS}

    return {
        "family": pair.family,
        "arxiv": r.arxiv if pair.family == "recipe" else None,
        **stages,
        "needs": list(pair.needs),
        "told": pair.told,
        "learned": pair.learned,
        "sampling": pair.kind,
        "learning_rate": float(found["learning_rate"][0]),
        "steps_per_batch": found["steps"].mean(1).tolist(),
        "steps_of_learning": found["spent"].mean(1).tolist(),
        "by_process": {metric: each for metric, (each, _) in metrics.items()},
        "overall": {metric: whole for metric, (_, whole) in metrics.items()},
        "curve": np.round(found["curve"], 4).tolist(),
        "regret_by_seed": np.round(found["regret"], 4).tolist(),
    }


def main() -> None:
    config = flags.config_from_flags(Config)
    out = Path(config.out)
    if config.rewrite:
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    else:
        out.mkdir(parents=True, exist_ok=True)
        results = as_json(run(config))
        (out / "results.json").write_text(json.dumps(results, allow_nan=False) + "\n", encoding="utf-8")
    (out / "report.md").write_text(report_text(results), encoding="utf-8")
    write_figures(results, out)
    print(f"{len(results['pairs'])} pairs, measured in {results['seconds']:.0f} s; see {out / 'report.md'}")


def as_json(x: Any) -> Any:
    """Numbers to five digits, which is more than they are good for; JSON has no infinity: None."""
    if isinstance(x, dict):
        return {k: as_json(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [as_json(v) for v in x]
    if isinstance(x, float):
        return float(f"{x:.5g}") if np.isfinite(x) else None
    return x


if __name__ == "__main__":
    flags.define_flags(Config)
    flags.run_app(main)
