"""The running mean reward of every role, for role-conditioned advantages (RAE, SPIRAL, arXiv 2506.24119)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lightningrl.advantages.baselines import Steps, rae_update
from lightningrl.table import Array, Evidence
from lightningrl.tabulate import role_names, table_from_rollouts, table_size, trained_rollouts
from lightningrl.types import Rollout

_update = jax.jit(rae_update, static_argnames="steps")


def role_baselines(
    policy: Any,
    aux: Mapping[str, float] | None,
    rollouts: Sequence[Rollout],
    key: Array,
    *,
    decay: float = 0.95,
    steps: Steps = "rollouts",
    earned: Callable[[Rollout], Sequence[float]] | None = None,
    multiple: int = 1,
) -> tuple[Evidence, dict[str, float]]:
    """The evidence producer of `role_baseline`: b of each call's role before this batch, and b after it.

      bₚ ← α bₚ + (1 - α) Rₚ   once a rollout,   A = Rₚ - bₚ with b as it was before

    SPIRAL's code takes b out before it moves it, with the comment that this is the unbiased order (`train_spiral.py`), and prime-rl's
    does too; the paper's own algorithm was not read. There each rollout is scored by what the earlier ones of its batch have
    made of b. Here the whole batch is scored first, so that no rollout's score depends on where it stands in the batch,
    and b moves by `rae_update`, each rollout in which the role acted counting once, however many calls it made.

    Args:
      policy, key: not read.
      aux: {role: b}, a JSON object; None at first. A role that is not in it has b = 0, as in SPIRAL.
      rollouts: those of the table, in its order.
      decay: α in [0, 1]; SPIRAL's is 0.95.
      steps: "rollouts" moves b as far as n steps of α do, SPIRAL's pace; "batch" once a batch.
      earned: what each call of a rollout earned, in order of turn, where roles earn different things; of a role with several calls
        the mean. By default the rollout's reward.
      multiple: N is the least multiple of it that holds the transitions.

    Returns:
      The evidence, float32 [N], 0 at padding; and b after the batch, with roles that did not act as they were.

    Raises:
      ValueError: unknown steps, α out of range, or `earned` gives another number of numbers than there are calls.
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"role_baselines has a decay of {decay}: it must be in [0, 1]")
    known = {name: float(value) for name, value in (aux or {}).items()}
    calls = sum(len(rollout.transitions) for rollout in trained_rollouts(rollouts))
    size = table_size(calls, multiple)
    table, roles = table_from_rollouts(rollouts, size=size), role_names(rollouts)
    if not roles:
        return Evidence(role_baseline=np.zeros(size, np.float32)), known
    before = np.array([known.get(role, 0.0) for role in roles], np.float32)
    values = None if earned is None else _values(rollouts, earned, size)
    after = jax.device_get(_update(before, table, decay, values=values, steps=steps))
    evidence = Evidence(role_baseline=np.where(table.valid, before[table.role], np.float32(0.0)))
    return evidence, known | {role: float(b) for role, b in zip(roles, after, strict=True)}


def _values(rollouts: Sequence[Rollout], earned: Callable[[Rollout], Sequence[float]], size: int) -> np.ndarray:
    values, row = np.zeros(size, np.float32), 0
    for rollout in trained_rollouts(rollouts):
        mine = list(earned(rollout))
        if len(mine) != len(rollout.transitions):
            raise ValueError(f"rollout {rollout.id!r} has {len(rollout.transitions)} calls, but {len(mine)} numbers say what they earned")
        values[row : row + len(mine)] = mine
        row += len(mine)
    return values
