"""Sampling for 64 agents at once: ours, `transformers` generate and tunix' sampler, with the same weights.

    python scripts/bench_sampler.py --json bench_sampler.json

Every agent makes four calls, each of which goes on from the one before; eight at a time begin with the same prompt. Answers are of 10
tokens on average, as spread as those of the quickstart's agent (`spread`), or all of 10 (`even`). Our agents go on as soon as they are
answered; the others', in whatever batches are the fastest, when their batch is done. All show first that they run the same model:
greedily, they give the same tokens. Then they take turns; medians are reported. Weights are new in every round, so our prefix cache is
empty at its beginning. Peers run in environments of their own, made once (scripts/peers/*_sampler.txt, a few minutes).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from bench_sampler_work import CONTEXT, MODEL, PROBE, TURNS, Agent, make_agents  # noqa: E402
from make_goldens import environment  # noqa: E402

from lightningrl.model.config import ModelConfig  # noqa: E402
from lightningrl.model.params import Params, init_params  # noqa: E402
from lightningrl.sampler.engine import PolicySampler, SamplerSettings  # noqa: E402
from lightningrl.types import SamplingParams  # noqa: E402

SCRIPTS = pathlib.Path(__file__).resolve().parent
AGENTS = 64
SETTINGS = SamplerSettings(slots=64, context_length=CONTEXT, group=8, chunk=8, prefill_rows=8, steps=4)  # the best of some that were tried
LATENCY_TOKENS = 64
CONFIG = ModelConfig(**MODEL)
GOALS = {"transformers": 3.0, "tunix": 2.0}


class NoTokenizer:
    """Nobody reads what is said, and it never ends early."""

    eos_token_id = -1

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        return ""


class Ours:
    """The sampler, in this process."""

    def __init__(self, params: Params, settings: SamplerSettings) -> None:
        self._params, self._round = params, 0
        self._sampler = PolicySampler(params, CONFIG, NoTokenizer(), settings).start()

    def tell(self, order: dict[str, Any]) -> dict[str, Any]:
        if order["what"] == "probe":
            return {"tokens": self._answer(order["prompt"], PROBE, (0, 0), 0.0)}
        self._round += 1
        self._sampler.set_params(self._params, self._round)
        before, started = self._sampler.counts.since(type(self._sampler.counts)()), time.perf_counter()
        if order["what"] == "latency":
            self._answer(order["prompt"], order["tokens"], (0, self._round), 1.0)
            return {"seconds": time.perf_counter() - started}
        agents = make_agents(order["agents"], order["spread"])
        with concurrent.futures.ThreadPoolExecutor(len(agents)) as pool:
            tokens = sum(pool.map(self._run, range(len(agents)), agents))
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": tokens, "cache_hit_ratio": self._sampler.counts.since(before).cache_hit_ratio}

    def _run(self, number: int, agent: Agent) -> int:
        prompt = list(agent.first)
        for turn in range(TURNS):
            prompt += self._answer(prompt, agent.lengths[turn], (number, turn), 1.0) + agent.results[turn]
        return sum(agent.lengths)

    def _answer(self, prompt: list[int], tokens: int, key: tuple[int, int], temperature: float) -> list[int]:
        sampling = SamplingParams(tokens, temperature=temperature)
        return self._sampler.submit(np.array(prompt, np.int32), sampling, key).result().token_ids.tolist()

    def close(self) -> None:
        self._sampler.stop()


class Peer:
    """A sampler in a process of its own, told by lines on its standard input."""

    def __init__(self, python: pathlib.Path, script: pathlib.Path, folder: pathlib.Path) -> None:
        settings = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [python, script, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **settings},
        )

    def tell(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"it ended: {self._errors.read()[-2000:]}")
        return dict(json.loads(line))

    def close(self) -> None:
        self._process.communicate()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def llama_weights(params: Params) -> dict[str, np.ndarray]:
    """The parameters under the names that `transformers` gives Llama's."""
    c = CONFIG
    weights = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["final_norm"]}
    for i, layer in enumerate(params["layers"]):
        groups, d, name = c.queries_per_kv, c.hidden_size, f"model.layers.{i}."
        weights |= {
            name + "input_layernorm.weight": layer["attention_norm"],
            name + "post_attention_layernorm.weight": layer["mlp_norm"],
            name + "self_attn.q_proj.weight": layer["qkv"][:, :, :groups].reshape(d, -1).T,
            name + "self_attn.k_proj.weight": layer["qkv"][:, :, groups].reshape(d, -1).T,
            name + "self_attn.v_proj.weight": layer["qkv"][:, :, groups + 1].reshape(d, -1).T,
            name + "self_attn.o_proj.weight": layer["attention_out"].reshape(-1, d).T,
            name + "mlp.gate_proj.weight": layer["gate_up"][:, 0].T,
            name + "mlp.up_proj.weight": layer["gate_up"][:, 1].T,
            name + "mlp.down_proj.weight": layer["down"].T,
        }
    return {name: np.ascontiguousarray(array) for name, array in weights.items()}


def start_peers(environments: pathlib.Path, folder: pathlib.Path, probe: dict[str, Any], expected: list[int]) -> tuple[dict, dict]:
    """The peers that run and give the expected tokens, and of every other what is wrong with it."""
    peers: dict[str, Peer] = {}
    problems: dict[str, str] = {}
    for name in GOALS:
        try:
            peer = Peer(
                environment(environments, str(SCRIPTS / "peers" / f"{name}_sampler.txt")), SCRIPTS / "peers" / f"{name}_sampler.py", folder
            )
            if (tokens := peer.tell(probe)["tokens"]) != expected:
                peer.close()
                raise RuntimeError(f"it does not run the same model: greedily {tokens}, not {expected}")
            peers[name] = peer
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            problems[name] = f"{type(error).__name__}: {error}"
            print(f"{name} is not measured: {problems[name]}", flush=True)
    return peers, problems


def one_round(samplers: dict[str, Any], latency: dict[str, Any], agents: int) -> Iterator[dict[str, Any]]:
    """Every sampler in turn."""
    for spread in (True, False):
        for name, sampler in samplers.items():
            done = sampler.tell({"what": "agents", "agents": agents, "spread": spread})
            yield {"sampler": name, "work": "spread" if spread else "even", **done, "tokens_per_s": done["tokens"] / done["seconds"]}
    prompt = make_agents(1, False, seed=1)[0].first
    for name, sampler in latency.items():
        done = sampler.tell({"what": "latency", "prompt": prompt, "tokens": LATENCY_TOKENS})
        yield {"sampler": name, "work": "latency", **done, "tokens_per_s": LATENCY_TOKENS / done["seconds"]}


def medians(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Tokens/s by kind of work and sampler."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        found.setdefault(row["work"], {}).setdefault(row["sampler"], []).append(row["tokens_per_s"])
    return {work: {name: statistics.median(values) for name, values in by.items()} for work, by in found.items()}


def goals(speed: dict[str, dict[str, float]]) -> Iterator[dict[str, Any]]:
    """A goal that could not be measured has no value and is not met."""
    for name, goal in GOALS.items():
        value = speed["spread"]["ours"] / speed["spread"][name] if name in speed["spread"] else None
        yield {"name": f"times {name}' tokens/s, {AGENTS} agents", "value": value, "goal": goal, "met": value is not None and value >= goal}
    theirs = speed["latency"].get("transformers")
    ratio = None if theirs is None else theirs / speed["latency"]["ours"]
    yield {"name": "single-stream time over transformers'", "value": ratio, "goal": 1.0, "met": ratio is not None and ratio <= 1.0}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, required=True, metavar="FILE", help="where the results go")
    parser.add_argument("--rounds", type=int, default=5, help="of all samplers in turn (default: %(default)s)")
    parser.add_argument("--agents", type=int, default=AGENTS, help="at once, for a quick look (default: %(default)s)")
    parser.add_argument("--no_peers", action="store_true", help="leave the others out")
    parser.add_argument("--environments", type=pathlib.Path, default=SCRIPTS.parent / "build" / "peers", help="where the peers' are kept")
    given = parser.parse_args(arguments)
    params = init_params(CONFIG, jax.random.key(0))
    probe = {"what": "probe", "prompt": make_agents(1, False, seed=2)[0].first}
    ours, alone = Ours(params, SETTINGS), Ours(params, SamplerSettings(slots=4, context_length=CONTEXT, steps=16, deterministic=False))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        np.savez(pathlib.Path(folder) / "weights.npz", **llama_weights(params))
        peers, problems = {}, dict.fromkeys(GOALS, "left out") if given.no_peers else {}
        if not given.no_peers:
            peers, problems = start_peers(given.environments.resolve(), pathlib.Path(folder), probe, ours.tell(probe)["tokens"])
        latency = {"ours": alone} | {name: peer for name, peer in peers.items() if name == "transformers"}
        for k in range(-1, given.rounds):
            for row in one_round({"ours": ours} | peers, latency, given.agents):
                print(
                    f"{'warm-up' if k < 0 else f'round {k}'} {row['work']:>8} {row['sampler']:>12} {row['tokens_per_s']:8.0f} tokens/s",
                    flush=True,
                )
                rows += [{"round": k, **row}] if k >= 0 else []
        for sampler in (ours, alone, *peers.values()):
            sampler.close()
    speed = medians(rows)
    results = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "jax": importlib.metadata.version("jax")},
        "model": MODEL,
        "problems": problems,
        "rounds": rows,
        "results": speed,
        "goals": list(goals(speed)),
    }
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for goal in results["goals"]:
        value = "-" if goal["value"] is None else f"{goal['value']:.2f}"
        print(f"{'met    ' if goal['met'] else 'NOT MET'} {value:>8} (goal {goal['goal']:g})  {goal['name']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
