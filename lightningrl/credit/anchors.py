"""Credit from calls that other rollouts of the group made in the same state."""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp

from lightningrl.credit.returns import reward_to_go, turn_rewards
from lightningrl.normalize import Scale, group_normalize
from lightningrl.segments import EPSILON, safe_divide, segment_count, segment_sum
from lightningrl.table import Credit, Evidence, TransitionTable

Variant = Literal["paper", "code"]


def gigpo(
    table: TransitionTable,
    evidence: Evidence,
    *,
    gamma: float = 0.95,
    step_weight: float = 1.0,
    baseline: Variant = "paper",
    scale: Scale = "none",
    ddof: float = 1.0,
    eps: float = EPSILON,
) -> Credit:
    """Relative to the group, and to the calls made in the same state (GiGPO, arXiv 2505.10978, eq. 3, 5-8).

      Aᴱᵢ = (Rᵢ - μ(R)) / F                      over the rollouts of the group
      Aˢᵢ,ₜ = (Gᵢ,ₜ - μ(G)) / F                  over the calls of the group whose state equals that of call t
      Aᵢ,ₜ = Aᴱᵢ + w Aˢᵢ,ₜ

    R is the sum of all rewards of the rollout, G the discounted reward-to-go, F is 1 or the standard deviation plus eps. A
    rollout that comes back to a state is in that state's group twice, as in the authors' code.

    Args:
      table: N transitions; states are equal where `anchor[:, 0]` is.
      evidence: not read.
      gamma: γ in [0, 1], per turn.
      step_weight: w ≥ 0.
      baseline: what Aᴱ's statistics count. "paper": rollouts (eq. 3). "code": calls, so that a rollout of nine weighs as much
        as nine of one, and a group of a single call keeps its raw R, as the authors' default does.
      scale: "none" is F = 1, their default; "std" the other.
      ddof, eps: of F with scale="std"; theirs are 1 and 10⁻⁶.

    Returns:
      Credit of kind "advantage", f32[N]; 0 at padding. Aˢ is exactly 0 for a state that was seen once or whose calls all
      returned the same; Aᴱ for a constant group, and with baseline="paper" for a group of one rollout.

    Raises:
      ValueError: an unknown baseline or scale.
    """
    chex.assert_equal_shape([table.rollout, table.group, table.weight, table.valid])
    chex.assert_shape(table.anchor, (*table.rollout.shape, None))
    chex.assert_type([table.anchor, table.weight, table.valid], [int, float, bool])
    _check_variant("gigpo", "baseline", baseline)
    every_call = table.valid.astype(jnp.float32)
    total = segment_sum(turn_rewards(table), table.rollout, table.rollout.shape[0], mask=table.valid)[table.rollout]
    if baseline == "paper":
        weights = jnp.where(table.valid, table.weight, 0.0)
        of_episode = group_normalize(total, table.group, weights, units=table.rollout, scale=scale, ddof=ddof, eps=eps)
    else:
        of_episode = group_normalize(total, table.group, every_call, scale=scale, ddof=ddof, eps=eps, singleton="raw")
    to_go = reward_to_go(table, evidence, gamma=gamma).value
    of_step = group_normalize(to_go, table.anchor[:, 0], every_call, scale=scale, ddof=ddof, eps=eps)
    return Credit(value=of_episode + step_weight * of_step, kind="advantage")


def hgpo(
    table: TransitionTable,
    evidence: Evidence,
    *,
    gamma: float = 0.95,
    alpha: float = 1.0,
    levels: Variant = "paper",
    ddof: float = 0.0,
    eps: float = EPSILON,
) -> Credit:
    """Relative to the calls with the same recent history, over several lengths of it (HGPO, arXiv 2602.22817).

      aₖ = (G - μₖ) / (σₖ + eps)        over the calls of the group whose last k+1 states are equal, k = 0 … K-1
      A = Σₖ wₖ aₖ / Σₖ wₖ,   wₖ = (k+1)^α,   over those k whose group has more than one call

    Longer histories make smaller groups of calls that are more alike; α says how much they are preferred. With α = 1 the
    weights are 1, 2, 3 … from the current state alone on: the paper's eq. 7, in which k counts the states before the current
    one, as two published summaries of it give it; the paper itself was not read. One of them says that its experiments also skip
    levels at which the advantage is 0 (§5.1), as levels="code" does.

    The authors' code (verl-agent, recipe/hgpo, read in two copies of it) is not the same. Its k counts the current state too and its
    weight is (k+1)^α all the same, so that these levels weigh 2, 3, 4 …; weight 1 is that of a level of whole rollouts, off by default,
    which is not here. It also has no level of more states than a rollout has had so far, where here a short history is a
    history of its own and its calls are compared at every level. No setting has these weights: levels="code" is that code in
    one point only, and one of the two copies has dropped that point.

    Args:
      table: N transitions; K is the width of `anchor`.
      evidence: not read.
      gamma: γ in [0, 1], per turn, of the reward-to-go G.
      alpha: α ≥ 0.
      levels: which k count. "paper": groups of more than one call. "code": of these only where aₖ is not exactly 0, which
        takes out the verdict "as good as the average" and leaves its weight to the others.
      ddof, eps: of σₖ; theirs are 0 and 10⁻⁶.

    Returns:
      Credit of kind "advantage", f32[N]; 0 at padding and for a call whose state was seen once. A group whose calls all
      returned the same has aₖ = 0 exactly.

    Raises:
      ValueError: an unknown levels.
    """
    chex.assert_equal_shape([table.rollout, table.valid])
    chex.assert_shape(table.anchor, (*table.rollout.shape, None))
    chex.assert_type([table.anchor, table.valid], [int, bool])
    _check_variant("hgpo", "levels", levels)
    size, depth = table.anchor.shape
    weights = table.valid.astype(jnp.float32)
    to_go = reward_to_go(table, evidence, gamma=gamma).value

    def level(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        advantage = group_normalize(to_go, ids, weights, ddof=ddof, eps=eps)
        counts = segment_count(ids, size, mask=table.valid)[ids] > 1
        return advantage, counts & (advantage != 0) if levels == "code" else counts

    advantages, counts = jax.vmap(level, in_axes=1)(jnp.asarray(table.anchor))
    preference = jnp.where(counts & table.valid, jnp.arange(1, depth + 1, dtype=jnp.float32)[:, None] ** alpha, 0.0)
    return Credit(value=safe_divide(jnp.sum(preference * advantages, 0), jnp.sum(preference, 0)), kind="advantage")


def _check_variant(function: str, name: str, choice: str) -> None:
    if choice not in get_args(Variant):
        raise ValueError(f"{function} has no {name} {choice!r}: choose one of {', '.join(get_args(Variant))}.")
