from __future__ import annotations

import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

PROGRAM = """
import asyncio, sys, threading
from lightningrl.runtime import Runner, rollout_requests
from lightningrl.types import Task
from tests.runtime.fake_gateway import FakeGateway

def hangs(task, base_url, api_key):
    print("running", flush=True)
    while True:
        threading.Event().wait(60)

async def hangs_async(task, base_url, api_key):
    print("running", flush=True)
    await asyncio.sleep(600)

agent = hangs if sys.argv[1] == "sync" else hangs_async
requests = rollout_requests([Task("t", {})], phase="train", iteration=0, samples=1)
try:
    Runner(FakeGateway(), agent, None).run(requests, phase="train", iteration=0, seed=0)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_ctrl_c_ends_a_run_whose_agent_hangs(kind: str) -> None:
    command = [sys.executable, "-c", PROGRAM, kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=30)  # the agent itself would take ten minutes
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert (out, err, process.returncode) == ("interrupted\n", "", 0)
