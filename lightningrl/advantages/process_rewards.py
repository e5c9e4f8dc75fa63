"""Advantages from an implicit process-reward model, whose log-ratio to its reference is the reward of a token."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lightningrl.advantages.token_order import OrderedEdges, in_order
from lightningrl.advantages.token_returns import whiten_tokens
from lightningrl.advantages.tokens import broadcast
from lightningrl.advantages.units import Count
from lightningrl.normalize import group_normalize
from lightningrl.ratio import log_ratio
from lightningrl.segments import (
    EPSILON,
    reverse_affine_scan,
    safe_divide,
    segment_count,
    segment_max,
    segment_mean,
    segment_min,
    segment_sum,
)
from lightningrl.table import Array, Evidence, TokenTable, TransitionTable


def prime(
    table: TransitionTable,
    tokens: TokenTable,
    advantage: Array,
    evidence: Evidence,
    *,
    beta: float = 0.05,
    gamma: float = 1.0,
    whitened: bool = False,
) -> jax.Array:
    """Rewards to come of an implicit process-reward model, besides the outcome's advantage (PRIME, arXiv 2502.01456, eq. 5).

      rₖ = β log π_φ(yₖ)/π_ref(yₖ)
      Aᵢ,ₖ = Σₛ≥ₖ γˢ⁻ᵏ (rᵢ,ₛ - mean_{j≠i} r̄ⱼ) + A_{transition(k)},   r̄ⱼ the mean of rollout j's token rewards

    The baseline is the mean over the group's other rollouts, every rollout weighing one. The paper's outcome part is
    leave-one-out: give `leave_one_out` of `identical` as the advantage. Its code then whitens tokens over the batch. The sum
    runs on through later calls; the paper has one.

    Args:
      table: N transitions.
      tokens: E edges, of any shape, in any order.
      advantage: f32[N], of the outcome.
      evidence: needs `prm_logp` and `prm_ref_logp`, f32 of the shape of the edges.
      beta: β > 0; the paper's is 0.05. The log-ratio is clamped to ±20.
      gamma: γ in [0, 1], per token; the paper's is 1.
      whitened: whether the result is whitened over tokens (`whiten_tokens`).

    Returns:
      f32[E]; 0 where no loss is wanted. The process part is exactly 0 where a group has tokens of one rollout only, and where
      all its token rewards are equal.

    Raises:
      ValueError: there is no `evidence.prm_logp` or no `evidence.prm_ref_logp`.
    """
    chex.assert_shape(advantage, table.rollout.shape)
    chex.assert_equal_shape([table.rollout, table.group, table.valid])
    edges = in_order(table, tokens)
    rewards = _implicit_rewards(edges, tokens, evidence, beta, "prime")
    size = table.rollout.shape[0]
    mean = segment_mean(rewards, edges.rollout, size, mask=edges.mask)
    exists = segment_count(edges.rollout, size, mask=edges.mask) > 0
    group = segment_max(jnp.asarray(table.group), table.rollout, size, mask=table.valid)
    total = segment_sum(mean, group, size, mask=exists)[group]
    others = segment_count(group, size, mask=exists)[group] - 1.0
    baseline = safe_divide(total - mean, jnp.maximum(others, 0.0))

    edge_group = jnp.asarray(table.group)[edges.transition]
    low, high = (f(rewards, edge_group, size, mask=edges.mask)[edge_group] for f in (segment_min, segment_max))
    compared = (low != high) & (others > 0)[edges.rollout]
    terms = jnp.where(compared, rewards - baseline[edges.rollout], 0.0)
    process = reverse_affine_scan(jnp.full_like(terms, gamma), terms, edges.rollout, edges.mask)
    result = edges.put(process, tokens) + broadcast(table, tokens, advantage, evidence)
    return whiten_tokens(result, tokens.mask) if whitened else result


def istar(
    table: TransitionTable,
    tokens: TokenTable,
    advantage: Array,
    evidence: Evidence,
    *,
    beta: float = 0.05,
    coef: float = 1.0,
    count: Count = "rollouts",
    ddof: float = 1.0,
    eps: float = EPSILON,
) -> jax.Array:
    """A step's implicit reward relative to its group, besides the rollout's advantage (iStar, arXiv 2509.19199, §3).

      rₜ = β Σ_{k in turn t} log π_φ(yₖ)/π_ref(yₖ)
      A_k = A_{transition(k)} + α (rₜ - μg) / (σg + eps)

    The paper's reference is the policy that sampled. Its μg and σg are, as we read it, over all steps of the group's rollouts
    (count="transitions"); here by default every rollout weighs one, however many steps it took.

    Args:
      table: N transitions.
      tokens: E edges, of any shape, in any order.
      advantage: f32[N], of the rollout: `group_norm` of `identical` in the paper.
      evidence: needs `prm_logp` and `prm_ref_logp`, f32 of the shape of the edges.
      beta: β > 0; divided out by σg but for eps. The log-ratio of a token is clamped to ±20. 0.05 is ours, not checked.
      coef: α ≥ 0, the weight of steps; 1 is ours, not checked.
      count: whether μg and σg count "rollouts" or "transitions", those with tokens to train.
      ddof, eps: as in `group_normalize`.

    Returns:
      f32[E]; 0 where no loss is wanted. The step part is exactly 0 where all steps of a group earned the same, and where only
      one rollout has steps.

    Raises:
      ValueError: there is no `evidence.prm_logp` or no `evidence.prm_ref_logp`, or an unknown count.
    """
    chex.assert_shape(advantage, table.rollout.shape)
    chex.assert_equal_shape([table.rollout, table.group])
    if count not in ("rollouts", "transitions"):
        raise ValueError(f"istar cannot count {count!r}: choose one of rollouts, transitions.")
    edges = in_order(table, tokens)
    rewards = _implicit_rewards(edges, tokens, evidence, beta, "istar")
    size = table.rollout.shape[0]
    turns = segment_sum(rewards, edges.transition, size, mask=edges.mask)
    acts = segment_count(edges.transition, size, mask=edges.mask) > 0
    weights = jnp.where(acts, 1.0, 0.0)
    if count == "rollouts":
        weights = safe_divide(weights, segment_count(table.rollout, size, mask=acts)[table.rollout])
    steps = group_normalize(turns, table.group, weights, units=table.rollout, ddof=ddof, eps=eps)
    return broadcast(table, tokens, advantage, evidence) + coef * broadcast(table, tokens, steps, evidence)


def _implicit_rewards(edges: OrderedEdges, tokens: TokenTable, evidence: Evidence, beta: float, what: str) -> jax.Array:
    model, reference = evidence.prm_logp, evidence.prm_ref_logp
    if model is None or reference is None:
        missing = "prm_logp" if model is None else "prm_ref_logp"
        raise ValueError(f"{what} needs evidence.{missing}, log-probs of the process-reward model or its reference, but there is none.")
    chex.assert_equal_shape([model, reference, tokens.mask])
    return beta * jax.lax.stop_gradient(edges.take(log_ratio(model, reference, tokens.mask)))
