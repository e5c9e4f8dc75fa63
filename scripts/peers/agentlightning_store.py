"""Serves agentlightning's store to scripts/bench_gateway.py, in agentlightning's own environment.

    PYTHON scripts/peers/agentlightning_store.py PORT

As `agl store --port PORT` does it: an in-memory store behind one uvicorn in one process, without metrics or debug messages. On a line on
standard input it says how many rollouts and spans it holds; it ends with its input.
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


async def main(port: int) -> None:
    agentlightning.setup_logging("ERROR")
    store = InMemoryLightningStore(thread_safe=True)
    server = LightningStoreServer(store, host="127.0.0.1", port=port, launch_mode="asyncio")
    await server.start()
    print(json.dumps({"url": server.endpoint}), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        held = await store.statistics()
        print(json.dumps({"rollouts": held.get("total_rollouts"), "spans": held.get("total_spans")}), flush=True)
    await server.stop()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
