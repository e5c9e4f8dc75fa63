"""What fills the fields of Evidence that a recipe needs, and the state that it keeps between iterations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from lightningrl.distributed import from_first
from lightningrl.model.params import Params
from lightningrl.table import Array, Evidence
from lightningrl.types import Rollout

Produce = Callable[..., tuple[Evidence, Any]]  # (policy, aux, rollouts, key), and `run` where agents are run
RunRequests = Callable[..., Sequence[Rollout]]  # (requests, *, phase), and `temperature` if it is not that of training


@dataclasses.dataclass(frozen=True)
class Producer:
    """One source of evidence: `produce(policy, aux, rollouts, key) -> (Evidence, aux)`, the only impure stage of an iteration.

    The policy is the one that sampled the rollouts, before its update; the rollouts are those of the table, in its order; arrays
    of the evidence are those of the table's N, or flat over its tokens (`batches.at_edges`).
    """

    name: str
    fills: tuple[str, ...]  # fields of Evidence
    produce: Produce
    start: Callable[[Params], Any]  # aux of a run's first iteration
    keeps: Literal["arrays", "numbers"] = "numbers"  # what aux is: a pytree of arrays of fixed shapes, or a JSON object of numbers
    runs_agents: bool = False  # whether `produce` takes `run`
    asks_outside: bool = False  # whether it calls a person's code or a service: with several processes, process 0 asks for all


def first_aux(producers: Sequence[Producer], policy: Params) -> dict[str, Any]:
    """The state of all producers by name, before the first iteration."""
    return {producer.name: producer.start(policy) for producer in producers}


def produce_evidence(
    producers: Sequence[Producer], policy: Params, aux: Mapping[str, Any], rollouts: Sequence[Rollout], key: Array, *, run: RunRequests
) -> tuple[Evidence, dict[str, Any]]:
    """All producers in turn: their fields in one Evidence, and their state after it."""
    evidence, after = Evidence(), dict(aux)
    for index, producer in enumerate(producers):
        agents = {"run": run} if producer.runs_agents else {}
        produce = functools.partial(_asked_by_first, producer) if producer.asks_outside else producer.produce
        filled, after[producer.name] = produce(policy, aux[producer.name], rollouts, jax.random.fold_in(key, index), **agents)
        evidence = dataclasses.replace(evidence, **{name: getattr(filled, name) for name in producer.fills})
    return evidence, after


def _asked_by_first(producer: Producer, *arguments: Any) -> tuple[Evidence, Any]:
    """What the producer says on process 0, on every process. Float32 survives JSON to the last bit."""

    def ask() -> Any:
        evidence, after = producer.produce(*arguments)
        return [{name: np.asarray(getattr(evidence, name)).tolist() for name in producer.fills}, after]

    filled, after = from_first(ask)
    return Evidence(**{name: np.asarray(values, np.float32) for name, values in filled.items()}), after


def numbers(producers: Sequence[Producer], aux: Mapping[str, Any]) -> dict[str, Any]:
    """The aux that is a JSON object, by producer."""
    return {p.name: aux[p.name] for p in producers if p.keeps == "numbers"}


def arrays(producers: Sequence[Producer], aux: Mapping[str, Any]) -> dict[str, Any]:
    """The aux that is a pytree of arrays, by producer."""
    return {p.name: aux[p.name] for p in producers if p.keeps == "arrays"}
