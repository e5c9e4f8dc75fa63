"""What the policy earns without chance: a greedy rollout of every task, the baseline of ReMax (arXiv 2310.10505)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightningrl.evidence.producer import RunRequests
from lightningrl.table import Array, Evidence
from lightningrl.tabulate import table_size, trained_rollouts
from lightningrl.types import Rollout, RolloutRequest


def greedy_requests(rollouts: Sequence[Rollout]) -> list[RolloutRequest]:
    """One run for each group of the rollouts, by name; its id is that of the group's first rollout with `@greedy`."""
    first = {rollout.group: rollout for rollout in reversed(trained_rollouts(rollouts))}
    return [RolloutRequest(f"{first[group].id}@greedy", first[group].task, group, 0) for group in sorted(first)]


def greedy_rewards(
    policy: Any, aux: Mapping[str, float], rollouts: Sequence[Rollout], key: Array, *, run: RunRequests, multiple: int = 1
) -> tuple[Evidence, dict[str, float]]:
    """The evidence producer of `greedy_reward`: what the greedy rollout of each transition's task came to.

    A task whose greedy rollout failed has no baseline: it is given the mean of its sampled rollouts instead, and counted.

    Args:
      policy: not read; `run` samples from it, before it is updated. key: not read, nothing is drawn.
      aux: `greedy_rollouts` and `greedy_failed` so far.
      rollouts: those of the table, in its order.
      run: runs requests, as `loop.run_agents` does.
      multiple: N is the least multiple of it that holds the transitions.

    Returns:
      The evidence, float32 [N], 0 at padding; and the counts with this call's added.
    """
    used = trained_rollouts(rollouts)
    ran = run(greedy_requests(used), phase="greedy", temperature=0.0)
    earned = {rollout.group: rollout.reward for rollout in ran if rollout.status == "ok"}
    for group in {rollout.group for rollout in used} - earned.keys():
        earned[group] = float(np.mean([rollout.reward for rollout in used if rollout.group == group]))
    values = [earned[rollout.group] for rollout in used for _ in rollout.transitions]
    greedy = np.zeros(table_size(len(values), multiple), np.float32)
    greedy[: len(values)] = values
    new = {"greedy_rollouts": float(len(ran)), "greedy_failed": float(sum(rollout.status != "ok" for rollout in ran))}
    return Evidence(greedy_reward=greedy), {name: aux.get(name, 0.0) + n for name, n in new.items()}
