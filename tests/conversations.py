"""Rollouts for tests of rows and of the train step: conversations whose calls go on from each other, of random tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightningrl.types import Rollout, Task, Transition


def call(prompt: Sequence[int], response: Sequence[int], turn: int, seed: int = 0) -> Transition:
    logprobs = np.random.default_rng([seed, turn]).uniform(-7, -5, len(response))
    return Transition(
        prompt_ids=np.array(prompt, np.int32),
        response_ids=np.array(response, np.int32),
        logprobs=logprobs.astype(np.float32),
        temperature=(1.0, 0.7)[turn % 2],
        policy_version=0,
        role="policy",
        turn=turn,
    )


def rollouts(seed: int = 3) -> list[Rollout]:
    """Six runs of two tasks: a conversation of up to three calls that extend each other, and a call apart."""
    rng = np.random.default_rng(seed)
    words = lambda n: rng.integers(7, 300, n).tolist()  # noqa: E731
    made = []
    for r in range(6):
        calls, seen = [], words(9)
        for turn in range(r % 3 + 1):
            response = words(int(rng.integers(1, 6)))
            calls.append(call(seen, response, turn, r))
            seen = seen + response + words(4)
        calls.append(call(words(12), words(3), len(calls), r))
        made.append(Rollout(f"r{r}", Task(f"t{r % 2}", {}), f"g{r % 2}", r, 0, tuple(calls), {"reward": float(r % 4 == 1)}))
    return made
