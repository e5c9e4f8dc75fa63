"""What an iteration was like: the numbers of its line in metrics.jsonl."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lightningrl.packing.rows import PackedBatch
from lightningrl.tabulate_tree import own_calls
from lightningrl.train import Scores
from lightningrl.types import Rollout

STAGES = ("agent", "sample", "pack", "evidence", "credit", "train", "sync", "eval")


class Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, other: Clock) -> None:
        for name, seconds in other.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def describe_rollouts(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Counts and means over rollouts, and whether continuing calls extend the earlier call's ids exactly."""
    ok = [r for r in rollouts if r.status == "ok"]
    transitions = [t for r in ok for t in r.transitions]
    continuing = [(r.transitions[t.continues], t) for r in ok for t in r.transitions if t.continues is not None]
    exact = sum(
        np.array_equal(t.prompt_ids[: len(b.prompt_ids) + len(b.response_ids)], np.concatenate([b.prompt_ids, b.response_ids]))
        for b, t in continuing
    )
    return {
        "train_reward": float(np.mean([r.reward for r in ok])) if ok else 0.0,
        "rollouts": len(rollouts),
        "failed": sum(r.status == "failed" for r in rollouts),
        "timed_out": sum(r.status == "timed_out" for r in rollouts),
        "calls": len(transitions),
        "calls_per_rollout": len(transitions) / max(len(ok), 1),
        "prompt_tokens": int(sum(len(t.prompt_ids) for t in transitions)),
        "response_tokens": int(sum(len(t.response_ids) for t in transitions)),
        "continuing_calls": len(continuing),
        "continuing_calls_exact": int(exact),
        "intermediate_reward": float(np.mean([sum(t.reward for t in r.transitions) for r in ok])) if ok else 0.0,
    }


def describe_extra(rollouts: Sequence[Rollout]) -> dict[str, int]:
    """What was run beside the rollouts of a batch, by branches and producers, and the tokens of the calls that it sampled itself."""
    calls = [t for r in own_calls(rollouts) for t in r.transitions]
    return {"extra_rollouts": len(rollouts), "extra_tokens": int(sum(len(t.prompt_ids) + len(t.response_ids) for t in calls))}


def describe_cost(before: Mapping[str, int], metrics: Mapping[str, Any]) -> dict[str, int]:
    """What training has come to after an iteration, extra rollouts counted: recipes are compared at equal numbers of them.

    Tokens are those of prompts and responses of rollouts that ran to their end; evaluations count for nothing.
    """
    of_iteration = {
        "rollouts_so_far": ("rollouts", "extra_rollouts"),
        "tokens_so_far": ("prompt_tokens", "response_tokens", "extra_tokens"),
    }
    return {so_far: before.get(so_far, 0) + sum(metrics.get(name, 0) for name in names) for so_far, names in of_iteration.items()}


def describe_staleness(rollouts: Sequence[Rollout], version: int) -> dict[str, float]:
    """How many versions the policy that sampled each trained call is behind the one that is updated."""
    behind = [version - t.policy_version for r in rollouts if r.status == "ok" for t in r.transitions if t.trainable]
    return {"staleness_max": max(behind, default=0), "staleness_mean": float(np.mean(behind)) if behind else 0.0}


def describe_gap(batches: Sequence[PackedBatch], scores: Sequence[Scores]) -> dict[str, float]:
    """How far the sampler's log-probs are from the trainer's, of the same weights."""
    gaps = np.concatenate([np.abs(np.asarray(s.logp) - b.edges.behaviour_logp)[b.edges.mask] for b, s in zip(batches, scores, strict=True)])
    return {"logprob_gap_max": float(gaps.max()), "logprob_gap_mean": float(gaps.mean(dtype=np.float64))}


def describe_time(clock: Clock, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of every stage, and tokens per second of those that have tokens."""
    times = {f"{name}_seconds": clock.seconds.get(name, 0.0) for name in STAGES}
    rates = {
        "sampled_tokens_per_second": (metrics.get("response_tokens", 0), clock.seconds.get("sample", 0.0)),
        "read_tokens_per_second": (metrics.get("prompt_tokens", 0), clock.seconds.get("sample", 0.0)),
        "trained_tokens_per_second": (metrics.get("trained_tokens", 0), clock.seconds.get("train", 0.0)),
    }
    return times | {name: tokens / seconds for name, (tokens, seconds) in rates.items() if seconds > 0}
