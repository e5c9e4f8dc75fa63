"""Agents on a Ray cluster of two nodes, all of them on loopback; one node is killed in mid-run."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

# Read when Ray is imported: every node has the loopback address, whatever others this machine has.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from lightningrl.config import FitConfig  # noqa: E402
from lightningrl.errors import UserError  # noqa: E402
from lightningrl.runtime import RolloutRequest, Runner, RunnerSettings, Store, rollout_requests  # noqa: E402
from lightningrl.runtime.on_ray import OnRay, import_ray  # noqa: E402
from lightningrl.types import Rollout, Task  # noqa: E402
from tests.runtime.fake_gateway import FakeGateway  # noqa: E402
from tests.runtime.running import is_running, until  # noqa: E402

pytestmark = pytest.mark.slow
SMALL = {"object_store_memory": 80_000_000, "include_dashboard": False}
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 3}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": QUICK, **SMALL})
    yield made
    made.shutdown()


def say(base_url: str, api_key: str, text: str) -> str:
    body = {"model": "policy", "messages": [{"role": "user", "content": text}]}
    headers = {"Authorization": f"Bearer {api_key}"}
    reply = httpx.post(f"{base_url}/chat/completions", json=body, headers=headers, timeout=30).raise_for_status()
    return reply.json()["choices"][0]["message"]["content"]


def run(agent: Any, tasks: list[Task], cluster: Cluster, gateway: FakeGateway, **settings: Any) -> list[Rollout]:
    options = {"time_limit_s": 60.0, **settings.pop("settings", {})}
    with OnRay(agent, address=cluster.address) as call_agent:
        runner = Runner(gateway, agent, None, RunnerSettings(**options), call_agent=call_agent, **settings)
        return runner.run(requests(tasks), phase="train", iteration=0, seed=0)


def requests(tasks: list[Task]) -> list[RolloutRequest]:
    return rollout_requests(tasks, phase="train", iteration=0, samples=1)


def test_agents_of_every_kind_answer_from_other_processes(cluster: Cluster) -> None:
    here = os.getpid()

    async def agent(task: dict, base_url: str, api_key: str) -> dict:
        if task["kind"] == "error":
            raise KeyError("of the agent")
        if task["kind"] == "server error":
            await asyncio.to_thread(say, base_url, api_key, "fail")
        if task["kind"] == "crash":
            os._exit(7)
        if task["kind"] == "unsendable":
            return {"reward": threading.Lock()}
        if task["kind"] == "slow":
            time.sleep(60)  # blocks the agents' loop, too
        await asyncio.to_thread(say, base_url, api_key, task["kind"])
        return {"reward": 1.0, "elsewhere": float(os.getpid() != here)}

    kinds = ["fine", "error", "server error", "crash", "unsendable", "slow"]
    with FakeGateway(lambda body: 500 if body["messages"][0]["content"] == "fail" else "said") as gateway:
        tasks = [Task(kind, {"kind": kind}) for kind in kinds]
        rollouts = run(agent, tasks, cluster, gateway, settings={"time_limit_s": 8.0, "max_attempts": 2})
        assert not gateway.open_sessions
    fine, error, server, crash, unsendable, slow = rollouts
    assert fine.outcome == {"reward": 1.0, "elsewhere": 1.0} and [t.text for t in fine.transitions] == ["said"]
    assert [r.status for r in rollouts[1:]] == ["failed"] * 4 + ["timed_out"]
    assert [r.attempt for r in rollouts] == [0, 0, 1, 1, 0, 0]  # only what the infrastructure did is tried again
    assert "KeyError: 'of the agent'" in error.error and "test_ray.py" in error.error
    assert "500 Internal Server Error" in server.error
    assert "WorkerCrashedError" in crash.error
    assert "lock" in unsendable.error
    assert slow.error == "the agent was still running after the time limit of 8 s"


def test_a_node_that_dies_loses_no_rollout_and_none_counts_twice(cluster: Cluster, tmp_path: pathlib.Path) -> None:
    second = cluster.add_node(num_cpus=2, **SMALL)
    assert len([node for node in ray_nodes(cluster) if node["Alive"]]) == 2

    def agent(task: dict, base_url: str, api_key: str) -> float:
        """Calls three times, from wherever it is; what is on the second node waits there after its first call, to be killed."""
        node = ray.get_runtime_context().get_node_id()
        for turn in range(3):
            say(base_url, api_key, f"{task['i']} {turn} {node}")
            if node == task["doomed"]:
                time.sleep(60)
        return float(task["i"])

    on_doomed = threading.Semaphore(0)

    def reply(body: dict) -> str:
        if body["messages"][0]["content"].endswith(second.node_id):
            on_doomed.release()
        return "said"

    killed = threading.Event()

    def kill() -> None:
        assert on_doomed.acquire(timeout=60) and on_doomed.acquire(timeout=60)  # both of its CPUs are in the middle of a rollout
        cluster.remove_node(second, allow_graceful=False)
        killed.set()

    killer = threading.Thread(target=kill)
    killer.start()
    tasks = [Task(f"t{i}", {"i": i, "doomed": second.node_id}) for i in range(8)]
    with FakeGateway(reply) as gateway, Store(tmp_path / "rollouts.sqlite") as store:
        rollouts = run(agent, tasks, cluster, gateway, store=store)
        killer.join()
        assert killed.is_set() and not gateway.open_sessions
        assert [r.id for r in rollouts] == [r.id for r in requests(tasks)]
        assert [(r.status, r.reward) for r in rollouts] == [("ok", float(i)) for i in range(8)]
        for rollout in rollouts:  # the calls of the attempt that counts, and of no other
            said = [t.messages[0]["content"].split() for t in rollout.transitions]
            assert [(i, turn) for i, turn, _ in said] == [(rollout.task.id[1:], str(turn)) for turn in range(3)]
            assert second.node_id not in {node for _, _, node in said}
        again = [r for r in rollouts if r.attempt > 0]
        assert len(again) == 2
        keys = Counter(id_ for _, id_ in gateway.opened)
        assert {r.id: keys[r.id] for r in rollouts} == {r.id: r.attempt + 1 for r in rollouts}
        assert store.ids("train", 0, "ok") == [r.id for r in rollouts]
        for rollout in again:
            (entry,) = store.log(rollout.id)
            assert entry.attempt == 0 and "Ray lost the attempt" in entry.text and "call 0 (policy): said" in entry.text


def ray_nodes(cluster: Cluster) -> list[dict]:
    ray.init(address=cluster.address, logging_level="error")
    try:
        return ray.nodes()
    finally:
        ray.shutdown()


def test_ctrl_c_kills_the_tasks(cluster: Cluster, tmp_path: pathlib.Path) -> None:
    pid_file = tmp_path / "pid"

    def agent(task: dict, base_url: str, api_key: str) -> float:
        pid_file.write_text(str(os.getpid()))
        time.sleep(60)
        return 1.0

    gateway = FakeGateway()
    with OnRay(agent, address=cluster.address) as call_agent:
        runner = Runner(gateway, agent, None, call_agent=call_agent)

        def ctrl_c() -> None:
            until(pid_file.exists)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        timer = threading.Thread(target=ctrl_c)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            runner.run(requests([Task("t", {})]), phase="train", iteration=0, seed=0)
        timer.join()
        assert not gateway.open_sessions  # the agent itself would sleep for a minute
        until(lambda: not is_running(int(pid_file.read_text())))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"cpus": 64.0}, "no host of the Ray cluster has the ray_cpus=64 CPUs that an agent asks for: the most is 1"),
        ({"address": "127.0.0.1:1"}, "there is no Ray cluster at 127.0.0.1:1"),
    ],
)
def test_a_cluster_that_cannot_be_used(cluster: Cluster, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence), OnRay(run, **{"address": cluster.address, **settings}):
        pass
    assert not ray.is_initialized()


def test_an_agent_that_cannot_be_sent(cluster: Cluster) -> None:
    lock = threading.Lock()
    with pytest.raises(UserError, match="the agent cannot be sent to other processes"), OnRay(lambda *_: lock, address=cluster.address):
        pass


@pytest.mark.parametrize(("host", "url"), [("0.0.0.0", "http://10.0.0.7:81/v1"), ("127.0.0.1", "http://127.0.0.1:81/v1")])
def test_an_address_that_other_hosts_can_reach(host: str, url: str) -> None:
    place = on_hosts("10.0.0.7", "10.0.0.8", gateway_host=host)
    assert place._reachable(f"http://{host}:81/v1") == url
    if host == "0.0.0.0":
        place._check_hosts()
        return
    with pytest.raises(UserError, match="the gateway listens on 127.0.0.1, which the 2 hosts .* give --host=10.0.0.7 or another"):
        place._check_hosts()
    on_hosts("127.0.0.1", gateway_host=host)._check_hosts()


def on_hosts(*hosts: str, gateway_host: str) -> OnRay:
    """With a cluster that is only said to be there."""
    place = OnRay(run, gateway_host=gateway_host)
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}, "NodeManagerAddress": host} for host in hosts]
    place._ray = types.SimpleNamespace(nodes=lambda: nodes, util=types.SimpleNamespace(get_node_ip_address=lambda: hosts[0]))
    return place


def test_the_settings_of_a_run_lead_to_the_cluster(cluster: Cluster) -> None:
    from lightningrl.serving import (
        make_sampler,
        place_of_agents,
    )  # here, since processes of the cluster import this file, and JAX takes long

    config = FitConfig(runner="ray", ray_address=cluster.address, ray_cpus=0.5)
    with place_of_agents(lambda task, base_url, api_key: [task, base_url, api_key], config) as call_agent:
        assert call_agent is not None
        answer, seconds = asyncio.run(call_agent({"i": 1}, "http://127.0.0.1:9/v1", "key", 30.0))
    assert answer == [{"i": 1}, "http://127.0.0.1:9/v1", "key"] and 0 < seconds < 30
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    with place_of_agents(make_sampler, FitConfig()) as call_agent:
        assert call_agent is None  # the runner's own place


def test_a_run_on_a_cluster_is_the_run_on_this_host(cluster: Cluster, tmp_path: pathlib.Path) -> None:
    from lightningrl.fit import CommandConfig, fit
    from lightningrl.metrics import without_timings
    from tests.test_fit import TINY

    def agent(task: dict[str, Any], base_url: str, api_key: str) -> float:
        body = {"model": "policy", "messages": [{"role": "user", "content": task["say"]}]}
        headers = {"Authorization": f"Bearer {api_key}"}
        reply = httpx.post(f"{base_url}/chat/completions", json=body, headers=headers, timeout=30).raise_for_status()
        text = reply.json()["choices"][0]["message"]["content"]
        return min(1.0, sum(character.isascii() for character in text) / 12)

    tasks = [Task(f"t{i}", {"say": f"word {i}"}) for i in range(3)]

    def run(runner: str) -> list[dict[str, Any]]:
        places = {"runner": runner, "ray_address": cluster.address, "ray_cpus": 0.5, "cache": str(tmp_path / "cache")}
        config = CommandConfig(out=str(tmp_path / runner), **places, **TINY)
        return [without_timings(row) for row in fit(agent, tasks[:2], None, config, heldout={"heldout": tasks[2:]}).metrics]

    metrics = run("ray")
    assert metrics == run("local")
    assert all(row["failed"] == 0 for row in metrics[1:])


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--runner=ray needs Ray, which is not installed: pip install 'lightningrl\[ray\]'"):
        import_ray.__wrapped__()
