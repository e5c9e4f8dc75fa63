"""What every assigner is held to, and the small statistics that their loops are written with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from lightningrl.segments import EPSILON
from lightningrl.table import Evidence
from lightningrl.types import Rollout
from tests.batches import SIZE, by_rollout, make_table, poison, poison_table

MakeEvidence = Callable[[Sequence[Rollout], int], Evidence]


def nothing(rollouts: Sequence[Rollout], size: int) -> Evidence:
    return Evidence()


def per_call(rollouts: Sequence[Rollout], size: int, *shape: int, low: float = -1.0, high: float = 1.0, seed: int = 0) -> np.ndarray:
    """Numbers that belong to a rollout and a turn, wherever they stand in the batch: f32[size, *shape]."""
    result = np.zeros((size, *shape), np.float32)
    row = 0
    for rollout in rollouts:
        for t in range(len(rollout.transitions)):
            result[row] = np.random.default_rng([seed, int(rollout.id[1:] or 0), t]).uniform(low, high, shape)
            row += 1
    return result


def named(*rollouts: Rollout) -> list[Rollout]:
    return [dataclasses.replace(rollout, id=f"r{i}") for i, rollout in enumerate(rollouts)]


def relative_loop(values, weights, *, scale="std", ddof=1.0, units=None, raw=False) -> list[float]:
    """(x - μ) / (σ + eps), 0 for equal values and for one unit alone."""
    units = list(range(len(values))) if units is None else units
    if len(set(units)) == 1:
        return list(values) if raw else [0.0] * len(values)
    if len(set(values)) == 1:
        return [0.0] * len(values)
    total = sum(weights)
    mean = sum(w * x for w, x in zip(weights, values, strict=True)) / total
    variance = sum(w * (x - mean) ** 2 for w, x in zip(weights, values, strict=True)) / (total - ddof) if total > ddof else 0.0
    return [(x - mean) / (np.sqrt(variance) + EPSILON if scale == "std" else 1.0) for x in values]


def group_calls(rollouts: Sequence[Rollout]) -> dict[str, list[tuple[int, int]]]:
    """The (rollout, turn) of every call, by group."""
    groups: dict[str, list[tuple[int, int]]] = {}
    for i, rollout in enumerate(rollouts):
        groups.setdefault(rollout.group, []).extend((i, t) for t in range(len(rollout.transitions)))
    return groups


def flat(rollouts: Sequence[Rollout], by_call: dict[tuple[int, int], float]) -> np.ndarray:
    return np.array([by_call[i, t] for i, rollout in enumerate(rollouts) for t in range(len(rollout.transitions))], np.float64)


def check_loop(assign, rollouts, evidence_of: MakeEvidence, expected, *, rtol=2e-5, atol=2e-6):
    value = assign(make_table(*rollouts, size=SIZE), evidence_of(rollouts, SIZE)).value
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value[: len(expected)], expected, rtol=rtol, atol=atol)
    assert (np.asarray(value)[len(expected) :] == 0).all()


def check_order(assign, rollouts, order, evidence_of: MakeEvidence):
    """The same credit, whichever way the rollouts stand in the batch."""
    one, other = (by_rollout(rs, np.asarray(assign(make_table(*rs, size=SIZE), evidence_of(rs, SIZE)).value)) for rs in (rollouts, order))
    for name, credits in one.items():
        np.testing.assert_allclose(other[name], credits, rtol=2e-5, atol=2e-6)


def check_padding(assign, rollouts, evidence_of: MakeEvidence):
    """Padding changes nothing, and NaN in it reaches nothing."""
    calls = sum(len(r.transitions) for r in rollouts)
    table, evidence = make_table(*rollouts, size=calls + 4), evidence_of(rollouts, calls + 4)
    short = np.asarray(assign(make_table(*rollouts), evidence_of(rollouts, calls)).value)
    padded = np.asarray(assign(table, evidence).value)
    np.testing.assert_allclose(padded[:calls], short, rtol=1e-5, atol=1e-6)
    assert padded[calls:].tolist() == [0.0] * 4
    spoiled = dataclasses.replace(
        evidence,
        **{
            field.name: poison(getattr(evidence, field.name), table.valid)
            for field in dataclasses.fields(evidence)
            if np.shape(getattr(evidence, field.name))[:1] == table.valid.shape
        },
    )
    assert np.asarray(assign(poison_table(table), spoiled).value).tolist() == padded.tolist()
