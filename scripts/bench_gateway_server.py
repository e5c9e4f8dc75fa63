"""The server of bench_gateway.py: the gateway in a process of its own, in front of a policy that costs nothing or of a small real one.

    python scripts/bench_gateway_server.py no-op|model

It prints its url as JSON, then obeys lines on standard input: `open N` opens N rollouts and prints their keys, `close` closes them and
prints what was recorded. It ends with its input.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
from concurrent.futures import Future
from typing import Any

import numpy as np

from lightningrl.gateway import Gateway
from lightningrl.types import Completion, Sampler

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from bench_gateway_agents import REPLY, make_tokenizer  # noqa: E402

CONTEXT = 512


class NoOp:
    """A policy that says the same few tokens at once: all that is left to measure is the gateway."""

    context_length, queue_length = CONTEXT, 0

    def __init__(self, tokenizer: Any) -> None:
        ids = np.asarray([*tokenizer.encode(REPLY), tokenizer.eos_token_id], np.int32)
        self._completion = Completion(ids, np.full(len(ids), -1.0, np.float32), "stop", 0, REPLY)

    def submit(self, *_: Any) -> Future[Completion]:
        future: Future[Completion] = Future()
        future.set_result(self._completion)
        return future


def model(given: contextlib.ExitStack, tokenizer: Any) -> Sampler:
    """A policy of the quickstart's size with random weights. Its import, of JAX, is no part of the other server's memory."""
    import jax

    from lightningrl.config import FitConfig
    from lightningrl.model.config import ModelConfig
    from lightningrl.model.params import init_params
    from lightningrl.sampler.engine import PolicySampler, SamplerSettings

    config = FitConfig()
    shape = ModelConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.hidden_size // config.num_heads,
        intermediate_size=config.intermediate_size,
        max_positions=CONTEXT,
        qk_norm=True,
    )
    settings = SamplerSettings(slots=config.slots, context_length=CONTEXT)
    return given.enter_context(PolicySampler(init_params(shape, jax.random.key(0)), shape, tokenizer, settings))


def main(policy: str) -> None:
    tokenizer = make_tokenizer()
    with contextlib.ExitStack() as given:
        sampler = NoOp(tokenizer) if policy == "no-op" else model(given, tokenizer)
        gateway = given.enter_context(Gateway(sampler, tokenizer))
        print(json.dumps({"url": gateway.base_url}), flush=True)
        opened, count = [], 0
        for line in sys.stdin:
            command, *number = line.split()
            if command == "open":
                new = range(count, count + int(number[0]))
                opened = [gateway.open(f"train/0/{k // 8}/{k % 8}", seed=0) for k in new]
                count = new.stop
                print(json.dumps(opened), flush=True)
            else:
                records = [gateway.close(key) for key in opened]
                calls = [transition for record in records for transition in record.transitions]
                continued = sum(transition.continues is not None for transition in calls)
                rewarded = sum(record.reward is not None for record in records)
                print(json.dumps({"calls": len(calls), "continued": continued, "rewards": rewarded}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
