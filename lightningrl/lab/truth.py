"""What is exactly true of a policy in a process, by dynamic programming backwards from the last turn.

A policy is logits f32[S, A], the same at every turn; values depend on the turn, because time may run out. No number here is an
estimate; float32 is the only approximation, and tests compare all of it with sums over every possible rollout in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from lightningrl.lab.process import RETURN_STEP, RETURNS, TURNS, Process, return_bin
from lightningrl.table import Array


@struct.dataclass
class Values:
    """Expected sums of all that is paid from here on: rewards of calls, and the outcome. 0 for Q and A where no call is made."""

    v: jax.Array  # float32 [T+1, S]; the last row is what a rollout that ran out of turns gets
    q: jax.Array  # float32 [T, S, A]
    advantage: jax.Array  # float32 [T, S, A]


def policy_values(process: Process, logits: Array) -> Values:
    """V, Q and A = Q - V of the softmax policy.

    V_T(s) = outcome(s),   Q_t(s, a) = r(s, a) + Σ_s' P(s' | s, a) V_{t+1}(s'),   V_t(s) = Σ_a π(a | s) Q_t(s, a),
    and V_t(s) = outcome(s) where s is terminal
    """
    probabilities = jax.nn.softmax(logits)
    return _backwards(process, lambda q: jnp.sum(probabilities * q, -1))


def outcome_values(process: Process, logits: Array) -> Values:
    """The same of the outcome alone: what a return model predicts that knows nothing of the rewards of calls."""
    return policy_values(dataclasses.replace(process, reward=jnp.zeros_like(process.reward)), logits)


def optimal_values(process: Process) -> Values:
    """V*, Q* and A* of the best policy there is, which may depend on the turn."""
    return _backwards(process, lambda q: jnp.max(q, -1))


def expected_return(process: Process, values: Values) -> jax.Array:
    """J = Σ_s start(s) V_0(s)."""
    return jnp.sum(process.start * values.v[0])


def occupancy(process: Process, logits: Array) -> jax.Array:
    """f32[T, S]: the chance that a call is made in state s at turn t."""
    step = jnp.einsum("sa,sap->sp", jax.nn.softmax(logits), process.next_state)

    def forwards(here, _):
        calls = jnp.where(process.terminal, 0.0, here)
        return calls @ step, calls

    return jax.lax.scan(forwards, jnp.asarray(process.start), length=TURNS)[1]


def policy_gradient(process: Process, logits: Array) -> jax.Array:
    """∇J = Σ_t d_t(s) π(a | s) A_t(s, a), f32[S, A]: the policy gradient theorem for softmax logits (Sutton et al. 1999)."""
    advantage = policy_values(process, logits).advantage
    return jnp.einsum("ts,sa,tsa->sa", occupancy(process, logits), jax.nn.softmax(logits), advantage)


def return_distribution(process: Process, logits: Array) -> jax.Array:
    """P(Zₜ = z | sₜ, aₜ), f32[T, S, A, RETURNS]: all that is paid from this call on, z on the grid of `process.return_bin`.

    D_T(z | s) = 1[z = outcome(s)],   D_t(z | s, a) = Σ_s' P(s' | s, a) D_{t+1}(z - r(s, a) | s'),   D_t(z | s) = Σ_a π(a | s) D_t(z | s, a)
    """
    policy = jax.nn.softmax(logits)
    end = jax.nn.one_hot(return_bin(process.outcome), RETURNS)
    paid = jnp.round(process.reward / RETURN_STEP).astype(jnp.int32)
    source = jnp.arange(RETURNS) - paid[:, :, None]
    inside = jnp.logical_and(source >= 0, source < RETURNS)

    def step(after, _):
        moved = jnp.take_along_axis(process.next_state @ after, jnp.clip(source, 0, RETURNS - 1), -1)
        of_calls = jnp.where(inside & ~process.terminal[:, None, None], moved, 0.0)
        before = jnp.where(process.terminal[:, None], end, jnp.einsum("sa,saz->sz", policy, of_calls))
        return before, of_calls

    return jax.lax.scan(step, end, length=TURNS, reverse=True)[1]


def tilted_log_ratio(process: Process, logits: Array, beta: float) -> jax.Array:
    """log π_φ(a | s) - log π(a | s), f32[T, S, A]: what an implicit process-reward model of π says once it has learned all there is.

      exp(W_t(s) / β) = E[exp(Z / β) | s],   exp(Q_t(s, a) / β) = E[exp(Z / β) | s, a],   log ratio = (Q - W) / β

    The exponential average of what is paid from here on (PRIME, arXiv 2502.01456, proposition 3.1, whose only chance is the policy's).
    Where tools are certain W is the optimal soft value of the KL-regularised problem, and β times the log ratios of a rollout sum to its
    return less W of its start. The paper's model is fitted to outcomes; this is what it would be without an error of fit.
    """
    policy = jax.nn.softmax(logits)
    end = jnp.asarray(process.outcome) / beta
    goes_on = ~process.terminal[:, None, None]
    ways = jnp.where(goes_on, process.next_state, 1.0)  # a finite logarithm where nothing is read

    def step(after, _):
        q = process.reward / beta + jax.nn.logsumexp(jnp.broadcast_to(after, ways.shape), axis=-1, b=ways)
        value = jnp.where(process.terminal, end, jax.nn.logsumexp(q, axis=-1, b=policy))
        return value, jnp.where(process.terminal[:, None], 0.0, q - value[:, None])

    return jax.lax.scan(step, end, length=TURNS, reverse=True)[1]


def calls_to_go(process: Process, logits: Array) -> jax.Array:
    """f32[T+1, S]: how many calls a rollout makes from here on."""
    step = jnp.einsum("sa,sap->sp", jax.nn.softmax(logits), process.next_state)
    return sum_to_go(process, step, jnp.ones((TURNS, process.terminal.shape[0])))


def sum_to_go(process: Process, step: Array, paid: Array) -> jax.Array:
    """f32[T+1, S]: what is paid from here on, where `paid` f32[T, S] is for each call and `step` f32[S, S] says what follows it."""

    def backwards(after, pays):
        before = jnp.where(process.terminal, 0.0, pays + step @ after)
        return before, before

    end = jnp.zeros(process.terminal.shape[0])
    return jnp.concatenate([jax.lax.scan(backwards, end, paid, reverse=True)[1], end[None]])


def _backwards(process: Process, choose: Callable[[jax.Array], jax.Array]) -> Values:
    def step(after, _):
        q = jnp.where(process.terminal[:, None], 0.0, process.reward + process.next_state @ after)
        v = jnp.where(process.terminal, process.outcome, choose(q))
        return v, (v, q, jnp.where(process.terminal[:, None], 0.0, q - v[:, None]))

    end = jnp.asarray(process.outcome)
    _, (v, q, advantage) = jax.lax.scan(step, end, length=TURNS, reverse=True)
    return Values(v=jnp.concatenate([v, end[None]]), q=q, advantage=advantage)
