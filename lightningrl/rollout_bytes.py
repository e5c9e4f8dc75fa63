"""Rollouts as bytes, for the other processes of a run: JSON and arrays in one npz, never pickle.

What JSON can hold reads back equal, token ids and log-probs to the last bit: as in the store (`runtime/store.py`).
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightningrl.errors import UserError
from lightningrl.types import Rollout, Task, Transition

ARRAYS = {"prompt_ids": np.int32, "response_ids": np.int32, "logprobs": np.float32}  # of a transition


def encode(rollouts: Sequence[Rollout]) -> bytes:
    """Rollouts as bytes that `decode` reads.

    Raises:
      UserError: a task, message or answer that JSON can't hold.
    """
    transitions = [t for rollout in rollouts for t in rollout.transitions]
    arrays = {}
    for name, dtype in ARRAYS.items():
        parts = [np.asarray(getattr(t, name), dtype) for t in transitions]
        arrays[name] = np.concatenate([np.zeros(0, dtype), *parts])
        arrays[f"{name}_lengths"] = np.array([len(part) for part in parts], np.int64)
    try:
        about = json.dumps([_about(rollout) for rollout in rollouts])
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"a rollout cannot be told to the other processes as JSON ({error})") from None
    file = io.BytesIO()
    np.savez(file, **{**arrays, "about": np.frombuffer(about.encode("utf-8", "surrogatepass"), np.uint8)})  # type: ignore[arg-type]
    return file.getvalue()


def decode(data: bytes) -> list[Rollout]:
    """The rollouts that `encode` was given."""
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        about = json.loads(file["about"].tobytes().decode("utf-8", "surrogatepass"))
        split = {name: np.split(file[name], np.cumsum(file[f"{name}_lengths"])[:-1]) for name in ARRAYS}
    made, at = [], 0
    for fields in about:
        transitions = []
        for kept in fields["transitions"]:
            arrays = {name: split[name][at] for name in ARRAYS}
            transitions.append(Transition(**{**kept, **arrays, "messages": tuple(kept["messages"])}))
            at += 1
        made.append(Rollout(**{**fields, "task": Task(**fields["task"]), "transitions": tuple(transitions)}))
    return made


def _about(rollout: Rollout) -> dict[str, Any]:
    """Everything but the arrays. Not `dataclasses.asdict`, which copies deeply."""
    kept = {field.name: getattr(rollout, field.name) for field in dataclasses.fields(rollout)}
    kept["task"] = {"id": rollout.task.id, "input": dict(rollout.task.input), "target": rollout.task.target}
    kept["transitions"] = [_about_transition(t) for t in rollout.transitions]
    return kept | {"outcome": dict(rollout.outcome), "metrics": dict(rollout.metrics)}


def _about_transition(transition: Transition) -> dict[str, Any]:
    kept = {field.name: getattr(transition, field.name) for field in dataclasses.fields(transition) if field.name not in ARRAYS}
    return kept | {"messages": [dict(message) for message in transition.messages]}
