"""Credit that hands the outcome of a rollout out to its calls in unequal parts, as a return model says.

Each hands on the call's own part as its return, and not the sum of this and all later parts. Where parts are differences of an
exact g, the prediction of R from what is known after a call, later parts are 0 in expectation, for g(after t) is the mean of
g(after t+1): the sum would have the same mean and more variance. So a part is by itself what the call changed, much like an
advantage, and no `reward_to_go` of the parts is taken. A g that learns of a call's merit only from later calls hands that merit
to them, where a sum would give some of it back. Shares of attention are no such differences: see there.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from lightningrl.segments import last_in_segment, next_in_segment, safe_divide, segment_sum
from lightningrl.table import Array, Credit, Evidence, TransitionTable


def rudder(table: TransitionTable, evidence: Evidence) -> Credit:
    """What a call changed in the predicted return, and an equal part of what the prediction missed (RUDDER, arXiv 1806.07857).

      cₜ = g(after t) - g(after t-1) + (R - g(after the last)) / T,   g(before the first) = 0

    The credits of a rollout sum to R whatever g is: an optimal policy stays optimal under an exact redistribution, and the
    residual is how the paper's code makes it exact.

    This is the redistributed reward, and no reward-to-go is taken of it. Under an exact g the rewards after t sum to 0 in
    expectation, which is what the paper asks of an optimal redistribution: the reward alone is then what the call changed in
    the expected outcome, like an advantage, with less variance than a sum, which is R - g(after t-1) there. Under another g
    the two differ in the mean as well. The paper learns from redistributed rewards by other methods too, PPO among them; its
    numbering of sections and theorems was not checked.

    Args:
      table: N transitions; R is `outcome[:, 0]`, intermediate rewards are not read.
      evidence: needs `predicted_return`, f32[N], the return model's prediction of R after the transition.

    Returns:
      Credit of kind "return", f32[N]; 0 at padding. With one call it is `identical`, with a constant g an equal split but
      for the first call's g.

    Raises:
      ValueError: there is no `evidence.predicted_return`.
    """
    chex.assert_equal_shape([table.rollout, table.weight, table.valid])
    chex.assert_shape(table.outcome, (*table.rollout.shape, None))
    chex.assert_type([table.outcome, table.weight, table.valid], [float, float, bool])
    change = _predicted_change(table, evidence, "rudder")
    return Credit(value=_close(table, change), kind="return")


def spa(table: TransitionTable, evidence: Evidence, *, progress_weight: float = 1.0, reward_weight: float = 0.0) -> Credit:
    """Predicted progress of a call as its reward (SPA-RL, arXiv 2505.20732).

      cₜ = α (g(after t) - g(after t-1)) + β rₜ,   g(before the first) = 0

    The paper's model predicts a contribution ĉₜ of every step, fitted so that Σₛ ĉₛ is R; `predicted_return` holds their running
    sum g(after t) = Σₛ≤ₜ ĉₛ, as for `rudder`, and the difference is ĉₜ again. Nothing closes the gap to R: the credits sum to
    α g(after the last) + β Σ r, right as far as the model is. r stands for the paper's grounding signal, whether a step could
    be carried out; its weights there were not checked, nor were sections of the paper: ĉ was read in the authors' code.

    The paper takes c as the reward of PPO, so that a critic's returns sum it over the calls to come. Here c itself is the
    return, with no reward-to-go: under an exact model later ĉ are 0 in expectation, and leaving them out takes their variance
    away. It also leaves out later r, which are not 0 in expectation: with β > 0 a call is not credited with what it enables.

    Args:
      table: N transitions; r is `reward`, the outcome is not read.
      evidence: needs `predicted_return`, f32[N].
      progress_weight, reward_weight: α, β ≥ 0.

    Returns:
      Credit of kind "return", f32[N]; 0 at padding.

    Raises:
      ValueError: there is no `evidence.predicted_return`.
    """
    chex.assert_equal_shape([table.rollout, table.reward, table.valid])
    chex.assert_type([table.reward, table.valid], [float, bool])
    change = _predicted_change(table, evidence, "spa")
    value = progress_weight * change + reward_weight * jnp.where(table.valid, table.reward, 0.0)
    return Credit(value=value, kind="return")


def attention_based(table: TransitionTable, evidence: Evidence, *, beta: float = 1.0) -> Credit:
    """The outcome in the proportions of a return model's attention (ABC, arXiv 2402.00782).

      cₜ = β αₜ R + (1 - β) R 1[t last],   αₜ = aₜ / Σₛ aₛ

    The attention over the calls is a part of the model's whole attention, so it is renormalised: the credits of a rollout
    sum to R. The authors' code leaves that division out. The formula was read in that code; no section of the paper was checked.

    The paper takes c as the dense reward of PPO, which sums it over what is to come. Here c itself is the return, with no
    reward-to-go, so that a call is paid its share and no later one's. That attention is a call's part in the outcome is taken
    on trust: unlike a difference of exact predictions (`rudder`), shares have one sign, that of R, and later ones are not 0
    in expectation. With β = 0 only the last call earns anything, where a reward-to-go would make it `identical`.

    Args:
      table: N transitions; R is `outcome[:, 0]`.
      evidence: needs `attention`, f32[N] ≥ 0; negative numbers count as 0.
      beta: β in [0, 1].

    Returns:
      Credit of kind "return", f32[N]; 0 at padding. A rollout whose attention is 0 everywhere is split equally.

    Raises:
      ValueError: there is no `evidence.attention`.
    """
    chex.assert_equal_shape([table.rollout, table.weight, table.valid])
    chex.assert_shape(table.outcome, (*table.rollout.shape, None))
    chex.assert_type([table.outcome, table.weight, table.valid], [float, float, bool])
    if evidence.attention is None:
        raise ValueError("attention_based needs evidence.attention, a return model's attention to every call, but there is none.")
    chex.assert_shape(evidence.attention, table.rollout.shape)
    chex.assert_type(evidence.attention, float)
    size = table.rollout.shape[0]
    attention = jax.lax.stop_gradient(jnp.maximum(jnp.where(table.valid, evidence.attention, 0.0), 0.0))
    total = segment_sum(attention, table.rollout, size, mask=table.valid)[table.rollout]
    share = jnp.where(total > 0, safe_divide(attention, total), jnp.where(table.valid, table.weight, 0.0))
    outcome = jnp.where(table.valid, table.outcome[:, 0], 0.0)
    last = last_in_segment(table.rollout, table.valid)
    return Credit(value=outcome * (beta * share + (1.0 - beta) * last), kind="return")


def _predicted_change(table: TransitionTable, evidence: Evidence, name: str) -> jax.Array:
    if evidence.predicted_return is None:
        raise ValueError(f"{name} needs evidence.predicted_return, a return model's prediction after every call, but there is none.")
    chex.assert_shape(evidence.predicted_return, table.rollout.shape)
    chex.assert_type(evidence.predicted_return, float)
    prediction = jax.lax.stop_gradient(jnp.where(table.valid, evidence.predicted_return, 0.0))
    backwards = (jnp.flip(jnp.asarray(x)) for x in (prediction, table.rollout, table.valid))
    return prediction - jnp.flip(next_in_segment(*backwards))


def _close(table: TransitionTable, credit: Array) -> jax.Array:
    """Credits with what they lack to the outcome of their rollout added in equal parts."""
    size = table.rollout.shape[0]
    outcome, weight = (jnp.where(table.valid, x, 0.0) for x in (table.outcome[:, 0], table.weight))
    missing = outcome - segment_sum(credit, table.rollout, size, mask=table.valid)[table.rollout]
    return jnp.where(table.valid, credit + missing * weight, 0.0)
