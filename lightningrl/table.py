"""The records that cross into JAX.

Notation, used everywhere: N transitions, E edges (action tokens), R rollouts, T tokens of a row, B rows, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import jax
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray
CreditKind = Literal["return", "advantage"]


@struct.dataclass
class TransitionTable:
    """One entry a transition, padded to a static N. Padding has `valid` false, `rollout` and `group` 0, everything else 0.

    Entries are in order of (rollout, turn): the transitions of a rollout are consecutive.
    """

    rollout: Array  # int32 [N], 0 … R-1
    group: Array  # int32 [N], 0 … G-1
    turn: Array  # int32 [N], 0, 1, … within the rollout
    role: Array  # int32 [N], index into the sorted role names
    reward: Array  # float32 [N], intermediate reward
    outcome: Array  # float32 [N, D], the rollout's named outcomes, "reward" first, the rest sorted by name
    num_tokens: Array  # int32 [N], response tokens
    weight: Array  # float32 [N], 1 / transitions of its rollout
    trainable: Array  # bool [N]
    valid: Array  # bool [N], false for padding


@struct.dataclass
class TokenTable:
    """One entry an edge: an action token of a transition. Padding has `mask` false and `transition` 0."""

    transition: Array  # int32 [E], index into TransitionTable
    k: Array  # int32 [E], index within the response
    node: Array  # int32 [E], flat index (row * T + column) within its micro-batch: where the log-prob is read
    token: Array  # int32 [E], the action
    temperature: Array  # float32 [E], of the sampling distribution
    old_logp: Array  # float32 [E], under the policy that the update starts from
    behaviour_logp: Array  # float32 [E], as recorded by the sampler
    ref_logp: Array  # float32 [E], under the reference policy; 0 where there is none
    mask: Array  # bool [E], true where a loss is wanted


@struct.dataclass
class Evidence:
    """What the rollouts alone don't say; every field optional. A recipe names those it needs."""

    value: Array | None = None  # float32 [N], critic's value of the state before the transition


@struct.dataclass
class Credit:
    """What each transition earned."""

    value: Array  # float32 [N]
    kind: CreditKind = struct.field(pytree_node=False)  # "return": a baseline is still to be taken off; "advantage": only scaled


@struct.dataclass
class UnitCounts:
    """For each edge, how many masked edges its unit has in the whole batch: what makes aggregations add up over micro-batches."""

    sequence_tokens: Array  # float32 [E], masked edges of its transition
    rollout_tokens: Array  # float32 [E], masked edges of its rollout
    group_tokens: Array  # float32 [E], masked edges of its group (prompt)


@struct.dataclass
class LossInputs:
    """TokenTable and what the step computes: all that a loss may look at. Every array [E]."""

    tokens: TokenTable
    counts: UnitCounts
    advantage: Array  # float32 [E]
    logp: Array  # float32 [E], differentiable
    entropy: Array  # float32 [E], of the tempered distribution at the node
    value: Array  # float32 [E], differentiable; 0 without a critic
    old_value: Array  # float32 [E]
    value_target: Array  # float32 [E]
