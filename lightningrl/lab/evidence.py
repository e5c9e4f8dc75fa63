"""Evidence for credit in a tabular process: what a model would learn or somebody would say, in its tabular form.

Each producer says where its numbers come from, and counts the environment steps that they took beyond the batch. Nothing here
reads the true values of the policy that is measured (that is `lab.exact`); `judge` is told which action is best and is wrong at random.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from lightningrl.advantages import rae_update
from lightningrl.credit import reward_to_go
from lightningrl.lab.process import ACTIONS, RESPONSE, RETURNS, ROLES, STATES, TURNS, Process, return_bin
from lightningrl.lab.sampling import Plan, Rollouts, greedy, restart
from lightningrl.lab.truth import optimal_values
from lightningrl.segments import safe_divide, segment_mean
from lightningrl.table import Array, Evidence, TransitionTable

CALLS = STATES * ACTIONS
PRIOR = 1.0  # rollouts' worth of belief in the mean of everything, in all counts below
RIDGE = 1.0  # of the additive return model
JUDGE_ERRS = 0.2  # how often


@struct.dataclass
class Memory:
    """What earlier batches have left behind: all that a critic or a running baseline knows of the batch that comes next."""

    total: Array  # float32 [S, A], sums of rewards to go of calls, older batches weighing less
    count: Array  # float32 [S, A]
    role_baseline: Array  # float32 [ROLES]


def no_memory() -> Memory:
    return Memory(total=jnp.zeros((STATES, ACTIONS)), count=jnp.zeros((STATES, ACTIONS)), role_baseline=jnp.zeros(ROLES))


def remember(memory: Memory, table: TransitionTable, rollouts: Rollouts, decay: float) -> Memory:
    """The memory after a batch. What was there is worth `decay` of what it was, because policies change; decay 0 forgets it."""
    to_go = reward_to_go(table, Evidence()).value
    total, count = (memory.total.reshape(-1), memory.count.reshape(-1))
    total, count = (decay * x + _per_call(table, rollouts, y) for x, y in ((total, to_go), (count, jnp.ones_like(to_go))))
    # A first batch is no small step from zero.
    first, later = (rae_update(memory.role_baseline, table, kept) for kept in (0.0, decay))
    return Memory(
        total=total.reshape(STATES, ACTIONS),
        count=count.reshape(STATES, ACTIONS),
        role_baseline=jnp.where(jnp.sum(memory.count) > 0, later, first),
    )


@struct.dataclass
class Sampled:
    """A batch, and whatever a producer may look at."""

    process: Process
    logits: Array  # float32 [S, A], of the policy that sampled
    reference: Array  # float32 [S, A], of the policy that learning started from
    memory: Memory
    rollouts: Rollouts
    table: TransitionTable
    key: Array


Producer = Callable[[Sampled, Plan], tuple[dict[str, Array], Array | float]]  # fields of Evidence, and extra environment steps


def value(sampled: Sampled, plan: Plan) -> tuple[dict[str, Array], float]:
    """A critic: the mean reward to go of calls in that state in earlier batches, of states and not of turns."""
    return {"value": _of_calls(sampled, _state_value(sampled.memory)[:, None] + jnp.zeros(ACTIONS))}, 0.0


def token_value(sampled: Sampled, plan: Plan) -> tuple[dict[str, Array], float]:
    """The same critic before the token that chooses; after it, the mean reward to go of that action in that state."""
    memory = sampled.memory
    state = _state_value(memory)
    chosen = _shrunk(memory.total, memory.count, state[:, None])
    before, after = (_of_calls(sampled, x) for x in (state[:, None] + jnp.zeros(ACTIONS), chosen))
    return {"token_value": jnp.where(jnp.arange(RESPONSE) == 0, before[:, None], after[:, None]).reshape(-1)}, 0.0


def role_baseline(sampled: Sampled, plan: Plan) -> tuple[dict[str, Array], float]:
    """Running mean outcome of each role, of earlier batches."""
    return {"role_baseline": jnp.where(sampled.table.valid, sampled.memory.role_baseline[sampled.table.role], 0.0)}, 0.0


def branch_value(sampled: Sampled, plan: Plan) -> tuple[dict[str, Array], Array]:
    """Means of rollouts started anew from every state; the state after a call is the one before the next."""
    mean, steps = restart(sampled.process, sampled.logits, sampled.key, sampled.rollouts, plan)
    after = jnp.pad(mean[:, 1:], ((0, 0), (0, 1)))
    count = jnp.where(sampled.rollouts.made, plan.restarts, 0).astype(jnp.float32)
    counts = jnp.stack([count, jnp.pad(count[:, 1:], ((0, 0), (0, 1)))], -1)
    return {"branch_value": jnp.stack([mean, after], -1).reshape(-1, 2), "branch_count": counts.reshape(-1, 2)}, steps


def potential(sampled: Sampled, plan: Plan) -> tuple[dict[str, Array], float]:
    """The process's own guess of how far along a state is."""
    before = _of_calls(sampled, sampled.process.potential[:, None] + jnp.zeros(ACTIONS))
    after = jnp.pad(before.reshape(-1, TURNS)[:, 1:], ((0, 0), (0, 1))).reshape(-1)
    return {"potential": jnp.stack([before, after], -1)}, 0.0


def predicted_return(sampled: Sampled, plan: Plan) -> tuple[dict[str, Array], float]:
    """RUDDER's return model: regression of the outcome on the call, which for a table is the mean outcome of the batch's rollouts
    that made it, pulled a little to the mean of all."""
    table, rollouts = sampled.table, sampled.rollouts
    outcome = table.outcome[:, 0]
    total, count = (_per_call(table, rollouts, x) for x in (outcome, jnp.ones_like(outcome)))
    everywhere = segment_mean(outcome, jnp.zeros_like(table.rollout), 1, weights=table.weight)
    return {"predicted_return": _of_calls(sampled, _shrunk(total, count, everywhere).reshape(STATES, ACTIONS))}, 0.0


def contributions(sampled: Sampled, plan: Plan) -> tuple[dict[str, Array], float]:
    """SPA's return model: ridge regression of the outcome on a sum of one contribution per call; their running sum."""
    each = jnp.where(sampled.rollouts.made, _of_calls(sampled, _additive_model(sampled)).reshape(-1, TURNS), 0.0)
    return {"predicted_return": jnp.cumsum(each, -1).reshape(-1)}, 0.0


def attention(sampled: Sampled, plan: Plan) -> tuple[dict[str, Array], float]:
    """Sizes of the contributions of the same additive return model: how much it looks at each call."""
    return {"attention": jnp.abs(_of_calls(sampled, _additive_model(sampled)))}, 0.0


def coalition(sampled: Sampled, plan: Plan) -> tuple[dict[str, Array], float]:
    """What a return model says that sees some of a rollout's calls: the mean outcome of the batch's rollouts that made all of these.

    Of a rollout itself with others like it; of no call at all, the mean outcome of the batch.
    """
    rollouts = sampled.rollouts
    call = rollouts.state * ACTIONS + rollouts.action
    number = rollouts.made.shape[0]
    made = jnp.zeros((number, CALLS), bool).at[jnp.arange(number)[:, None], call].max(rollouts.made)
    alike = made[:, call] & rollouts.made  # [other, rollout, turn]: has the other made this call, too?
    shared = jnp.sum(jnp.where(alike, 2 ** jnp.arange(TURNS), 0), -1).T
    exists = jnp.any(rollouts.made, -1).astype(jnp.float32)
    own = jnp.arange(number)[:, None]
    total, count = (
        _over_supersets(jnp.zeros((number, 2**TURNS)).at[own, shared].add(jnp.broadcast_to(x, shared.shape)))
        for x in (exists * rollouts.outcome, exists)
    )
    return {"coalition": safe_divide(total, count)}, 0.0


def hindsight(sampled: Sampled, plan: Plan) -> tuple[dict[str, Array], float]:
    """h(a | s, Z) from counts of the batch: how often a was the action where rollouts through s had reward to go Z.

    The policy counts as one more observation, so that a pair that was never seen is no surprise.
    """
    table, rollouts = sampled.table, sampled.rollouts
    to_go = reward_to_go(table, Evidence()).value
    call = jnp.ravel(rollouts.state * ACTIONS + rollouts.action)
    cells = call * RETURNS + return_bin(to_go)
    count = jax.ops.segment_sum(table.valid.astype(jnp.float32), cells, CALLS * RETURNS).reshape(STATES, ACTIONS, RETURNS)
    policy = jax.nn.softmax(sampled.logits)
    h = (count + PRIOR * policy[:, :, None]) / (jnp.sum(count, 1, keepdims=True) + PRIOR)
    logs = jnp.log(h.reshape(-1)[cells]), jnp.log(policy.reshape(-1)[call])
    return {name: jnp.where(table.valid, x, 0.0) for name, x in zip(("hindsight_logp", "response_logp"), logs, strict=True)}, 0.0


def judge(sampled: Sampled, plan: Plan) -> tuple[dict[str, Array], float]:
    """1 for a call that is as good as the best there is, else 0, and wrong in a fifth of all calls. It knows the optimal values."""
    best = optimal_values(sampled.process).advantage >= -1e-6
    rollouts = sampled.rollouts
    right = best[jnp.arange(TURNS), rollouts.state, rollouts.action].reshape(-1)
    wrong = jax.random.uniform(sampled.key, right.shape) < JUDGE_ERRS
    return {"judge": jnp.where(sampled.table.valid & (right != wrong), 1.0, 0.0)}, 0.0


def greedy_reward(sampled: Sampled, plan: Plan) -> tuple[dict[str, Array], Array]:
    """What one rollout of the likeliest actions was paid for each group's task."""
    rollouts = sampled.rollouts
    first = lambda x: x[:, 0].reshape(plan.groups, plan.group_size)[:, 0]  # noqa: E731
    reward, calls = greedy(sampled.process, sampled.logits, sampled.key, first(rollouts.state))
    steps = jnp.sum(jnp.where(first(rollouts.made), calls, 0)).astype(jnp.float32)
    return {"greedy_reward": jnp.where(sampled.table.valid, reward[sampled.table.group], 0.0)}, steps


def sum_pi2(sampled: Sampled, plan: Plan) -> tuple[dict[str, Array], float]:
    """Exact: Σₐ π(a | s)² at the token that chooses, 1 at those that are certain."""
    squares = jnp.sum(jax.nn.softmax(sampled.logits) ** 2, -1)
    chosen = jnp.ravel(squares[sampled.rollouts.state])
    return {"sum_pi2": jnp.where(jnp.arange(RESPONSE) == 0, chosen[:, None], 1.0).reshape(-1)}, 0.0


PRODUCERS: dict[str, Producer] = {
    f.__name__: f
    for f in (
        value,
        token_value,
        role_baseline,
        branch_value,
        potential,
        predicted_return,
        contributions,
        attention,
        coalition,
        hindsight,
        judge,
        greedy_reward,
        sum_pi2,
    )
}
FROM_MEMORY = ("value", "token_value", "role_baseline")


def _state_value(memory: Memory) -> Array:
    """f32[S]: means of rewards to go, pulled a little to the mean of all; 0 where nothing is remembered."""
    everywhere = safe_divide(jnp.sum(memory.total), jnp.sum(memory.count))
    return _shrunk(jnp.sum(memory.total, -1), jnp.sum(memory.count, -1), everywhere)


def _shrunk(total: Array, count: Array, towards: Array) -> Array:
    return (total + PRIOR * towards) / (count + PRIOR)


def _per_call(table: TransitionTable, rollouts: Rollouts, x: Array) -> Array:
    """f32[S A]: sums over the calls with that action in that state."""
    call = jnp.ravel(rollouts.state * ACTIONS + rollouts.action)
    return jax.ops.segment_sum(jnp.where(table.valid, x, 0.0), call, CALLS)


def _of_calls(sampled: Sampled, of_pairs: Array) -> Array:
    """f32[N]: the number that belongs to each call's state and action; 0 at padding."""
    return jnp.where(sampled.table.valid, jnp.ravel(of_pairs[sampled.rollouts.state, sampled.rollouts.action]), 0.0)


def _additive_model(sampled: Sampled) -> Array:
    """f32[S, A]: contributions w of calls that minimise Σᵢ (Rᵢ - Σₜ w(sₜ, aₜ))² + λ |w|²."""
    rollouts = sampled.rollouts
    number = rollouts.made.shape[0]
    call = rollouts.state * ACTIONS + rollouts.action
    counts = jnp.zeros((number, CALLS)).at[jnp.arange(number)[:, None], call].add(rollouts.made.astype(jnp.float32))
    target = jnp.where(jnp.any(rollouts.made, -1), rollouts.outcome, 0.0)
    # Conjugate gradients: jnp.linalg.solve over a batch is LAPACK's, whose calls, two at once, wait for ever for a pool of two threads.
    weights, _ = jax.scipy.sparse.linalg.cg(lambda w: (counts @ w) @ counts + RIDGE * w, target @ counts, tol=1e-6, maxiter=2 * CALLS)
    return weights.reshape(STATES, ACTIONS)


def _over_supersets(x: Array) -> Array:
    """f32[R, 2^T]: for every set of turns the sum over all sets that hold it."""
    result = x.reshape(-1, *(2,) * TURNS)
    for axis in range(1, TURNS + 1):
        result = jnp.flip(jnp.cumsum(jnp.flip(result, axis), axis), axis)
    return result.reshape(x.shape)
