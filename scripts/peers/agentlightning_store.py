"""Serves agentlightning's store to scripts/bench_gateway.py, in agentlightning's own environment.

    PYTHON scripts/peers/agentlightning_store.py PORT

As `agl store --port PORT` does it: an in-memory store behind one uvicorn in one process, without metrics or debug messages. It obeys lines
on standard input: `open N` prints N empty keys, `close` how many rollouts and spans came since the last line. It ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

# Its import asks services on the internet for prices and the newest release; neither is needed here.
os.environ.update(LITELLM_LOCAL_MODEL_COST_MAP="True", AGENTOPS_FAIL_SAFE="True")

import agentlightning  # noqa: E402
from agentlightning.store.client_server import LightningStoreServer  # noqa: E402
from agentlightning.store.memory import InMemoryLightningStore  # noqa: E402


async def held(store: InMemoryLightningStore) -> dict[str, int]:
    statistics = await store.statistics()
    return {"rollouts": statistics["total_rollouts"], "spans": statistics["total_spans"]}


async def main(port: int) -> None:
    agentlightning.setup_logging("ERROR")
    store = InMemoryLightningStore(thread_safe=True)
    server = LightningStoreServer(store, host="127.0.0.1", port=port, launch_mode="asyncio")
    await server.start()
    print(json.dumps({"url": server.endpoint}), flush=True)
    before = await held(store)
    while line := await asyncio.to_thread(sys.stdin.readline):
        command, *number = line.split()
        if command == "open":
            answer: object = [""] * int(number[0])
        else:
            now = await held(store)
            answer, before = {name: now[name] - before[name] for name in now}, now
        print(json.dumps(answer), flush=True)
    await server.stop()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
