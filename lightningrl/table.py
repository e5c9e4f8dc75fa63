"""The records that cross into JAX.

Notation, used everywhere: N transitions, E edges (action tokens), R rollouts, L pairs of a transition and a rollout through
it, T tokens of a row, B rows, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import jax
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray
CreditKind = Literal["return", "advantage"]


@struct.dataclass
class Tree:
    """Which transitions follow which, over all rollouts of a group: a transition that branched rollouts share stands once.

    A rollout that was never branched is a path of its own. Padding of the pairs has `path_valid` false and ids 0.
    """

    tree: Array  # int32 [N], 0 … N-1, trees of a group are those that were branched from one rollout
    parent: Array  # int32 [N], the transition before it, -1 at a root and at padding
    path_node: Array  # int32 [L], a transition …
    path_rollout: Array  # int32 [L], … and a rollout that goes through it, 0 … R-1
    path_outcome: Array  # float32 [L, D], that rollout's outcomes, as in TransitionTable
    path_valid: Array  # bool [L]


@struct.dataclass
class TransitionTable:
    """One entry a transition, padded to a static N. Padding has `valid` false, `next_anchor` and `tree.parent` -1, all else 0.

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
    anchor: Array  # int32 [N, K], 0 … N-1: equal at [:, k] where the last k+1 states of two rollouts of a group are equal
    next_anchor: Array  # int32 [N], anchor[:, 0] of the rollout's next transition; -1 after its last
    action: Array  # int32 [N], 0 … N-1: equal where role and response are equal
    tree: Tree


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
    token_value: Array | None = None  # float32 [E], critic's value of the state before the token
    branch_value: Array | None = None  # float32 [N, 2], Monte-Carlo mean return from the state before and after the transition
    branch_count: Array | None = None  # float32 [N, 2], rollouts that each mean is of
    potential: Array | None = None  # float32 [N, 2], Φ of the state before and after the transition
    predicted_return: Array | None = None  # float32 [N], return model's prediction after the transition (RUDDER, SPA)
    attention: Array | None = None  # float32 [N], weight of the transition in a return model's attention, not negative
    coalition: Array | None = None  # float32 [R, 2^M], value of every subset of a rollout's first M transitions; bit t is turn t
    hindsight_logp: Array | None = None  # float32 [N], log-prob of the response given the outcome too
    response_logp: Array | None = None  # float32 [N], log-prob of the response under the behaviour policy
    answer_logp: Array | None = None  # float32 [N, 2], mean log-prob of the true answer before and after the transition
    prm_logp: Array | None = None  # float32 [E], log-prob under the implicit process-reward model
    prm_ref_logp: Array | None = None  # float32 [E], under the reference it is measured against
    sum_pi2: Array | None = None  # float32 [E], Σₐ π(a)², for the optimal token baseline
    judge: Array | None = None  # float32 [N], score of the transition from outside
    greedy_reward: Array | None = None  # float32 [N], reward of the greedy rollout of its task
    role_baseline: Array | None = None  # float32 [N], running mean reward of its role


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
