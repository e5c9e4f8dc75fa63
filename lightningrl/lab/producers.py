"""How far what is learned or sampled is from the truth it stands for, and from what Monte-Carlo rollouts would say for their price."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from lightningrl.lab.evidence import no_memory
from lightningrl.lab.process import RESPONSE, TURNS
from lightningrl.lab.study import Study
from lightningrl.lab.update import Batch
from lightningrl.table import Array, Evidence

Read = Callable[[Evidence, Batch], tuple[Array, Array]]  # numbers and which of them count
PRODUCE = 2  # what keys are for, besides those of the study


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A producer and the exact one that it stands for."""

    name: str
    made_by: str
    truth: str
    read: Read
    batches: int = 0  # that a critic has seen before
    restarts: int = 0  # from every state; 0 where none are


def _of_calls(evidence: Evidence, batch: Batch, *, field: str) -> tuple[Array, Array]:
    x = getattr(evidence, field)
    return x if x.ndim == 1 else x[:, 0], batch.table.valid


def _after_the_token(evidence: Evidence, batch: Batch) -> tuple[Array, Array]:
    assert evidence.token_value is not None
    return evidence.token_value.reshape(-1, RESPONSE)[:, 1], batch.table.valid


def _chances(evidence: Evidence, batch: Batch) -> tuple[Array, Array]:
    assert evidence.hindsight_logp is not None
    return jnp.exp(evidence.hindsight_logp), batch.table.valid


def _coalitions(evidence: Evidence, batch: Batch) -> tuple[Array, Array]:
    assert evidence.coalition is not None
    calls = jnp.sum(batch.rollouts.made, -1)
    return evidence.coalition, jnp.logical_and(jnp.arange(2**TURNS) < 2 ** calls[:, None], calls[:, None] > 0)


_value = functools.partial(_of_calls, field="value")
_predicted = functools.partial(_of_calls, field="predicted_return")
_branch = functools.partial(_of_calls, field="branch_value")
_potential = functools.partial(_of_calls, field="potential")

ESTIMATES = (
    *(Estimate(f"restarts, {k} from every state", "branch_value", "exact_branch_value", _branch, restarts=k) for k in (1, 2, 4, 8, 16)),
    Estimate("critic of states, one batch", "value", "exact_value", _value, batches=1),
    Estimate("critic of states, ten batches", "value", "exact_value", _value, batches=10),
    Estimate("critic of calls, one batch", "token_value", "exact_token_value", _after_the_token, batches=1),
    Estimate("critic of calls, ten batches", "token_value", "exact_token_value", _after_the_token, batches=10),
    Estimate("a designer's potential", "potential", "exact_potential", _potential),
    Estimate("RUDDER's return model", "predicted_return", "exact_predicted_return", _predicted),
    Estimate("SPA's return model", "contributions", "exact_predicted_return", _predicted),
    Estimate("coalitions of calls", "coalition", "exact_coalition", _coalitions),
    Estimate("hindsight by counting", "hindsight", "exact_hindsight", _chances),
)


def producer_errors(
    study: Study, batches: int = 4, estimates: Sequence[Estimate] = ESTIMATES, tick: Callable[[], object] = lambda: None
) -> dict[str, dict[str, np.ndarray]]:
    """At the policies that learning starts from: f64[P, seeds] each.

      error   √ mean (estimate - truth)² over the calls of all batches,   relative to  √ mean A²  of the true advantages
      steps   of the environment that it took besides those of a batch, relative to them

    An error of 1 is as large as what is to be told apart. Hindsight is a probability and its error absolute, not relative.
    """
    return {estimate.name: _error(study, estimate, batches, tick) for estimate in estimates}


def _error(study: Study, estimate: Estimate, batches: int, tick: Callable[[], object]) -> dict[str, np.ndarray]:
    settings = study.settings
    plan = settings.plan("groups")
    asking = dataclasses.replace(plan, restarts=estimate.restarts) if estimate.restarts else plan
    logits = study.logits
    groups = settings.steps / study.cost(logits, plan)
    squares, signal, count, steps, extra = (np.zeros(logits.shape[:2]) for _ in range(5))
    for number in range(batches):
        keys = functools.partial(study.keys, PRODUCE, number)
        memory = study.stack(no_memory())
        for earlier in range(estimate.batches):
            memory = study.remember(memory, study.batch(logits, logits, keys(2 + earlier), groups, plan), 1.0)
        batch = study.batch(logits, logits, keys(0), groups, plan)
        guess, cost = study.evidence((estimate.made_by,), logits, logits, memory, batch, keys(1), asking)
        truth, _ = study.evidence((estimate.truth,), logits, logits, memory, batch, keys(1), plan)
        sums = study.over_seeds(("errors", estimate.read), functools.partial(_squares, estimate.read))(guess, truth, batch)
        squares, count, signal, steps = (x + np.asarray(y, np.float64) for x, y in zip((squares, count, signal, steps), sums, strict=True))
        extra += np.asarray(cost, np.float64)
        tick()
    scale = np.sqrt(signal / steps) if estimate.read is not _chances else 1.0
    return {"error": np.sqrt(squares / count) / scale, "steps": extra / steps}


def _squares(read: Read, guess: Evidence, truth: Evidence, batch: Batch) -> tuple[Array, ...]:
    (x, used), (y, _) = read(guess, batch), read(truth, batch)
    squares = jnp.sum(jnp.where(used, x - y, 0.0) ** 2)
    return squares, jnp.sum(used), jnp.sum(batch.true_advantage**2), batch.steps
