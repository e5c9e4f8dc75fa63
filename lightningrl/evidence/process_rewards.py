"""The implicit process-reward model: a language model trained on outcomes, whose log-ratio to a reference rewards every token.

The score of a rollout is s = β Σₖ log φ(yₖ)/ref(yₖ) over all tokens of all its calls. Whatever the loss L of scores is, its gradient
has the shape of a policy gradient,

  ∇L = Σᵢ ∂L/∂sᵢ β Σₖ ∇ log φ(yᵢₖ),

so φ is trained by the policy's own train step: loss -A log φ, and A = -β ∂L/∂sᵢ, computed from a pass that only scores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax
from jax.sharding import Mesh

from lightningrl import advantages, credit, losses
from lightningrl.evidence.scorer import by_response, edge_logps, padded, table_calls
from lightningrl.losses.aggregation import Aggregate
from lightningrl.model.config import ModelConfig
from lightningrl.model.params import Params
from lightningrl.packing.rows import PackedBatch, RowSettings, pack
from lightningrl.recipe import Recipe
from lightningrl.table import Array, Evidence, UnitCounts
from lightningrl.tabulate import trained_rollouts
from lightningrl.train import EdgeBatch, TrainState, TrainStep
from lightningrl.types import Rollout

# (scores [R], outcomes [R], groups [R]) -> (L, ∂L/∂scores [R]), all float64 NumPy
Objective = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[float, np.ndarray]]


def outcome_cross_entropy(scores: np.ndarray, outcomes: np.ndarray, groups: np.ndarray) -> tuple[float, np.ndarray]:
    """A rollout's score tells how likely it succeeded (the outcome loss of PRIME, arXiv 2502.01456).

      L = -1/R Σᵢ [yᵢ log σ(sᵢ) + (1 - yᵢ) log(1 - σ(sᵢ))],   ∂L/∂sᵢ = (σ(sᵢ) - yᵢ) / R

    Args:
      scores: float64 [R].
      outcomes: float64 [R], y in [0, 1].
      groups: not read; groups of one and constant groups count like any other.

    Raises:
      ValueError: an outcome is outside [0, 1].
    """
    if len(outcomes) and not (0.0 <= outcomes.min() and outcomes.max() <= 1.0):
        worst = max(outcomes, key=lambda y: abs(y - 0.5))
        raise ValueError(f"an outcome is {worst:g}, but cross-entropy needs all in [0, 1]: scale the reward, or use trajectory_dpo")
    # log(1 + eˢ) - y s, which nothing overflows.
    loss = np.mean(np.logaddexp(0.0, scores) - outcomes * scores)
    return float(loss), (_sigmoid(scores) - outcomes) / len(scores)


def trajectory_dpo(scores: np.ndarray, outcomes: np.ndarray, groups: np.ndarray) -> tuple[float, np.ndarray]:
    """The better rollout of a task has the higher score (iStar, arXiv 2509.19199: DPO, arXiv 2305.18290, on trajectories).

      L = -1/P Σ log σ(sᵢ - sⱼ)   over the P pairs of a group's rollouts with yᵢ > yⱼ

    Every pair weighs one, whatever its group; that is our reading.

    Args:
      scores: float64 [R].
      outcomes: float64 [R], y, any numbers.
      groups: int [R].

    Returns:
      L and its derivatives; 0 where a rollout is in no pair, as in a group of one or a constant one, and where there is none at all.
    """
    better = (groups[:, None] == groups[None, :]) & (outcomes[:, None] > outcomes[None, :])
    pairs = max(int(better.sum()), 1)
    difference = scores[:, None] - scores[None, :]
    loss = np.sum(np.logaddexp(0.0, -difference), where=better) / pairs
    pull = np.where(better, _sigmoid(-difference), 0.0) / pairs
    return float(loss), pull.sum(0) - pull.sum(1)


def process_reward_step(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainStep:
    """What trains φ, a model of the policy's shape. PRIME's optimizer is AdamW at a learning rate of 1e-6, clipped at norm 10."""
    return TrainStep(config, PROCESS_REWARD_MODEL, optimizer, mesh)


def init_process_rewards(step: TrainStep, policy: Params) -> dict[str, Any]:
    """φ as a copy of the policy, and a fresh optimizer: the `aux` of `process_rewards` before its first call."""
    return _as_aux(step.init(policy))


def process_rewards(
    policy: Params,
    aux: Mapping[str, Any],
    rollouts: Sequence[Rollout],
    key: Array,
    *,
    step: TrainStep,
    rows: RowSettings,
    reference: Params | None = None,
    objective: Objective = outcome_cross_entropy,
    beta: float = 0.05,
    update_first: bool = True,
    row_multiple: int = 1,
    multiple: int = 1,
) -> tuple[Evidence, dict[str, Any]]:
    """The evidence producer of `prm_logp` and `prm_ref_logp`; φ takes one optimizer step on the rollouts' outcomes.

    PRIME (arXiv 2502.01456) updates φ online, on the rollouts that it is about to reward, and describes it so: first the
    update, then the rewards (`update_first`, "double forward", verl's example). Its own training script rewards with φ
    as it was before the update, which saves a pass, and so does iStar's (arXiv 2509.19199). iStar is `trajectory_dpo` with
    reference None and update_first False; PRIME is `outcome_cross_entropy` with the starting policy as the reference.

    Args:
      policy: before its update; read only where `reference` is None.
      aux: {params, opt_state, step} of φ, from `init_process_rewards` or the last call. It is consumed.
      rollouts: those of the table, in its order. y is their "reward". Calls that are not trained count as well: they had a part
        in the outcome.
      key: not read.
      step: of `process_reward_step`.
      rows: the shapes that training uses.
      reference: the policy that training started from; None for the policy of this iteration.
      objective: L; where all its derivatives are 0, φ takes no step.
      beta: β > 0, the same as that of the advantage; 0.05 is PRIME's.
      update_first: whether the rewards are those of φ after its step.
      row_multiple: rows of a micro-batch are a multiple of it, the number of devices that share them.
      multiple: M is the least multiple of it that holds the response tokens.

    Returns:
      float32 [M] each, at the temperatures that sampled, in order of (transition of the table, k): `scorer.by_response`. 0 at padding.
      And φ's new state.

    Raises:
      ValueError: a call doesn't fit a row, there is none, or an outcome is not one that the objective knows.
    """
    used = trained_rollouts(rollouts)
    transitions, owner = table_calls(used)
    lengths = [len(t.response_ids) for t in transitions]
    packed = pack(transitions, range(len(transitions)), rows, multiple=row_multiple)

    def logps(params: Params) -> np.ndarray:
        return by_response(packed.edges, edge_logps(params, packed, score=step.score), lengths)

    state = TrainState(**aux)
    ref_logp, logp = logps(policy if reference is None else reference), logps(state.params)
    _, slopes = objective(implicit_scores(logp, ref_logp, used, beta=beta), *_outcomes(used))
    if np.any(slopes):
        state, _ = step.update(state, packed.rows, _edge_batch(packed, owner, lengths, -beta * slopes))
        logp = logps(state.params) if update_first else logp
    return Evidence(prm_logp=padded(logp, multiple), prm_ref_logp=padded(ref_logp, multiple)), _as_aux(state)


def implicit_scores(logp: Array, ref_logp: Array, rollouts: Sequence[Rollout], *, beta: float = 0.05) -> np.ndarray:
    """s = β Σₖ log φ(yₖ)/ref(yₖ) of every rollout of the table: float64 [R], of float [M] in the order of `process_rewards`."""
    used = trained_rollouts(rollouts)
    tokens = [sum(len(t.response_ids) for t in rollout.transitions) for rollout in used]
    of = np.repeat(np.arange(len(used)), tokens)
    ratios = np.asarray(logp, np.float64)[: len(of)] - np.asarray(ref_logp, np.float64)[: len(of)]
    return beta * np.bincount(of, weights=ratios, minlength=len(used))


def rollout_sum(loss: Array, mask: Array, counts: UnitCounts) -> Aggregate:
    """Sum over the tokens of a rollout, mean over rollouts:  Σ m ℓ  /  Σᵢ 1."""
    return losses.token_mean(loss, mask, counts)[0], losses.rollout_mean(loss, mask, counts)[1]


PROCESS_REWARD_MODEL = Recipe(
    name="process_reward_model",
    arxiv="2502.01456, 2509.19199",
    use_when="never for a policy: trains an implicit process-reward model",
    credit=credit.identical,
    advantage=advantages.unchanged,
    loss=functools.partial(losses.negative_log_likelihood, weighted=True),
    aggregation=rollout_sum,
)


def _edge_batch(packed: PackedBatch, owner: Sequence[int], lengths: Sequence[int], pull: np.ndarray) -> EdgeBatch:
    """Edges with A such that the step's gradient, a mean over rollouts, is that of -Σᵢ pullᵢ Σₖ log φ(yᵢₖ)."""
    rollout = np.asarray(owner)[packed.edges.transition]
    tokens = np.bincount(owner, weights=lengths, minlength=len(pull))
    mask, zeros = np.asarray(packed.edges.mask), np.zeros(packed.edges.mask.shape, np.float32)
    counts = UnitCounts(sequence_tokens=zeros, rollout_tokens=np.where(mask, tokens[rollout], 0.0).astype(np.float32), group_tokens=zeros)
    advantage = np.where(mask, np.count_nonzero(tokens) * pull[rollout], 0.0).astype(np.float32)
    return EdgeBatch(tokens=packed.edges, counts=counts, advantage=advantage, old_value=zeros, value_target=zeros)


def _outcomes(used: Sequence[Rollout]) -> tuple[np.ndarray, np.ndarray]:
    groups = {name: number for number, name in enumerate(dict.fromkeys(rollout.group for rollout in used))}
    return np.array([rollout.reward for rollout in used], np.float64), np.array([groups[rollout.group] for rollout in used])


def _as_aux(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "opt_state": state.opt_state, "step": state.step}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))
