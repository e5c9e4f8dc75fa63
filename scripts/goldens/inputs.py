"""The inputs that every library is run on, from one seed, in NumPy alone.

A row is a rollout, as libraries have it: actions, observations between them, padding at the end. Nothing outside the action tokens
should matter, so there is noise there.
"""

from __future__ import annotations

import numpy as np

SEED = 20250

# a: action, o: observation (mask 0, but the sequence goes on), .: padding. The second set has the same actions without observations.
ROWS = (
    ("t1", "aaaaaaaaaaaa"),
    ("t2", "aaaooaaoaa.."),
    ("t3", "aaoaaa......"),  # the only row of its task
    ("t1", "aaaoooaaa..."),
    ("t4", "aaaaaaaa...."),
    ("t1", "a..........."),
    ("t2", "aaaaaaa....."),
    ("t4", "aoaoa......."),
    ("t1", "aaaaaaoaa..."),
    ("t2", "ooaa........"),  # an observation comes first
)
OUTCOME = (1.0, 0.5, 0.75, 0.0, 0.0, 0.25, 0.5, 1.5, -0.5, 0.5)  # those of t2 are equal
FORMAT = (0.0, 1.0, 1.0, 0.5, 0.25, 1.0, 0.0, 0.25, 0.5, 0.0)  # a second reward; those of t4 are equal
GREEDY = (0.5, 0.25, 1.0, 0.5, 0.75, 0.5, 0.25, 0.75, 0.5, 0.25)  # what the greedy rollout of the task earned
# A task whose rewards differ by a thousandth, exactly in float32, and another.
SMALL_GROUP, SMALL_OUTCOME = ("t", "t", "t", "t", "u", "u"), (0.0, 1 / 1024, 3 / 1024, 0.0, 0.0, 1.0)

# Groups of four next to each other, for a library that knows no others; the second group's rewards are equal.
FOURS_OUTCOME = (1.0, 0.25, -0.5, 0.0, 0.5, 0.5, 0.5, 0.5, 1.0, 0.0, 0.0, 0.0)
FOURS_FORMAT = (0.0, 1.0, 1.0, 0.5, 0.25, 1.0, 0.0, 0.25, 0.5, 0.5, 0.5, 0.5)


def masks(*, observations: bool = True) -> dict[str, np.ndarray]:
    """`action` and `attention`, both [B, T] of 0 and 1."""
    width = max(len(row) for _, row in ROWS)
    rows = [row if observations else row.replace("o", "").replace(".", "").ljust(width, ".") for _, row in ROWS]
    letters = np.array([list(row) for row in rows])
    return {"action": (letters == "a").astype(np.float32), "attention": (letters != ".").astype(np.float32)}


def tasks() -> np.ndarray:
    """The task of every row, as text."""
    return np.array([task for task, _ in ROWS])


def turn_ends(action: np.ndarray) -> np.ndarray:
    """bool [B, T]: the last action token before an observation, padding or the end."""
    following = np.concatenate([action[:, 1:], np.zeros_like(action[:, :1])], axis=1)
    return (action == 1) & (following == 0)


def last_action(action: np.ndarray) -> np.ndarray:
    """int [B]: where the last action token of a row is."""
    return action.shape[1] - 1 - np.argmax(action[:, ::-1], axis=1)


def at_last_action(reward: np.ndarray, action: np.ndarray) -> np.ndarray:
    """[B, T]: a row's reward at its last action token."""
    result = np.zeros_like(action)
    result[np.arange(len(action)), last_action(action)] = reward
    return result


def numbers(rows: int = len(ROWS)) -> dict[str, np.ndarray]:
    """Everything that is drawn, [B, T] of float32: log-probs of four policies, values, advantages, rewards of turns."""
    rng = np.random.default_rng(SEED)
    shape = (rows, len(ROWS[0][1]))
    old = rng.uniform(-3.0, -0.1, shape)
    near = lambda spread: np.minimum(old + spread * rng.normal(size=shape), -1e-3)  # noqa: E731
    drawn = {
        "logp": near(0.5),
        "old_logp": old,
        "behaviour_logp": near(0.3),
        "ref_logp": near(0.4),
        "value": rng.normal(size=shape),
        "old_value": rng.normal(size=shape),
        "value_target": rng.normal(size=shape),
        "turn_reward": np.round(rng.normal(size=shape), 2),
        "token_advantage": rng.normal(size=shape),
        "entropy": rng.uniform(0.1, 2.0, shape),
        "loss": rng.normal(size=shape),
    }
    chance = np.exp(old)
    drawn["sum_pi2"] = chance**2 + rng.uniform(0.0, 1.0, shape) * (1.0 - chance) ** 2
    drawn["row_advantage"] = np.repeat(rng.normal(size=(shape[0], 1)), shape[1], axis=1)
    drawn["row_advantage"][4] = 0.0
    return {name: x.astype(np.float32) for name, x in drawn.items()}


def far_policies() -> dict[str, np.ndarray]:
    """`numbers` in which four tokens have a log-ratio of ±25, of either sign of the advantage."""
    drawn = {name: x.copy() for name, x in numbers().items()}
    for (row, column), log_ratio in {(0, 1): 25.0, (0, 2): 25.0, (4, 0): -25.0, (4, 1): -25.0}.items():
        drawn["logp"][row, column] = -0.5 if log_ratio > 0 else -26.0
        drawn["old_logp"][row, column] = drawn["logp"][row, column] - np.float32(log_ratio)
        drawn["token_advantage"][row, column] = 1.5 if column in (1, 0) else -1.5
    return drawn
