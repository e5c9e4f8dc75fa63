"""Every possible rollout of a process with its chance, in float64: the truth that the lab's is compared with.

All ways on from every rollout so far are written out, turn by turn, W of them at last. No value is ever taken over from a later turn.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lightningrl.lab.process import ACTIONS, STATES, TURNS, Process


class Ways(NamedTuple):
    """W rollouts. Where no call is made, `made` is false, the state is the one that the rollout ended in, and the action 0."""

    chance: np.ndarray  # float64 [W]
    state: np.ndarray  # int [W, T]
    action: np.ndarray  # int [W, T]
    made: np.ndarray  # bool [W, T]
    reward: np.ndarray  # float64 [W, T]
    outcome: np.ndarray  # float64 [W]

    @property
    def to_go(self) -> np.ndarray:
        """f64[W, T]: rewards of the calls from a turn on, and the outcome."""
        return np.cumsum(self.reward[:, ::-1], 1)[:, ::-1] + self.outcome[:, None]

    @property
    def paid(self) -> np.ndarray:
        return self.to_go[:, 0]


def exact(x: np.ndarray) -> np.ndarray:
    """What was written down before it became float32."""
    return np.round(np.asarray(x, np.float64), 6)


def policy(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(np.asarray(logits, np.float64))
    return exp / exp.sum(-1, keepdims=True)


def every_rollout(process: Process, pi: np.ndarray) -> Ways:
    """Every rollout; the chances sum to 1."""
    next_state, reward, outcome = exact(process.next_state), exact(process.reward), exact(process.outcome)
    assert np.isin(np.round(next_state.sum(-1), 9), (0.0, 1.0)).all()
    here = np.flatnonzero(process.start)
    chance = exact(process.start)[here]
    history: list[list[np.ndarray]] = []
    for _ in range(TURNS):
        ends = np.asarray(process.terminal)[here]
        # A rollout that has ended goes on in one way: as it is.
        ways = np.where(ends[:, None, None], 0.0, pi[here][:, :, None] * next_state[here])
        ways[ends, 0, here[ends]] = 1.0
        which, action, after = np.nonzero(ways)
        history = [[x[which] for x in column] for column in history]
        history.append([here[which], action, ~ends[which], np.where(ends[which], 0.0, reward[here[which], action])])
        chance, here = chance[which] * ways[which, action, after], after
    state, actions, made, paid = (np.stack(x, 1) for x in zip(*history, strict=True))
    assert abs(chance.sum() - 1.0) < 1e-9
    return Ways(chance, state, actions, made, paid, outcome[here])


def means(ways: Ways, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of f64[W, T] over all rollouts that make call (s, a) at turn t, f64[T, S, A], and the chance of that call."""
    turn = np.broadcast_to(np.arange(TURNS), ways.made.shape)
    place = ((turn * STATES + ways.state) * ACTIONS + ways.action)[ways.made]
    chance = np.broadcast_to(ways.chance[:, None], ways.made.shape)[ways.made]
    shape = (TURNS, STATES, ACTIONS)
    made = np.bincount(place, chance, np.prod(shape)).reshape(shape)
    total = np.bincount(place, chance * np.broadcast_to(number, ways.made.shape)[ways.made], np.prod(shape)).reshape(shape)
    return np.divide(total, made, out=np.zeros(shape), where=made > 0), made
