"""How an update grows: seconds and bytes against the number of tasks, of turns and of rollouts in a group, with fitted exponents.

python scripts/bench_growth.py --json FILE

One axis is varied at a time from 8 tasks × 8 rollouts × 4 turns. A call's prompt is all that was said before it in its rollout, and every
group shares its first prompt, as an agent's do; lengths are fixed, tokens random. Timed is what the loop does with a
batch: packing into tries on the host, one update on the device (float32, d=128, 4 layers). Bytes are the packed batch on the
host and what the compiled gradient of a micro-batch takes, which batches of any size share. An exponent is the slope of log y on log x.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lightningrl.losses import count_units
from lightningrl.model.config import ModelConfig
from lightningrl.model.params import init_params
from lightningrl.packing.rows import PackedBatch, RowSettings, pack
from lightningrl.recipes import get_recipe
from lightningrl.sharding import make_mesh
from lightningrl.tabulate import table_from_rollouts
from lightningrl.train import EdgeBatch, OptimizerSettings, TrainStep, make_optimizer
from lightningrl.types import Rollout, Task, Transition

CONFIG = ModelConfig(1088, 128, 4, 4, 2, 32, 384, 4096)
ROWS = RowSettings((512,), 2048, 512)
PROMPT, RESPONSE, RESULT = 90, 25, 20  # tokens of a task's prompt, of a response, and of what is said to it
REPEATS = {"pack": 20, "update": 3}  # of which the fastest counts: packing takes milliseconds, in which anything can come between
GOAL = 1.1


@dataclasses.dataclass(frozen=True)
class Size:
    tasks: int = 8
    turns: int = 4
    group: int = 8


AXES: dict[str, Sequence[int]] = {"tasks": (4, 8, 16, 32), "turns": (1, 2, 4, 8), "group": (4, 8, 16, 32)}


def rollouts_of(size: Size) -> list[Rollout]:
    rng = np.random.default_rng([size.tasks, size.turns, size.group])
    words = lambda n: rng.integers(7, CONFIG.vocab_size, n).astype(np.int32)  # noqa: E731
    made = []
    for task in range(size.tasks):
        prompt = words(PROMPT)
        for sample in range(size.group):
            said, calls = prompt, []
            for turn in range(size.turns):
                response = words(RESPONSE)
                calls.append(Transition(said, response, np.full(RESPONSE, -1.0, np.float32), 1.0, 0, "policy", turn))
                said = np.concatenate([said, response, words(RESULT)])
            name = f"task{task}"
            outcome = {"reward": float(sample % 2)}
            made.append(Rollout(f"{name}/{sample}", Task(name, {}), name, sample, 0, tuple(calls), outcome, "ok"))
    return made


def packed(rollouts: Sequence[Rollout]) -> PackedBatch:
    calls = [t for r in rollouts for t in r.transitions]
    return pack(calls, range(len(calls)), ROWS)


def measure(size: Size, step: TrainStep) -> dict[str, Any]:
    rollouts = rollouts_of(size)
    batch = packed(rollouts)
    table = table_from_rollouts(rollouts, size=sum(len(r.transitions) for r in rollouts))
    edges = dataclasses.replace(batch.edges, old_logp=batch.edges.behaviour_logp)
    advantage = np.random.default_rng(0).normal(size=edges.mask.shape).astype(np.float32)
    zeros = np.zeros(edges.mask.shape, np.float32)
    learned = EdgeBatch(edges, count_units(table, edges), advantage, zeros, zeros)
    state = step.init(init_params(CONFIG, jax.random.key(0)))

    def update() -> None:
        nonlocal state
        state, metrics = step.update(state, batch.rows, learned)
        jax.block_until_ready((state, metrics))

    update()  # compiles
    largest = max(batch.rows, key=lambda r: r.tokens.size)
    analysis = step.memory(state, largest, learned)
    host = sum(x.nbytes for x in jax.tree.leaves((batch.rows, learned)))
    return {
        **dataclasses.asdict(size),
        "useful_tokens": batch.row_tokens,
        "computed_tokens": batch.computed_tokens,
        "micro_batches": len(batch.rows),
        "pack_seconds": fastest(lambda: packed(rollouts), REPEATS["pack"]),
        "update_seconds": fastest(update, REPEATS["update"]),
        "batch_bytes": int(host),
        "micro_batch_bytes": int(analysis.argument_size_in_bytes + analysis.temp_size_in_bytes),
    }


def fastest(run: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def grown(rows: Sequence[dict[str, Any]], axis: str) -> dict[str, float]:
    """Exponents of the update's and the packer's seconds, of a batch's bytes with what is compiled for it, and of tokens."""
    x = [row[axis] for row in rows]
    of = {name: [row[name] for row in rows] for name in ("update_seconds", "pack_seconds", "useful_tokens", "computed_tokens")}
    of["bytes"] = [row["batch_bytes"] + row["micro_batch_bytes"] for row in rows]
    return {name: round(exponent(x, y), 3) for name, y in of.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, required=True, help="where the numbers go")
    parser.add_argument("--most", type=int, default=32, help="the largest of every axis (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.most < 8:
        parser.error("--most must be at least 8: an exponent needs two sizes")
    step = TrainStep(CONFIG, get_recipe("lightningrl"), make_optimizer(OptimizerSettings(1e-5)), make_mesh())
    results: dict[str, list[dict[str, Any]]] = {}
    exponents: dict[str, dict[str, float]] = {}
    for axis, values in AXES.items():
        results[axis] = [measure(Size(**{axis: value}), step) for value in values if value <= arguments.most]
        exponents[axis] = grown(results[axis], axis)
        print(f"{axis}: " + ", ".join(f"{name} ~ {axis}^{slope}" for name, slope in exponents[axis].items()), flush=True)
    goals = [
        {"name": f"growth of {name} in tasks: exponent", "value": exponents["tasks"][name], "goal": f"<= {GOAL}"}
        for name in ("update_seconds", "pack_seconds", "bytes")
    ]
    goals = [goal | {"met": goal["value"] <= GOAL} for goal in goals]
    machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version(), "jax": jax.__version__}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    said = {"machine": machine, "results": results, "exponents": exponents, "compiled": step.compiled, "goals": goals}
    arguments.json.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    for goal in goals:
        print(f"{goal['name']}: {goal['value']} ({goal['goal']}, {'met' if goal['met'] else 'MISSED'})")


if __name__ == "__main__":
    main()
