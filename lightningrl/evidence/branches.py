"""Branched rollouts: recorded runs are started anew in the middle, and what they come to says what a state was worth.

A branch repeats the first calls of its parent (`gateway.replay`) and samples the rest, so it costs a whole run of the agent and of
its tools, but only the tokens after the branch. The loop hands in what runs them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lightningrl.evidence.producer import RunRequests
from lightningrl.table import Array, Evidence
from lightningrl.tabulate import table_size, trained_rollouts
from lightningrl.tabulate_tree import first_sampled
from lightningrl.types import Replay, Rollout, RolloutRequest, Transition

Points = Callable[[Rollout, np.random.Generator], Iterable[int]]  # the turns before which a rollout is branched


def every_call(rollout: Rollout, rng: np.random.Generator) -> Iterable[int]:
    """Before every call, as VinePPO (arXiv 2410.01679) does."""
    return range(len(rollout.transitions))


def later_calls(rollout: Rollout, rng: np.random.Generator) -> Iterable[int]:
    """Before every call but the first: the other rollouts of a group are samples of how its first state goes on."""
    return range(1, len(rollout.transitions))


def random_calls(rollout: Rollout, rng: np.random.Generator, *, count: int) -> Iterable[int]:
    """Before `count` calls, all different, or before every call where there are fewer; without a look at outcomes."""
    calls = len(rollout.transitions)
    return sorted(rng.choice(calls, min(count, calls), replace=False).tolist())


def branch_requests(
    rollouts: Sequence[Rollout], *, per_point: int, points: Points = every_call, seed: Sequence[int] = (0,)
) -> list[RolloutRequest]:
    """`per_point` runs for each point of each rollout that ran to its end, a point's together.

    The id of a branch is its parent's with the turn and a number ("train/3/task/0@2.1"), and decides what it samples. Its group is
    its parent's, its sample its number.

    Args:
      rollouts: the parents, branches among them too; those that are not `ok` or made no call have no branches.
      per_point: K ≥ 1.
      points: turns, 0 … calls-1, each once.
      seed: of the generator that `points` gets, one for each rollout, by its id: which others there are makes no difference.

    Raises:
      ValueError: `per_point` is not positive, or `points` names a turn that the rollout doesn't have.
    """
    if per_point < 1:
        raise ValueError(f"per_point is {per_point}: a point needs at least one branch to say anything")
    requests = []
    for parent in trained_rollouts(rollouts):
        words = np.frombuffer(hashlib.blake2b(parent.id.encode(), digest_size=16).digest(), "<u4").tolist()
        for turn in points(parent, np.random.default_rng([*seed, *words])):
            if not 0 <= turn < len(parent.transitions):
                raise ValueError(f"rollout {parent.id!r} has {len(parent.transitions)} calls: it has no call {turn} to branch before")
            replay = Replay(parent, turn)
            requests += [RolloutRequest(f"{parent.id}@{turn}.{k}", parent.task, parent.group, k, replay) for k in range(per_point)]
    return requests


def branch_values(
    rollouts: Sequence[Rollout], branches: Sequence[Rollout], *, size: int, gamma: float = 1.0, pooled: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Mean return of rollouts that went on from the state before and after each transition.

      V(s) = mean over rollouts i that sampled on from s of Σ_{u≥t} γ^(u-t) r′ᵢᵤ,   r′: intermediate rewards, the outcome on the last turn

    The state before call t is all earlier calls and responses of the rollout, the role and exact prompt of call t, and the
    policy version and temperature that answer it; the state after call t is that before call t+1, and after the last call
    the return is the outcome itself. A rollout never counts for its own states, so V(before t) does not depend on the call
    that it is a baseline for. A branch that repeated its parent's calls and then met another prompt (a tool answered
    otherwise) is in another state and says nothing about its parent's.

    Args:
      rollouts: those of the table, in its order.
      branches: what `branch_requests` came to; those that are not `ok` are never used.
      size: N of the table.
      gamma: γ in [0, 1], per turn, as the assigner's.
      pooled: whether every rollout of the group that came to exactly this state counts, recorded ones and branches of others
        too: all are fresh samples of how it goes on. False: only branches of this rollout before this call, K at most, as in VinePPO.

    Returns:
      (`branch_value`, `branch_count`), float32 [N, 2] each, in the table's order. Where no rollout went on from a state both are
      0; at padding too. The count after a last call is 1.

    Raises:
      ValueError: `size` is too small.
    """
    used, fresh = trained_rollouts(rollouts), trained_rollouts(branches)
    needed = sum(len(rollout.transitions) for rollout in used)
    if needed > size:
        raise ValueError(f"The rollouts have {needed} transitions but the table holds {size}: give it a size of at least {needed}.")
    samples: dict[tuple[str | None, bytes], list[tuple[str, float]]] = defaultdict(list)
    for rollout in [*used, *fresh] if pooled else fresh:
        owner = None if pooled else rollout.parent
        own = list(zip(_states(rollout), _returns(rollout, gamma), strict=True))[first_sampled(rollout) :]
        for state, gain in own if pooled else own[:1]:
            samples[owner, state].append((rollout.id, gain))

    value, count = np.zeros((size, 2), np.float32), np.zeros((size, 2), np.float32)
    row = 0
    for rollout in used:
        owner = None if pooled else rollout.id
        others = [[gain for id_, gain in samples.get((owner, state), ()) if id_ != rollout.id] for state in _states(rollout)]
        around = [*others, [rollout.reward]]
        rows = slice(row, row + len(others))
        value[rows] = [[_mean(before), _mean(after)] for before, after in itertools.pairwise(around)]
        count[rows] = [[len(before), len(after)] for before, after in itertools.pairwise(around)]
        row = rows.stop
    return value, count


def branch_rollouts(
    policy: Any,
    aux: Mapping[str, float] | None,
    rollouts: Sequence[Rollout],
    key: Array,
    *,
    run: RunRequests,
    per_point: int = 4,
    points: Points = every_call,
    gamma: float = 1.0,
    pooled: bool = True,
    multiple: int = 1,
) -> tuple[Evidence, dict[str, float]]:
    """The evidence producer of `branch_value` and `branch_count`.

    Args:
      policy: not read; `run` samples from it, before it is updated.
      aux: totals so far, of what `describe_branches` counts; None at first.
      rollouts: those of the table, in its order.
      key: of `points` that draw.
      run: runs requests with the parents' own settings, as `loop.run_agents` does.
      per_point, points, gamma, pooled: of `branch_requests` and `branch_values`.
      multiple: N is the least multiple of it that holds the transitions.

    Returns:
      The evidence, [N, 2], and the totals with this call's added.
    """
    seed = [int(word) for word in np.ravel(jax.random.key_data(key))]
    branches = run(branch_requests(rollouts, per_point=per_point, points=points, seed=seed), phase="branch")
    calls = sum(len(rollout.transitions) for rollout in trained_rollouts(rollouts))
    value, count = branch_values(rollouts, branches, size=table_size(calls, multiple), gamma=gamma, pooled=pooled)
    new = describe_branches(rollouts, branches)
    return Evidence(branch_value=value, branch_count=count), {name: (aux or {}).get(name, 0.0) + n for name, n in new.items()}


def describe_branches(rollouts: Sequence[Rollout], branches: Sequence[Rollout]) -> dict[str, float]:
    """What branching cost, and how much of it was of use; all are counts, which add up.

    `branch_elsewhere` are those that ran to their end but went on from another state than their parent's: another prompt, or no call
    at all, came where they branched. `branch_calls` and `branch_tokens` were sampled, also by runs that are not used.
    """
    parents = {rollout.id: rollout for rollout in [*rollouts, *branches]}
    sampled = [t for branch in branches for t in _in_order(branch)[first_sampled(branch) :]]
    elsewhere = [branch for branch in branches if branch.status == "ok" and not _goes_on(branch, parents.get(branch.parent or ""))]
    counts = {f"branch_{status}": sum(b.status == status for b in branches) for status in ("diverged", "failed", "timed_out")}
    return {
        "branch_rollouts": float(len(branches)),
        **{name: float(number) for name, number in counts.items()},
        "branch_elsewhere": float(len(elsewhere)),
        "branch_calls": float(len(sampled)),
        "branch_tokens": float(sum(len(t.response_ids) for t in sampled)),
    }


def _goes_on(branch: Rollout, parent: Rollout | None) -> bool:
    turn = first_sampled(branch)
    if parent is None or turn >= len(branch.transitions) or turn >= len(parent.transitions):
        return False
    return _states(branch)[turn] == _states(parent)[turn]


def _states(rollout: Rollout) -> list[bytes]:
    """The state before each call, hashed, in order of turn."""
    history = hashlib.blake2b(repr((rollout.group, rollout.task.id)).encode(), digest_size=16)
    states = []
    for transition in _in_order(rollout):
        history.update(_digest(transition.role, transition.prompt_ids))
        states.append(history.digest() + _digest((transition.policy_version, transition.temperature), ()))
        history.update(_digest("response", transition.response_ids))
    return states


def _returns(rollout: Rollout, gamma: float) -> list[float]:
    """Σ_{u≥t} γ^(u-t) r′ᵤ of each turn."""
    rewards = [transition.reward for transition in _in_order(rollout)]
    rewards[-1] += rollout.reward
    return list(itertools.accumulate(reversed(rewards), lambda ahead, reward: reward + gamma * ahead))[::-1]


def _in_order(rollout: Rollout) -> list[Transition]:
    return sorted(rollout.transitions, key=lambda transition: transition.turn)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _digest(what: Hashable, ids: Sequence[int] | np.ndarray) -> bytes:
    head = repr(what).encode()
    return hashlib.blake2b(len(head).to_bytes(4, "little") + head + np.asarray(ids, np.int32).tobytes(), digest_size=16).digest()
