"""What a call through the gateway costs, for 1, 100 and 1,000 agents at once, and how that compares with agentlightning's store server.

    python scripts/bench_gateway.py --json bench_gateway.json

A rollout is three chat calls that go on from each other and a posted reward (scripts/bench_gateway_agents.py). The gateway runs in a
process of its own, in front of a policy that costs nothing or (`model`) of a random one of the quickstart's size; opening and closing its
sessions count. agentlightning's store server gets the same rollouts in the same run, alternated, from an environment of its own that
is made once (scripts/peers/agentlightning.txt, about 2 minutes). For it a call is a span that is stored: `spans` as its own tracer
stores them, a request each, `export` all of a rollout in one request, which its server can take too. Medians of the rounds are reported.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import psutil
import uvicorn

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from bench_gateway_agents import TURNS, Run, export, make_tokenizer, play, record, run_agents  # noqa: E402
from make_goldens import environment  # noqa: E402

SCRIPTS = pathlib.Path(__file__).resolve().parent
PEER = "agentlightning"
ROLLOUTS = {1: 50, 100: 600, 1000: 2000}  # in a round, by how many agents run at once
PEER_ROLLOUTS = {1: 20, 100: 200, 1000: 1000}
MODEL_ROLLOUTS = {1: 8, 100: 100, 1000: 1000}
LIBRARIES = ("uvicorn", "pydantic", "jax")
CPU_MS, ROLLOUTS_PER_S, TIMES_PEER = 1.0, 200.0, 5.0  # the goals, at 1,000 agents with the policy that costs nothing


class Server:
    """A server in a process of its own, which obeys lines on its standard input."""

    def __init__(self, command: Sequence[str | pathlib.Path]) -> None:
        self._process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.process = psutil.Process(self._process.pid)
        self.url = self._read()["url"]

    def tell(self, command: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None and self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server ended: {self._process.stderr.read()[-2000:]}")
        return json.loads(line)

    @property
    def cpu_seconds(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def measure(server: Server, run: Run, agents: int, numbers: range) -> dict[str, Any]:
    """One row of results: `agents` at once run the rollouts `numbers`. Opening and closing them counts."""
    cpu, own, started = server.cpu_seconds, time.process_time(), time.perf_counter()
    keys = server.tell(f"open {len(numbers)}")
    with asyncio.Runner(loop_factory=uvicorn.Config(run).get_loop_factory()) as runner:
        seconds = runner.run(run_agents(server.url, run, agents, numbers, keys))
    held = server.tell("close")
    wall, calls = time.perf_counter() - started, len(seconds)
    cpu = server.cpu_seconds - cpu
    n = len(numbers)
    if held not in ({"calls": calls, "continued": calls - n, "rewards": n}, {"rollouts": n, "spans": calls + n}) or calls != TURNS * n:
        raise RuntimeError(f"{n} rollouts were run, and the server recorded {held}")
    return {
        "agents": agents,
        "rollouts": n,
        "server_cpu_ms_per_call": 1e3 * cpu / calls,
        "server_cpu_ms_per_rollout": 1e3 * cpu / n,
        "p50_ms": 1e3 * float(np.quantile(seconds, 0.5)),
        "p99_ms": 1e3 * float(np.quantile(seconds, 0.99)),
        "rollouts_per_s": n / wall,
        "memory_mib": server.process.memory_info().rss / 2**20,
        "agents_cpu_ms_per_call": 1e3 * (time.process_time() - own) / calls,
    }


def ours(policy: str) -> Server:
    return Server([sys.executable, SCRIPTS / "bench_gateway_server.py", policy])


def peer(environments: pathlib.Path) -> Server:
    """agentlightning's server; raises what its installation or its start raises."""
    python = environment(environments, str(SCRIPTS / "peers" / f"{PEER}.txt"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return Server([python, SCRIPTS / "peers" / f"{PEER}_store.py", str(port)])


def one_round(environments: pathlib.Path | None, sizes: Sequence[int], share: float) -> Iterator[dict[str, Any]]:
    """Both servers, fresh, and in turn for every number of agents."""
    with contextlib.ExitStack() as running:
        gateway = running.enter_context(ours("no-op"))
        ways = [(gateway, "gateway", "no-op", play, ROLLOUTS)]
        if environments:
            store = running.enter_context(peer(environments))
            ways += [(store, PEER, "spans", record, PEER_ROLLOUTS), (store, PEER, "export", export, PEER_ROLLOUTS)]
        for server, _, _, run, _ in ways:
            measure(server, run, 1, range(5))
        for agents in sizes:
            for server, name, way, run, rollouts in ways:
                yield {"server": name, "way": way, **measure(server, run, agents, scaled(rollouts[agents], share))}


def with_model(sizes: Sequence[int], share: float) -> Iterator[dict[str, Any]]:
    with ours("model") as gateway:
        measure(gateway, play, 32, range(32))  # compiles
        for agents in sizes:
            yield {"server": "gateway", "way": "model", **measure(gateway, play, agents, scaled(MODEL_ROLLOUTS[agents], share))}


def scaled(rollouts: int, share: float) -> range:
    return range(max(2, round(rollouts * share)))


def medians(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for every server, way and number of agents."""
    names = ("server", "way", "agents", "rollouts")
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(tuple(row[name] for name in names), []).append(row)
    measured = [name for name in rows[0] if name not in (*names, "round")]
    return [
        dict(zip(names, kind, strict=True)) | {name: statistics.median(row[name] for row in alike) for name in measured}
        for kind, alike in kinds.items()
    ]


def goals(rows: Sequence[dict[str, Any]], agents: int) -> Iterator[dict[str, Any]]:
    """The peer is taken at its faster way. A goal that could not be measured has no value and is not met."""
    at = {row["way"]: row for row in rows if row["agents"] == agents}
    cpu, speed = at["no-op"]["server_cpu_ms_per_call"], at["no-op"]["rollouts_per_s"]
    theirs = [at[way]["rollouts_per_s"] for way in ("spans", "export") if way in at]
    times = speed / max(theirs) if theirs else None
    yield {"name": f"server CPU a call at {agents} agents, ms", "value": cpu, "goal": CPU_MS, "met": cpu <= CPU_MS}
    yield {"name": f"rollouts/s at {agents} agents", "value": speed, "goal": ROLLOUTS_PER_S, "met": speed >= ROLLOUTS_PER_S}
    name = f"times {PEER}'s rollouts/s at {agents} agents"
    yield {"name": name, "value": times, "goal": TIMES_PEER, "met": times is not None and times >= TIMES_PEER}


def show(row: dict[str, Any]) -> str:
    return (
        f"{row['server']:>14} {row['way']:>6} {row['agents']:5} agents  {row['server_cpu_ms_per_call']:7.3f} ms CPU a call  "
        f"p50 {row['p50_ms']:8.1f} ms  p99 {row['p99_ms']:8.1f} ms  {row['rollouts_per_s']:7.1f} rollouts/s  {row['memory_mib']:5.0f} MiB"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, required=True, metavar="FILE", help="where the results go")
    parser.add_argument("--rounds", type=int, default=3, help="of the gateway and its peer in turn (default: %(default)s)")
    parser.add_argument("--agents", type=int, nargs="+", default=list(ROLLOUTS), choices=ROLLOUTS, help="at once (default: %(default)s)")
    parser.add_argument("--share", type=float, default=1.0, help="of the rollouts, for a quick look (default: %(default)s)")
    parser.add_argument("--no_peer", action="store_true", help="leave agentlightning out")
    parser.add_argument("--no_model", action="store_true", help="leave out the real policy")
    parser.add_argument("--environments", type=pathlib.Path, default=SCRIPTS.parent / "build" / "peers", help="where the peer's is kept")
    given = parser.parse_args(arguments)
    environments = None if given.no_peer else given.environments.resolve()
    problem = ""
    make_tokenizer()  # the agents need it, not in the time that is measured
    if environments:
        try:
            peer(environments).__exit__()
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            environments, problem = None, f"{type(error).__name__}: {error}"
            print(f"{PEER} is not measured: {problem}", flush=True)
    rows = []
    for k in range(given.rounds):
        for row in (
            *one_round(environments, given.agents, given.share),
            *(() if k or given.no_model else with_model(given.agents, given.share)),
        ):
            rows.append({"round": k, **row})
            print(show(row), flush=True)
    summary = medians([{name: value for name, value in row.items() if name != "round"} for row in rows])
    results = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("uvicorn", "pydantic", "jax")},
        },
        "peer": {"name": f"{PEER} 0.3.0's store server", "problem": problem},
        "rounds": rows,
        "results": summary,
        "goals": list(goals(summary, max(given.agents))),
    }
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for goal in results["goals"]:
        value = "-" if goal["value"] is None else f"{goal['value']:.2f}"
        print(f"{'met    ' if goal['met'] else 'NOT MET'} {value:>8} (goal {goal['goal']:g})  {goal['name']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
