"""Rollouts of a process, sampled with keys: in groups of one task, as trees, and started anew from every state of others."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from lightningrl.lab.process import TURNS, Process
from lightningrl.lab.truth import calls_to_go, occupancy, sum_to_go
from lightningrl.table import Array

Kind = Literal["groups", "trees", "branches"]
BRANCHES = (0, 1, 2, 3)  # the rollouts of a tree: its trunk, and those that leave it before turns 1, 2 and 3


@dataclasses.dataclass(frozen=True)
class Plan:
    """How rollouts are sampled; all of it static."""

    kind: Kind = "groups"
    groups: int = 16  # at most
    group_size: int = 8
    restarts: int = 2  # of kind "branches": rollouts started from every state of every rollout
    greedy: bool = False  # whether every group also pays for a greedy rollout

    def __post_init__(self) -> None:
        if self.kind == "trees" and self.group_size % len(BRANCHES):
            raise ValueError(f"A group of {self.group_size} rollouts is not made of whole trees of {len(BRANCHES)}.")

    @property
    def rollouts(self) -> int:
        return self.groups * self.group_size


@struct.dataclass
class Rollouts:
    """R rollouts of at most T calls. Where no call was made, `made` is false and nothing else is to be read."""

    group: Array  # int32 [R]
    state: Array  # int32 [R, T], before the call
    action: Array  # int32 [R, T]
    made: Array  # bool [R, T], false also in groups that were not sampled
    own: Array  # bool [R, T], made by this rollout; false where it shares the call with the trunk that it left later
    node: Array  # int32 [R, T], r T + t of the rollout that made the call
    tree: Array  # int32 [R], number of the trunk
    reward: Array  # float32 [R, T]
    outcome: Array  # float32 [R]


@struct.dataclass
class Path:
    state: Array  # int32 [R, T]
    action: Array  # int32 [R, T]
    made: Array  # bool [R, T]
    end: Array  # int32 [R], the state after the last call


def play(process: Process, logits: Array, noise: Array, state: Array, turn: Array) -> Path:
    """Rollouts from the given states, int32[R], of which the next call is that of the given turn, int32[R].

    Args:
      noise: f32[2 T R], uniform in [0, 1): all that is drawn by chance.
    """
    policy = jnp.cumsum(jax.nn.softmax(logits), -1)
    ways = jnp.cumsum(process.next_state, -1)

    def step(here, turn_and_noise):
        now, noise = turn_and_noise
        made = jnp.logical_and(now >= turn, ~process.terminal[here])
        action = _draw(policy[here], noise[0])
        after = jnp.where(made, _draw(ways[here, action], noise[1]), here)
        return after, (here, action, made)

    end, path = jax.lax.scan(step, state, (jnp.arange(TURNS), noise.reshape(TURNS, 2, -1)))
    here, action, made = (x.T for x in path)
    return Path(state=here, action=action, made=made, end=end)


def sample(process: Process, logits: Array, key: Array, plan: Plan, groups: Array) -> Rollouts:
    """Rollouts by a plan.

    Args:
      groups: float32, how many groups on average, from 1 to `plan.groups`: of 2.3 there are two or, three times in ten, three. Which
        is drawn before anything else, so that no estimate is biased by it.
    """
    of_play = 2 * TURNS * plan.rollouts
    noise = jax.random.uniform(key, (1 + plan.groups + 2 * of_play,))  # one draw, cut up: a draw takes seconds to compile
    of_number, of_task, of_path, of_branches = jnp.split(noise, (1, 1 + plan.groups, 1 + plan.groups + of_play))
    group = jnp.repeat(jnp.arange(plan.groups, dtype=jnp.int32), plan.group_size)
    task = _draw(jnp.cumsum(process.start), of_task)
    used = (group < jnp.floor(groups + of_number))[:, None]
    path = play(process, logits, of_path, task[group], jnp.zeros_like(group))
    own, node, tree = jnp.ones_like(path.made), _places(plan.rollouts), jnp.arange(plan.rollouts, dtype=jnp.int32)
    if plan.kind == "trees":
        path, own, node, tree = _branch_off(process, logits, of_branches, path)
    return Rollouts(
        group=group,
        state=path.state,
        action=path.action,
        made=path.made & used,
        own=own & path.made & used,
        node=node,
        tree=tree,
        reward=process.reward[path.state, path.action],
        outcome=process.outcome[path.end],
    )


def greedy(process: Process, logits: Array, key: Array, task: Array) -> tuple[jax.Array, jax.Array]:
    """What rollouts of the likeliest actions are paid in all, and how many calls they made: f32[tasks], int32[tasks]."""
    path = play(process, _likeliest(logits), jax.random.uniform(key, (2 * TURNS * task.shape[0],)), task, jnp.zeros_like(task))
    return returns(process, path)[:, 0], jnp.sum(path.made, -1)


def restart(process: Process, logits: Array, key: Array, rollouts: Rollouts, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """From every state in which a call was made `plan.restarts` rollouts anew: the mean of what they are paid, and all their calls.

    Returns:
      f32[R, T], 0 where no call was made, and float32[].
    """
    shape = (*rollouts.state.shape, plan.restarts)
    state = jnp.broadcast_to(rollouts.state[:, :, None], shape).reshape(-1)
    turn = jnp.broadcast_to(jnp.arange(TURNS, dtype=jnp.int32)[:, None], shape).reshape(-1)
    path = play(process, logits, jax.random.uniform(key, (2 * TURNS * state.shape[0],)), state, turn)
    paid = jnp.take_along_axis(returns(process, path), turn[:, None], 1).reshape(shape)
    calls = jnp.sum(path.made, -1).reshape(shape)
    used = rollouts.made[:, :, None]
    return jnp.mean(jnp.where(used, paid, 0.0), -1), jnp.sum(jnp.where(used, calls, 0)).astype(jnp.float32)


def returns(process: Process, path: Path) -> jax.Array:
    """What a rollout is paid from each turn on, f32[R, T]; rewards of calls, and the outcome of the state that it ends in."""
    paid = jnp.where(path.made, process.reward[path.state, path.action], 0.0)
    return jnp.flip(jnp.cumsum(jnp.flip(paid, -1), -1), -1) + process.outcome[path.end][:, None]


def steps_per_group(process: Process, logits: Array, plan: Plan) -> jax.Array:
    """How many calls of the environment a group costs on average, exactly: what makes budgets equal before anything is sampled."""
    calls = calls_to_go(process, logits)
    each = jnp.sum(process.start * calls[0])
    total = plan.group_size * each
    if plan.kind == "trees":
        branches = occupancy(process, logits)
        lost = [jnp.sum(branches[turn] * calls[turn]) + (1 - jnp.sum(branches[turn])) * each for turn in BRANCHES[1:]]
        total = plan.group_size // len(BRANCHES) * (each + sum(lost))
    if plan.kind == "branches":
        step = jnp.einsum("sa,sap->sp", jax.nn.softmax(logits), process.next_state)
        total += plan.group_size * plan.restarts * jnp.sum(process.start * sum_to_go(process, step, calls[:-1])[0])
    if plan.greedy:
        total += jnp.sum(process.start * calls_to_go(process, _likeliest(logits))[0])
    return total


def _branch_off(process: Process, logits: Array, noise: Array, trunks: Path) -> tuple[Path, jax.Array, jax.Array, jax.Array]:
    """Rollouts 1, 2 and 3 of every four leave rollout 0 before that turn; where it had ended by then they stay rollouts of their own.

    The turns are fixed beforehand. To choose among the calls that a trunk made would be to choose by its outcome.
    """
    size = trunks.state.shape[0]
    member = jnp.arange(size, dtype=jnp.int32) % len(BRANCHES)
    trunk = jnp.arange(size, dtype=jnp.int32) - member
    alive = jnp.logical_and(member > 0, trunks.made[trunk, member])
    fresh = play(process, logits, noise, trunks.state[trunk, member], member)
    shared = alive[:, None] & (jnp.arange(TURNS) < member[:, None])

    def join(field):
        own = jnp.where(alive[:, None], getattr(fresh, field), getattr(trunks, field))
        return jnp.where(shared, getattr(trunks, field)[trunk], own)

    path = Path(join("state"), join("action"), join("made"), jnp.where(alive, fresh.end, trunks.end))
    places = _places(size)
    return path, ~shared, jnp.where(shared, places[trunk], places), jnp.where(alive, trunk, jnp.arange(size, dtype=jnp.int32))


def _likeliest(logits: Array) -> jax.Array:
    """Logits of the policy that always does what is likeliest."""
    return jnp.where(jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1]) > 0, 0.0, -jnp.inf)


def _places(rollouts: int) -> jax.Array:
    return jnp.arange(rollouts * TURNS, dtype=jnp.int32).reshape(rollouts, TURNS)


def _draw(cumulative: Array, noise: Array) -> jax.Array:
    """The index that a number in [0, 1) falls on, never one of probability 0."""
    return jnp.sum(cumulative <= (noise * cumulative[..., -1])[..., None], -1).astype(jnp.int32)
