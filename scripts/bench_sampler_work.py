"""What scripts/bench_sampler.py has every sampler do, and how a sampler in a process of its own is told to. Imports NumPy only."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

VOCABULARY, CONTEXT = 1024, 256
TURNS, LONGEST = 4, 40
PROBE = 24  # tokens decoded greedily, by which the samplers show that they run the same model
MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "max_positions": CONTEXT,
    "rope_theta": 1e6,  # what tunix takes, whatever its configuration says
}

Prompts = Sequence[Sequence[int]]
Generate = Callable[[Prompts, int], list[list[int]]]  # prompts and a number of tokens -> that many each, sampled


@dataclasses.dataclass(frozen=True)
class Agent:
    """A run: what it is asked, what each call's answer is followed by, and how long each answer is."""

    first: list[int]
    results: list[list[int]]
    lengths: list[int]


def make_agents(count: int, spread: bool, seed: int = 0) -> list[Agent]:
    """Groups of eight with the same first prompt, all with the same first 24 tokens; answers of 10 tokens, or of 10 on average."""
    rng = np.random.default_rng(seed)

    def words(n: int) -> list[int]:
        return rng.integers(8, VOCABULARY, n).tolist()

    system, agents, first = words(24), [], [0]
    for i in range(count):
        if i % 8 == 0:
            first = system + words(int(rng.integers(20, 36)))
        lengths = np.clip(rng.geometric(0.1, TURNS), 1, LONGEST).tolist() if spread else [10] * TURNS
        agents.append(Agent(first, [words(int(rng.integers(4, 12))) for _ in range(TURNS)], lengths))
    return agents


def batches(agents: Sequence[Agent], generate: Generate, size: int) -> int:
    """Runs the agents turn by turn in fixed batches, each as long as its longest answer; returns how many tokens were wanted."""
    prompts = [list(agent.first) for agent in agents]
    for turn in range(TURNS):
        for at in range(0, len(agents), size):
            some = range(at, min(at + size, len(agents)))
            answers = generate([prompts[i] for i in some], max(agents[i].lengths[turn] for i in some))
            for i, answer in zip(some, answers, strict=True):
                prompts[i] += answer[: agents[i].lengths[turn]] + agents[i].results[turn]
    return sum(sum(agent.lengths) for agent in agents)


def serve(generate: Generate, greedy: Generate, sizes: Sequence[int]) -> None:
    """Obeys lines on standard input: each names a piece of work, the answer says how long it took."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever the libraries have to say
    best: dict[bool, int] = {}
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(obey(order, generate, greedy, sizes, best)), file=answers, flush=True)


def obey(order: dict, generate: Generate, greedy: Generate, sizes: Sequence[int], best: dict[bool, int]) -> dict:
    if order["what"] == "probe":
        return {"tokens": greedy([order["prompt"]], PROBE)[0]}
    if order["what"] == "latency":
        started = time.perf_counter()
        generate([order["prompt"]], order["tokens"])
        return {"seconds": time.perf_counter() - started}
    agents = make_agents(order["agents"], order["spread"])
    if order["spread"] not in best:  # the first time: which batch size is the best, everything compiled
        best[order["spread"]] = min(sizes, key=lambda size: min(seconds for seconds, _ in _timed(agents, generate, size)))
    seconds, tokens = list(_timed(agents, generate, best[order["spread"]], times=1))[0]
    return {"seconds": seconds, "tokens": tokens, "batch": best[order["spread"]]}


def _timed(agents: Sequence[Agent], generate: Generate, size: int, times: int = 2) -> Iterator[tuple[float, int]]:
    for _ in range(times):
        started = time.perf_counter()
        tokens = batches(agents, generate, size)
        yield time.perf_counter() - started, tokens


def load_weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """By the names that `transformers` gives Llama's."""
    with np.load(folder / "weights.npz") as stored:
        return {name: stored[name] for name in stored.files}
