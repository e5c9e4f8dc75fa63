"""Two levels of generalised advantage estimation: over the turns of a rollout, then over the tokens of each turn."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from lightningrl.advantages.token_order import OrderedEdges, in_order, token_values
from lightningrl.advantages.token_returns import whiten_tokens
from lightningrl.segments import next_in_segment, reverse_affine_scan, segment_count, segment_sum
from lightningrl.table import Array, Evidence, TokenTable, TransitionTable

TurnValue = Literal["last_token", "first_token"]


def bi_level_gae(
    table: TransitionTable,
    tokens: TokenTable,
    advantage: Array,
    evidence: Evidence,
    *,
    turn_gamma: float = 0.95,
    turn_lambda: float = 1.0,
    gamma: float = 1.0,
    lambda_: float = 1.0,
    turn_value: TurnValue = "last_token",
    whitened: bool = False,
) -> jax.Array:
    """Bi-level GAE (RAGEN, arXiv 2504.20073; VAGEN, arXiv 2510.16907), with explicit turns.

      over turns    Δₜ = rₜ + γ′ Uₜ₊₁ - Uₜ,   Bₜ = Δₜ + γ′λ′ Bₜ₊₁,   U 0 after the last turn
      over tokens   rₖ = Bₜ + Uₜ at the last token of turn t, else 0
                    δₖ = rₖ + γ Vₖ₊₁ - Vₖ,   Aₖ = δₖ + γλ Aₖ₊₁,   V and A 0 after the last token of the turn

    V is a token critic, U of a turn is V at one of its tokens. So every turn is an episode of its own, paid with the turn's
    λ-return; γ and λ of tokens don't reach over observations. Turns are transitions with tokens to train: where the authors'
    code takes every non-zero reward for the end of a turn, here a reward of 0 is a reward.

    The authors' code reads U at the turn's last token, so that the turn's advantage Bₜ is the last token's; it has one λ for
    both levels and whitens the result. The text of the paper can also be read as adding Bₜ to the last token's own error; we
    follow the code. The value of the state that the turn started in is "first_token".

    Args:
      table: N transitions.
      tokens: E edges, of any shape, in any order.
      advantage: not read.
      evidence: needs `token_value`, f32 of the shape of the edges.
      turn_gamma, turn_lambda: γ′ and λ′ in [0, 1], per turn.
      gamma, lambda_: γ and λ in [0, 1], per token.
      turn_value: where U is read, "last_token" or "first_token".
      whitened: whether tokens are whitened at the end (`whiten_tokens`), which moves their zero.

    Returns:
      f32[E]; 0 where no loss is wanted. No gradient flows into the critic.

    Raises:
      ValueError: there is no `evidence.token_value`, or an unknown turn_value.
    """
    edges = in_order(table, tokens)
    value = token_values(edges, tokens, evidence, "bi_level_gae")
    returns = _turn_returns(table, edges, value, turn_gamma, turn_lambda, turn_value)
    result = edges.put(_within_turns(edges, value, returns, gamma, lambda_), tokens)
    return whiten_tokens(result, tokens.mask) if whitened else result


def bi_level_value_target(
    table: TransitionTable,
    tokens: TokenTable,
    advantage: Array,
    evidence: Evidence,
    *,
    turn_gamma: float = 0.95,
    turn_lambda: float = 1.0,
    gamma: float = 1.0,
    lambda_: float = 1.0,
    turn_value: TurnValue = "last_token",
) -> jax.Array:
    """What the critic of `bi_level_gae` learns: Aₖ + Vₖ, before any whitening. Args, returns and raises as there."""
    edges = in_order(table, tokens)
    value = token_values(edges, tokens, evidence, "bi_level_gae")
    returns = _turn_returns(table, edges, value, turn_gamma, turn_lambda, turn_value)
    return edges.put(_within_turns(edges, value, returns, gamma, lambda_) + value, tokens)


def _turn_returns(
    table: TransitionTable, edges: OrderedEdges, value: jax.Array, gamma: float, lambda_: float, turn_value: TurnValue
) -> jax.Array:
    """f32[N]: Bₜ + Uₜ."""
    if turn_value not in get_args(TurnValue):
        raise ValueError(f"bi_level_gae has no turn_value {turn_value!r}: choose one of {', '.join(get_args(TurnValue))}.")
    size = table.rollout.shape[0]
    acts = segment_count(edges.transition, size, mask=edges.mask) > 0
    read_at = edges.last if turn_value == "last_token" else edges.first
    turn = segment_sum(value, edges.transition, size, mask=read_at)
    rewards = segment_sum(edges.reward, edges.transition, size, mask=edges.last)
    errors = rewards + gamma * next_in_segment(turn, table.rollout, acts) - turn
    return reverse_affine_scan(jnp.full_like(errors, gamma * lambda_), errors, table.rollout, acts) + turn


def _within_turns(edges: OrderedEdges, value: jax.Array, returns: jax.Array, gamma: float, lambda_: float) -> jax.Array:
    rewards = jnp.where(edges.last, returns[edges.transition], 0.0)
    errors = rewards + gamma * edges.following(value, edges.transition) - value
    return reverse_affine_scan(jnp.full_like(errors, gamma * lambda_), errors, edges.transition, edges.mask)
