"""What a return model reads of rollouts: for each call the tokens that are new in its prompt, its response, and its role."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from flax import struct

from lightningrl.table import Array
from lightningrl.types import Rollout, Transition

# R is padded to multiples of the first, K to a power of two of at least the second, T to a power of two: few shapes are compiled.
ROLLOUT_MULTIPLE, LEAST_TOKENS = 32, 4096


@struct.dataclass
class Calls:
    """Rollouts as R × T calls, and all their K tokens in one list. Padding has `exists` false and `share` 0."""

    token: Array  # int32 [K], 0 … buckets-1
    place: Array  # int32 [K], (r T + t) 2 + part: part 0 is the prompt's new tokens, 1 the response
    share: Array  # float32 [K], 1 / tokens of that part, so that a sum is a mean
    role: Array  # int32 [R, T], 0 … roles-1
    exists: Array  # bool [R, T]
    outcome: Array  # float32 [R], the reward that is trained on


def call_features(rollouts: Sequence[Rollout], *, buckets: int, roles: int, prompt_tokens: int) -> Calls:
    """The calls of rollouts in order of turn, padded; NumPy arrays.

    Args:
      rollouts: those of the table, in its order.
      buckets: of tokens: a token is in bucket id mod `buckets`, its own where there are that many.
      roles: buckets of roles, by a hash of the name: two roles may share one.
      prompt_tokens: at most that many of a prompt's new tokens are read, the last ones.
    """
    ordered = [sorted(rollout.transitions, key=lambda transition: transition.turn) for rollout in rollouts]
    rows = -(-max(len(rollouts), 1) // ROLLOUT_MULTIPLE) * ROLLOUT_MULTIPLE
    turns = _power_of_two(max((len(calls) for calls in ordered), default=1))
    role, exists, outcome = np.zeros((rows, turns), np.int32), np.zeros((rows, turns), bool), np.zeros(rows, np.float32)
    parts: list[tuple[int, np.ndarray]] = []
    for r, (rollout, calls) in enumerate(zip(rollouts, ordered, strict=True)):
        outcome[r] = rollout.reward
        by_turn = {transition.turn: transition for transition in calls}
        for t, transition in enumerate(calls):
            role[r, t], exists[r, t] = role_bucket(transition.role, roles), True
            new = new_tokens(transition, by_turn)[-prompt_tokens:]
            parts += [((r * turns + t) * 2, new), ((r * turns + t) * 2 + 1, transition.response_ids)]

    token, place, share = _token_list(parts, buckets)
    return Calls(token=token, place=place, share=share, role=role, exists=exists, outcome=outcome)


def new_tokens(transition: Transition, by_turn: dict[int, Transition]) -> np.ndarray:
    """What of a prompt was in no earlier call: the tokens after the prompt and response that it continues, or all."""
    if transition.continues is None:
        return transition.prompt_ids
    before = by_turn[transition.continues]
    return transition.prompt_ids[len(before.prompt_ids) + len(before.response_ids) :]


def role_bucket(name: str, roles: int) -> int:
    """The same in every process, unlike Python's own hash."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") % roles


def _token_list(parts: Sequence[tuple[int, np.ndarray]], buckets: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    count = sum(len(ids) for _, ids in parts)
    token, place, share = (np.zeros(_power_of_two(max(count, LEAST_TOKENS)), dtype) for dtype in (np.int32, np.int32, np.float32))
    start = 0
    for where, ids in parts:
        mine = slice(start, start + len(ids))
        token[mine], place[mine] = np.asarray(ids) % buckets, where
        share[mine] = 1.0 / max(len(ids), 1)
        start = mine.stop
    return token, place, share


def _power_of_two(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()
