"""What a run earned: the agent's, the reward function's or the posted reward, checked before anything trains on it."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lightningrl.types import Task

Reward = Callable[[Any, Any, Any], float | Mapping[str, float]]  # (task.input, task.target, answer)
LARGEST = float(np.finfo(np.float32).max)  # rewards train in float32


class RewardError(ValueError):
    """A reward that nothing can be trained on; its text is one sentence."""


def outcome_of(task: Task, answer: Any, reward: Reward | None, posted: Mapping[str, float] | None) -> dict[str, float]:
    """The named rewards of a run that ended.

    With a reward function, what the agent returned is its answer, and the function scores it. Without one, a number or a dict
    with a "reward" that the agent returned counts, then what it posted to the gateway.

    Returns:
        Finite floats, "reward" among them. Of an agent's dict only the numbers are taken.

    Raises:
        RewardError: no reward, one that is not a number, or one that is not finite in float32.
    """
    if reward is not None:
        return _checked(reward(task.input, task.target, answer), "the reward function returned")
    if isinstance(answer, Mapping) and "reward" in answer:
        named = {name: value for name, value in answer.items() if name == "reward" or is_number(value)}
        return _checked(named, "the agent returned")
    if is_number(answer):
        return _checked(answer, "the agent returned")
    if posted is not None:
        return _checked(posted, "the agent posted")
    way_out = "return a number or a dict with one, give a reward function, or post it to /v1/reward"
    if isinstance(answer, Mapping):
        raise RewardError(f'the run has no reward: the agent returned a dict without a "reward" ({_names(answer)}); {way_out}')
    raise RewardError(f"the run has no reward: the agent returned {_short(answer)}; {way_out}")


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real | np.bool_)


def as_json(value: Any) -> Any:
    """`value` as it reads back from JSON; None if it can't be written."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError):
        return None


def _checked(rewards: Any, who: str) -> dict[str, float]:
    named = rewards if isinstance(rewards, Mapping) else {"reward": rewards}
    if "reward" not in named:
        raise RewardError(f'{who} a dict without a "reward" ({_names(named)}): give the one that is trained on that name')
    return {str(name): _finite(name, value, who) for name, value in named.items()}


def _finite(name: Any, value: Any, who: str) -> float:
    what = "reward" if name == "reward" else f"reward {name!r}"
    if not is_number(value):
        raise RewardError(f"{who} the {what} {_short(value)} of type {type(value).__name__}: a reward is a number")
    number = float(value)
    if not math.isfinite(number) or abs(number) > LARGEST:
        raise RewardError(f"{who} the {what} {number}: a reward is a finite float32")
    return number + 0.0  # -0.0 becomes 0.0, whose sign SQLite keeps


def _names(mapping: Mapping[Any, Any]) -> str:
    return ", ".join(sorted(str(name) for name in mapping)) or "empty"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
