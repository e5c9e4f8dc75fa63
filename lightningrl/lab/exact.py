"""Evidence without an error: the exact tabular counterpart of what a model would have to learn, or a language model be asked for.

Producers as in `lab.evidence`, but these read the process itself. A pair that uses one shows what a method is worth with a perfect
model, and against the same method with a learned one, what the model's error costs. No learner has this evidence, and its cost
in environment steps is not counted.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lightningrl.credit import reward_to_go
from lightningrl.lab.evidence import Producer, Sampled
from lightningrl.lab.process import RESPONSE, TURNS, return_bin
from lightningrl.lab.sampling import Plan
from lightningrl.lab.truth import outcome_values, policy_values, return_distribution, tilted_log_ratio
from lightningrl.table import Array, Evidence

Fields = tuple[dict[str, Array], float]
BETA = 0.05  # of implicit rewards, as in `advantages.prime` and `istar`
LEAST = 1e-6  # a probability of which a logarithm is taken


def exact_value(sampled: Sampled, plan: Plan) -> Fields:
    """V_t(s) before each call."""
    return {"value": _before(sampled, policy_values(sampled.process, sampled.logits).v)}, 0.0


def exact_token_value(sampled: Sampled, plan: Plan) -> Fields:
    """V_t(s) before the token that chooses, Q_t(s, a) after it."""
    values = policy_values(sampled.process, sampled.logits)
    before, after = _before(sampled, values.v), _of_calls(sampled, values.q)
    return {"token_value": _first_token(before, after)}, 0.0


def exact_potential(sampled: Sampled, plan: Plan) -> Fields:
    """Φ = V, the potential with which one step says everything (Ng, Harada, Russell 1999, corollary 2)."""
    return {"potential": _around(sampled, policy_values(sampled.process, sampled.logits).v)}, 0.0


def exact_branch_value(sampled: Sampled, plan: Plan) -> Fields:
    """Means of infinitely many rollouts from the states before and after each call."""
    values = _around(sampled, policy_values(sampled.process, sampled.logits).v)
    return {"branch_value": values, "branch_count": jnp.where(sampled.table.valid[:, None], jnp.ones_like(values), 0.0)}, 0.0


def exact_predicted_return(sampled: Sampled, plan: Plan) -> Fields:
    """E[R | all calls so far] = Q_t(s, a) of the outcome: the regression of the outcome that RUDDER and SPA approximate."""
    return {"predicted_return": _of_calls(sampled, outcome_values(sampled.process, sampled.logits).q)}, 0.0


def exact_coalition(sampled: Sampled, plan: Plan) -> Fields:
    """v(C) = E[R | the calls of C were made]. What comes after a call depends on nothing before it, so the latest call of C decides.

    v(∅) is V of the outcome at the start: the task is known.
    """
    values = outcome_values(sampled.process, sampled.logits)
    of_turn = _of_calls(sampled, values.q).reshape(-1, TURNS)
    of_none = _before(sampled, values.v).reshape(-1, TURNS)[:, :1]
    latest = np.array([subset.bit_length() for subset in range(2**TURNS)])
    return {"coalition": jnp.concatenate([of_none, of_turn], -1)[:, latest]}, 0.0


def exact_hindsight(sampled: Sampled, plan: Plan) -> Fields:
    """h(a | s, Z) by Bayes' rule: π(a | s) P(Z | s, a) / Σ_b π(b | s) P(Z | s, b), Z the reward to go."""
    to_go = jnp.where(sampled.table.valid, reward_to_go(sampled.table, Evidence()).value, 0.0)
    paid = return_bin(to_go).reshape(-1, TURNS)
    policy = jax.nn.softmax(sampled.logits)
    joint = policy[:, :, None] * return_distribution(sampled.process, sampled.logits)
    state, action, turns = sampled.rollouts.state, sampled.rollouts.action, jnp.arange(TURNS)
    likelihood, total = joint[turns, state, action, paid], jnp.sum(joint, 2)[turns, state, paid]
    h = jnp.where(total > 0, likelihood / jnp.where(total > 0, total, 1.0), 1.0)
    logs = (jnp.log(jnp.maximum(x, LEAST)) for x in (h, policy[state, action]))
    return {name: _filled(sampled, x) for name, x in zip(("hindsight_logp", "response_logp"), logs, strict=True)}, 0.0


def exact_answer_logp(sampled: Sampled, plan: Plan) -> Fields:
    """log P(success) around each call, where an outcome in [0, 1] is read as the chance of being marked right.

    IGPO asks the policy how likely the true answer is; of a tabular policy that is how likely it gets there from here.
    """
    return {"answer_logp": jnp.log(jnp.clip(_around(sampled, outcome_values(sampled.process, sampled.logits).v), LEAST, 1.0))}, 0.0


def exact_implicit_reward(sampled: Sampled, plan: Plan, *, of: str) -> Fields:
    """Log-probs of the implicit process-reward model that has learned all there is (`truth.tilted_log_ratio`), and of its reference.

    Args:
      of: whose rollouts the model knows, and what it is measured against: the "reference" policy, as in PRIME, or the policy that
        sampled ("logits"), as in iStar.
    """
    logits = getattr(sampled, of)
    ratio = _of_calls(sampled, tilted_log_ratio(sampled.process, logits, BETA))
    reference = _filled(sampled, jax.nn.log_softmax(logits)[sampled.rollouts.state, sampled.rollouts.action])
    nothing = jnp.zeros_like(ratio)
    return {"prm_logp": _first_token(reference + ratio, nothing), "prm_ref_logp": _first_token(reference, nothing)}, 0.0


_PRODUCERS: tuple[Producer, ...] = (
    exact_value,
    exact_token_value,
    exact_potential,
    exact_branch_value,
    exact_predicted_return,
    exact_coalition,
    exact_hindsight,
    exact_answer_logp,
)
EXACT: dict[str, Producer] = {
    **{f.__name__: f for f in _PRODUCERS},
    "exact_implicit_reward": functools.partial(exact_implicit_reward, of="reference"),
    "exact_implicit_reward_of_policy": functools.partial(exact_implicit_reward, of="logits"),
}


def _filled(sampled: Sampled, x: Array) -> jax.Array:
    """f32[N] of f32[R, T]; 0 at padding."""
    return jnp.where(sampled.table.valid, jnp.ravel(x), 0.0)


def _before(sampled: Sampled, values: Array) -> jax.Array:
    """f32[N]: the entry of f32[T+1, S] that belongs to the state before each call."""
    return _filled(sampled, values[jnp.arange(TURNS), sampled.rollouts.state])


def _around(sampled: Sampled, values: Array) -> jax.Array:
    """f32[N, 2]: the same of the state before each call, and of that after it; 0 after a rollout's last, which nobody reads."""
    before = _before(sampled, values)
    after = jnp.pad(before.reshape(-1, TURNS)[:, 1:], ((0, 0), (0, 1)))
    return jnp.stack([before, after.reshape(-1)], -1)


def _of_calls(sampled: Sampled, values: Array) -> jax.Array:
    """f32[N]: the entry of f32[T, S, A] that belongs to each call."""
    return _filled(sampled, values[jnp.arange(TURNS), sampled.rollouts.state, sampled.rollouts.action])


def _first_token(first: Array, others: Array) -> jax.Array:
    """f32[E]: one number at each call's first token, another at those that follow."""
    return jnp.where(jnp.arange(RESPONSE) == 0, first[:, None], others[:, None]).reshape(-1)
