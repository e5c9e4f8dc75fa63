"""Credit by marginal contributions: what a rollout is worth with a call and without it."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

from lightningrl.segments import segment_count
from lightningrl.table import Array, Credit, Evidence, TransitionTable

MAX_CALLS = 10  # 2¹⁰ coalitions a rollout


def shapley(table: TransitionTable, evidence: Evidence) -> Credit:
    """The Shapley value of every call, exact (SCAR, arXiv 2505.20417; Shapley 1953).

      φₜ = Σ_{S ⊆ {1…T}∖t} |S|! (T - |S| - 1)! / T! · (v(S ∪ t) - v(S))

    The credits of a rollout sum to v(all calls) - v(none): to the outcome, where v(all) is the outcome and v(none) is 0. Calls
    that add nothing to any coalition get 0, calls that add the same get the same.

    The value is Shapley's; that SCAR shares a reward out by it, among tokens or spans of text, is from the paper's abstract. Here
    the players are calls. How the paper asks a reward model about a part of a text, and how it approximates, was not checked.

    Args:
      table: N transitions; `turn` 0 … T-1 within each rollout.
      evidence: needs `coalition`, f32[R, 2^M], M ≤ 10: v of every subset of a rollout's first M calls, bit t for turn t. Entries of
        subsets with turns that the rollout doesn't have are not read.

    Returns:
      Credit of kind "return", f32[N]; 0 at padding and at turns from M on, which are then in no coalition.

    Raises:
      ValueError: there is no `evidence.coalition`, or its width is no power of two up to 2¹⁰.
    """
    chex.assert_equal_shape([table.rollout, table.turn, table.valid])
    chex.assert_type([table.rollout, table.turn, table.valid], [int, int, bool])
    value, calls, turns = _game(table, evidence, "shapley")
    subsets = np.arange(value.shape[1])
    result = jnp.zeros((value.shape[0], turns), jnp.float32)
    for players in range(1, turns + 1):
        mine = (calls == players)[:, None]
        read = mine & (subsets < 2**players)
        weights = _shapley_weights(players, turns)
        result += jnp.matmul(jnp.where(read, value, 0.0), weights, precision=jax.lax.Precision.HIGHEST)
    return Credit(value=_per_transition(table, result), kind="return")


def shapley_sampled(
    table: TransitionTable,
    evidence: Evidence,
    *,
    key: Array | None = None,
    permutations: int = 16,
    marginals: Array | None = None,
) -> Credit:
    """The Shapley value from random orders of the calls (SCAR, arXiv 2505.20417; Castro, Gómez, Tejada 2009).

      φₜ ≈ mean over orders π of v(calls up to t in π) - v(calls before t in π)

    Unbiased, and for every order the contributions of a rollout sum to v(all) - v(none), so their mean does too. The estimator is
    that of Castro, Gómez and Tejada; whether SCAR has it was not checked.

    Args:
      table: N transitions; `turn` 0 … T-1 within each rollout.
      evidence: needs `coalition` as `shapley` does, unless there are `marginals`.
      key: of the orders; `permutations` of them are drawn for every rollout on its own.
      permutations: ≥ 1.
      marginals: f32[P, N], contributions that were sampled elsewhere, for rollouts of too many calls for a table of
        coalitions; their mean over P is the credit.

    Returns:
      Credit of kind "return", f32[N]; 0 at padding, and from `coalition` at turns from M on.

    Raises:
      ValueError: neither or both of `key` and `marginals`; without marginals as `shapley`.
    """
    chex.assert_equal_shape([table.rollout, table.turn, table.valid])
    chex.assert_type([table.rollout, table.turn, table.valid], [int, int, bool])
    if (key is None) == (marginals is None):
        raise ValueError("shapley_sampled needs either a key to draw orders with or sampled marginals.")
    if key is None:
        chex.assert_shape(marginals, (None, *table.rollout.shape))
        chex.assert_type(marginals, float)
        return Credit(value=jnp.mean(jnp.where(table.valid, jnp.asarray(marginals), 0.0), axis=0), kind="return")

    value, calls, turns = _game(table, evidence, "shapley_sampled")
    exists = jnp.arange(turns) < calls[:, None]
    value = jnp.where(np.arange(value.shape[1]) < 2 ** calls[:, None], value, 0.0)
    bits = jnp.where(exists, 2 ** jnp.arange(turns), 0)

    def add_order(total, order_key):
        places = jnp.argsort(jnp.argsort(jax.random.uniform(order_key, exists.shape), axis=1), axis=1)
        before = jnp.sum(jnp.where(places[:, None, :] < places[:, :, None], bits[:, None, :], 0), axis=2)
        gain = jnp.take_along_axis(value, before + bits, 1) - jnp.take_along_axis(value, before, 1)
        return total + jnp.where(exists, gain, 0.0), None

    total, _ = jax.lax.scan(add_order, jnp.zeros(exists.shape, jnp.float32), jax.random.split(key, permutations))
    return Credit(value=_per_transition(table, total / permutations), kind="return")


def leave_one_call_out(table: TransitionTable, evidence: Evidence) -> Credit:
    """What a rollout loses without the call: v(all calls) - v(all but t).

    One coalition a call instead of all, and blind to calls that can stand in for each other: two of which either would have
    been enough both get 0. The credits of a rollout need not sum to its outcome.

    Args, returns and raises as `shapley`.
    """
    chex.assert_equal_shape([table.rollout, table.turn, table.valid])
    chex.assert_type([table.rollout, table.turn, table.valid], [int, int, bool])
    value, calls, turns = _game(table, evidence, "leave_one_call_out")
    everything = 2**calls - 1
    exists = jnp.arange(turns) < calls[:, None]
    without = jnp.where(exists, everything[:, None] - 2 ** jnp.arange(turns), 0)
    whole = jnp.take_along_axis(value, everything[:, None], 1)
    loss = jnp.where(exists, whole - jnp.take_along_axis(value, without, 1), 0.0)
    return Credit(value=_per_transition(table, loss), kind="return")


def _game(table: TransitionTable, evidence: Evidence, name: str) -> tuple[jax.Array, jax.Array, int]:
    """v[R, 2^M], the players of every rollout int32[R], at most M, and M."""
    if evidence.coalition is None:
        raise ValueError(f"{name} needs evidence.coalition, the value of every subset of a rollout's calls, but there is none.")
    chex.assert_rank(evidence.coalition, 2)
    chex.assert_type(evidence.coalition, float)
    rollouts, width = evidence.coalition.shape
    turns = width.bit_length() - 1
    if width != 2**turns or not 1 <= turns <= MAX_CALLS:
        raise ValueError(f"{name} needs 2^M coalitions of 1 to {MAX_CALLS} calls a rollout, not {width}: sample orders of longer ones.")
    calls = segment_count(table.rollout, rollouts, mask=table.valid).astype(jnp.int32)
    return jax.lax.stop_gradient(jnp.asarray(evidence.coalition)), jnp.minimum(calls, turns), turns


def _shapley_weights(players: int, turns: int) -> np.ndarray:
    """f32[2^M, M]: how much v(S) counts in φₜ of a rollout of that many players."""
    subsets = np.arange(2**turns)
    inside = (subsets[:, None] >> np.arange(turns)) & 1
    others = inside.sum(1, keepdims=True) - inside
    chance = np.array([1 / (players * math.comb(players - 1, n)) if n < players else 0.0 for n in range(turns + 1)])
    weights = np.where(inside == 1, 1.0, -1.0) * chance[others]
    used = (subsets[:, None] < 2**players) & (np.arange(turns) < players)
    return np.where(used, weights, 0.0).astype(np.float32)


def _per_transition(table: TransitionTable, credit: jax.Array) -> jax.Array:
    """[R, M] -> [N]."""
    turns = credit.shape[1]
    inside = jnp.logical_and(table.valid, jnp.asarray(table.turn) < turns)
    return jnp.where(inside, credit[table.rollout, jnp.where(inside, table.turn, 0)], 0.0)
