"""How fast an update is: our token trie and our plain rows, against TRL's GRPO loss step and plain transformers + torch.

python scripts/bench_train.py --json FILE [--python PYTHON]

One update on 8 tasks × 8 rollouts × 4 calls recorded from the text-to-SQL agent (scripts/bench_train_calls.npz; of one or two rollouts
of every task only the lengths are recorded, their tokens after the shared prompt are made up). Every peer computes a clipped
policy-gradient loss of the same response tokens and advantages (ours weighs rollouts alike, torch's tokens, TRL's as it does) on a
Llama decoder of the same shape, in float32 on two threads, forward, backward, gradient clipping and AdamW. All run in this sitting,
one at a time and in turns. PYTHON has torch and TRL in the versions of scripts/goldens/verl.txt; without it such an
environment is made in build/. Tokens per second are of *useful* tokens: those of all prompts and responses, however they were computed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightningrl.losses import count_units
from lightningrl.model.config import ModelConfig
from lightningrl.model.decoder import Remat
from lightningrl.model.lora import LoraSettings, init_lora
from lightningrl.model.params import init_params
from lightningrl.packing.rows import PackedBatch, Rows, RowSettings, pack
from lightningrl.recipes import get_recipe
from lightningrl.scaling import layer_params
from lightningrl.sharding import make_mesh
from lightningrl.tabulate import table_from_rollouts
from lightningrl.train import EdgeBatch, OptimizerSettings, TrainStep, make_optimizer
from lightningrl.types import Rollout, Task, Transition

ROOT = pathlib.Path(__file__).resolve().parent.parent
CALLS = ROOT / "scripts" / "bench_train_calls.npz"
THREADS, VOCAB, REPEATS = 2, 1088, 3
ROWS = RowSettings((512,), 1024, 512)  # the best of some that were tried, for the trie and for plain rows
SHAPES = {128: (4, 4, 2), 512: (2, 8, 4), 1024: (2, 16, 8)}  # layers, heads, key/value heads of each hidden size


def config_of(hidden: int) -> ModelConfig:
    layers, heads, kv_heads = SHAPES[hidden]
    return ModelConfig(VOCAB, hidden, layers, heads, kv_heads, hidden // heads, 3 * hidden, 4096)


def recorded() -> list[Rollout]:
    with np.load(CALLS) as file:
        calls = dict(file)
    ends = np.cumsum(calls["prompt_length"].astype(int) + calls["response_length"])
    rollouts: list[Rollout] = []
    for r in range(int(calls["rollout"].max()) + 1):
        mine = np.flatnonzero(calls["rollout"] == r)
        transitions = []
        for turn, i in enumerate(mine):
            ids = calls["ids"][ends[i] - calls["prompt_length"][i] - calls["response_length"][i] : ends[i]].astype(np.int32)
            p, n = int(calls["prompt_length"][i]), int(calls["response_length"][i])
            transitions.append(Transition(ids[:p], ids[p:], np.full(n, -1.0, np.float32), 1.0, 0, "policy", turn))
        task = f"task{int(calls['task'][mine[0]])}"
        rollouts.append(Rollout(f"{task}/{r}", Task(task, {}), task, r % 8, 0, tuple(transitions), {"reward": float(r % 2)}, "ok"))
    return rollouts


def seen(rows: Rows) -> float:
    """Pairs of a token and one that it sees: as many for each as it lies deep, and itself."""
    return float(np.sum((np.asarray(rows.positions, np.float64) + 1) * (np.asarray(rows.end) > 0)))


class Ours:
    """One update of our own train step, on the recorded calls or others of as many rollouts."""

    def __init__(
        self,
        config: ModelConfig,
        rollouts: list[Rollout],
        rows: RowSettings = ROWS,
        *,
        share: bool = True,
        lora: LoraSettings | None = None,
        compute_dtype: Any = None,
        remat: Remat = "none",
    ) -> None:
        self.config = config
        transitions = [t for r in rollouts for t in r.transitions]
        table = table_from_rollouts(rollouts, size=len(transitions))
        self.packed: PackedBatch = pack(transitions, range(len(transitions)), rows, share=share)
        optimizer, settings = make_optimizer(OptimizerSettings(1e-5)), {"lora": lora, "compute_dtype": compute_dtype, "remat": remat}
        self.step = TrainStep(config, get_recipe("lightningrl"), optimizer, make_mesh(), **settings)
        adapter = None if lora is None else init_lora(config, jax.random.key(1), lora)
        self.state = self.step.init(init_params(config, jax.random.key(0)), adapter)
        edges = dataclasses.replace(self.packed.edges, old_logp=self.packed.edges.behaviour_logp)
        with np.load(CALLS) as file:
            advantage = file["advantage"]
        zeros = np.zeros(edges.mask.shape, np.float32)
        self.edges = EdgeBatch(edges, count_units(table, edges), advantage[edges.transition], zeros, zeros)

    def seconds(self) -> float:
        started = time.perf_counter()
        self.state, metrics = self.step.update(self.state, self.packed.rows, self.edges)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - started

    def flops(self) -> float:
        """Of matrix products: 2 a token and parameter forward, 4 backward, the head's for action tokens, and the scores of tokens seen."""
        c = self.config
        attention = c.num_layers * 2 * c.num_heads * c.head_dim * sum(map(seen, self.packed.rows))
        head = c.vocab_size * c.hidden_size * float(self.packed.edges.mask.sum())
        return 6 * (self.packed.computed_tokens * c.num_layers * layer_params(c) + head + attention)

    def bytes(self) -> int:
        """Arguments and temporaries of the compiled gradient of the largest micro-batch, from its memory analysis."""
        rows = max(self.packed.rows, key=lambda r: r.tokens.size)
        analysis = self.step.memory(self.state, rows, self.edges)
        return int(analysis.argument_size_in_bytes + analysis.temp_size_in_bytes)


class Peer:
    """A process of scripts/peers/train_peer.py, which waits between its steps."""

    def __init__(self, python: pathlib.Path, way: str, hidden: int, batch: pathlib.Path) -> None:
        c = config_of(hidden)
        shape = {"hidden": hidden, "layers": c.num_layers, "heads": c.num_heads, "kv_heads": c.num_kv_heads}
        shape |= {"intermediate": c.intermediate_size, "vocab": VOCAB, "threads": THREADS}
        program = [str(python), str(ROOT / "scripts" / "peers" / "train_peer.py"), way, str(batch), "--tied"]
        line = [*program, *(f"--{name}={value}" for name, value in shape.items())]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.ready = self.answer()
        self.peak_bytes = 0

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        sys.exit(f"the peer ended with status {self.process.wait()}: run scripts/peers/train_peer.py by hand to see why")

    def seconds(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("step 1\n")
        self.process.stdin.flush()
        said = self.answer()
        self.peak_bytes = said["peak_memory"]
        return said["seconds"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def peers_batch(rollouts: list[Rollout], directory: pathlib.Path) -> pathlib.Path:
    """The same calls and advantages as the peers read them: padded on the right."""
    transitions = [t for r in rollouts for t in r.transitions]

    def padded(sequences: list[np.ndarray]) -> np.ndarray:
        rows = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
        for row, ids in zip(rows, sequences, strict=True):
            row[: len(ids)] = ids
        return rows

    prompts, responses = [t.prompt_ids for t in transitions], [t.response_ids for t in transitions]
    lengths = {"prompt_length": np.array([*map(len, prompts)]), "response_length": np.array([*map(len, responses)])}
    with np.load(CALLS) as file:
        rest = {"advantage": file["advantage"], "group": file["task"].astype(np.int64)}
    np.savez(directory / "batch.npz", prompt_ids=padded(prompts), response_ids=padded(responses), **lengths, **rest)
    return directory / "batch.npz"


def matmul_peak(sides: Sequence[int] = (1024, 2048), dtype: Any = jnp.float32) -> float:
    """FLOP/s of the best of some large square products, of this machine in this sitting."""
    best = 0.0
    for n in sides:
        a = jax.random.normal(jax.random.key(n), (n, n), dtype)  # a GPU is faster on equal numbers, which take it less power
        multiply = jax.jit(jnp.matmul)
        multiply(a, a).block_until_ready()
        for _ in range(4):
            started = time.perf_counter()
            multiply(a, a).block_until_ready()
            best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


def measure(hidden: int, rollouts: list[Rollout], python: pathlib.Path | None, batch: pathlib.Path) -> dict[str, Any]:
    ours = {"trie": Ours(config_of(hidden), rollouts), "rows": Ours(config_of(hidden), rollouts, share=False)}
    peers = {way: Peer(python, way, hidden, batch) for way in ("torch", "trl")} if python else {}
    runners: dict[str, Any] = {**ours, **peers}
    for one in ours.values():
        one.seconds()  # compiles
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(REPEATS):
        for name, runner in runners.items():
            times[name].append(runner.seconds())
    useful = ours["trie"].packed.row_tokens
    result: dict[str, Any] = {"hidden": hidden, "layers": SHAPES[hidden][0], "useful_tokens": useful}
    result["reuse_ratio"] = ours["trie"].packed.reuse_ratio
    for name, runner in runners.items():
        seconds = statistics.median(times[name])
        result[name] = {"seconds": seconds, "all_seconds": times[name], "useful_tokens_per_second": useful / seconds}
        if isinstance(runner, Ours):
            result[name] |= {"flops": runner.flops(), "flops_per_second": runner.flops() / seconds, "bytes": runner.bytes()}
        else:
            result[name] |= {"peak_bytes_beyond_libraries": runner.peak_bytes, "setting": runner.ready["setting"]}
            result[name] |= {"tried_seconds": runner.ready["tried"]}
            runner.close()
    return result


def goals_of(results: dict[int, dict[str, Any]], peak: float) -> list[dict[str, Any]]:
    def goal(name: str, value: float, at_least: float) -> dict[str, Any]:
        return {"name": name, "value": round(value, 3), "goal": f">= {at_least:.3g}", "met": bool(value >= at_least)}

    def ratio(hidden: int, slow: str, fast: str) -> float:
        return results[hidden][slow]["seconds"] / results[hidden][fast]["seconds"]

    goals = []
    if 512 in results:
        goals.append(goal("d=512: trie over our rows", ratio(512, "rows", "trie"), 0.8 * results[512]["reuse_ratio"]))
    if 512 in results and "trl" in results[512]:
        goals.append(goal("d=512: trie over TRL", ratio(512, "trl", "trie"), 5.0))
        goals.append(goal("d=512: rows over torch", ratio(512, "torch", "rows"), 1.2))
    if 128 in results and "torch" in results[128]:
        goals.append(goal("d=128: rows over torch", ratio(128, "torch", "rows"), 1.0))
    if 1024 in results:
        goals.append(goal("d=1024: trie's share of the matmul peak", results[1024]["trie"]["flops_per_second"] / peak, 0.5))
    return goals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, required=True, help="where the numbers go")
    parser.add_argument("--python", type=pathlib.Path, help="an interpreter with torch and TRL; none: one is made in build/")
    parser.add_argument("--no_peers", action="store_true", help="measure only our own")
    parser.add_argument("--hidden", type=int, nargs="*", choices=list(SHAPES), default=list(SHAPES), help="hidden sizes")
    arguments = parser.parse_args()
    python = None
    if not arguments.no_peers:
        sys.path.insert(0, str(ROOT / "scripts"))
        from make_goldens import environment

        python = arguments.python or environment(ROOT / "build" / "goldens", "verl.txt")
    rollouts = recorded()
    peak = matmul_peak()
    with tempfile.TemporaryDirectory() as directory:
        batch = peers_batch(rollouts, pathlib.Path(directory))
        results = {hidden: measure(hidden, rollouts, python if hidden < 1024 else None, batch) for hidden in arguments.hidden}
    goals = goals_of(results, peak)
    machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version(), "jax": jax.__version__}
    said = {"machine": machine, "matmul_peak_flops_per_second": peak, "results": list(results.values()), "goals": goals}
    arguments.json.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    for line in goals:
        print(f"{line['name']}: {line['value']} ({line['goal']}, {'met' if line['met'] else 'MISSED'})")


if __name__ == "__main__":
    main()
