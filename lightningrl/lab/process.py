"""A tabular multi-turn process: what an agent's run is, small enough for every value to be computed.

A state is the whole conversation so far, and a policy has logits for each. What the environment *shows* in it, the last message, may be
the same in several states: methods that compare calls made in equal states go by that. All processes have one padded shape,
so that they are stacked and vmapped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lightningrl.table import Array

STATES, ACTIONS, TURNS = 24, 3, 6  # the padded shape
ROLES, RESPONSE = 3, 3  # roles at most, tokens of a response at most
RETURN_STEP, LOWEST, RETURNS = 0.05, -1.0, 41  # what may be paid in all lies on a grid: -1, -0.95, … 1


@struct.dataclass
class Process:
    """S states, A actions, at most T calls. A rollout ends in a terminal state, or wherever it is after T calls."""

    start: Array  # float32 [S], which task a group is about
    next_state: Array  # float32 [S, A, S], of a call in a state that is not terminal
    terminal: Array  # bool [S]; padding is terminal
    outcome: Array  # float32 [S], what a rollout that ends there is paid
    reward: Array  # float32 [S, A], what a call is paid at once
    observation: Array  # int32 [S], 0 … S-1, what the environment shows
    role: Array  # int32 [S], who is asked
    tokens: Array  # int32 [S, A], length of the response, 1 … RESPONSE; its first token is the choice, the others follow from it
    potential: Array  # float32 [S], how far along a designer thinks that one is


Ways = Mapping[str, float]  # next state -> probability


def return_bin(paid: Array) -> jax.Array:
    """int32: where on the grid of returns a sum of rewards and an outcome lies."""
    return jnp.clip(jnp.round((paid - LOWEST) / RETURN_STEP).astype(jnp.int32), 0, RETURNS - 1)


def make_process(
    calls: Mapping[str, Sequence[Ways | str]],
    *,
    start: Ways,
    outcome: Mapping[str, float],
    reward: Mapping[tuple[str, int], float] | None = None,
    shows: Mapping[str, str] | None = None,
    role: Mapping[str, int] | None = None,
    tokens: Mapping[tuple[str, int], int] | None = None,
    potential: Mapping[str, float] | None = None,
) -> Process:
    """From names to padded NumPy arrays.

    Args:
      calls: for every state in which a call is made, where each of the A actions leads: a state, or states with probabilities.
        All other states are terminal.
      start: states that a rollout may begin in, with probabilities.
      outcome: by state; 0 elsewhere. Of a state in which a call could still be made: what a rollout gets that ran out of turns there.
      reward, tokens: by (state, action); 0 and 1 elsewhere.
      shows: what is shown in a state, where it is not the state itself.
      role, potential: by state; 0 elsewhere.

    Raises:
      ValueError: probabilities don't sum to 1, a state has not A actions, there are too many states, or something is paid that is
        not a multiple of `RETURN_STEP`.
    """
    ways = {s: [{way: 1.0} if isinstance(way, str) else way for way in row] for s, row in calls.items()}
    names = list(dict.fromkeys([*start, *ways, *(name for row in ways.values() for way in row for name in way)]))
    index = {name: i for i, name in enumerate(names)}
    if len(names) > STATES:
        raise ValueError(f"The process has {len(names)} states; there is room for {STATES}.")
    for what, way in [("start", start), *((s, w) for s, row in ways.items() for w in row)]:
        if abs(sum(way.values()) - 1.0) > 1e-9:
            raise ValueError(f"The probabilities of {what!r} sum to {sum(way.values())}, not to 1.")
    if any(len(row) != ACTIONS for row in ways.values()):
        raise ValueError(f"Every state in which a call is made needs {ACTIONS} actions.")
    for paid in [*outcome.values(), *(reward or {}).values()]:
        if abs(paid / RETURN_STEP - round(paid / RETURN_STEP)) > 1e-9:
            raise ValueError(f"An outcome or a reward is {paid}, which is no multiple of {RETURN_STEP}.")

    result = Process(
        start=np.zeros(STATES, np.float32),
        next_state=np.zeros((STATES, ACTIONS, STATES), np.float32),
        terminal=np.ones(STATES, bool),
        outcome=np.zeros(STATES, np.float32),
        reward=np.zeros((STATES, ACTIONS), np.float32),
        observation=np.arange(STATES, dtype=np.int32),
        role=np.zeros(STATES, np.int32),
        tokens=np.ones((STATES, ACTIONS), np.int32),
        potential=np.zeros(STATES, np.float32),
    )
    for name, p in start.items():
        result.start[index[name]] = p
    for name, row in ways.items():
        result.terminal[index[name]] = False
        for action, way in enumerate(row):
            for after, p in way.items():
                result.next_state[index[name], action, index[after]] = p
    first_shown: dict[str, int] = {}
    for name in names:
        result.observation[index[name]] = first_shown.setdefault((shows or {}).get(name, name), index[name])
    for field, given in ((result.outcome, outcome), (result.role, role or {}), (result.potential, potential or {})):
        for name, x in given.items():
            field[index[name]] = x
    for field, of_calls in ((result.reward, reward or {}), (result.tokens, tokens or {})):
        for (name, action), x in of_calls.items():
            field[index[name], action] = x
    return result
