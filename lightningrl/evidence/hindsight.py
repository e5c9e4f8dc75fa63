"""Hindsight: how likely the policy finds its own response once it is told how the rollout will end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lightningrl.evidence.scorer import ResponseLogps, message_ids, opening_ids, padded, table_calls, with_message
from lightningrl.model.params import Params
from lightningrl.table import Array, Evidence
from lightningrl.tabulate import trained_rollouts
from lightningrl.types import Rollout

Say = Callable[[Rollout], str]  # what the policy is told of how a rollout ends


def right_or_wrong(
    rollout: Rollout, *, threshold: float = 0.5, right: str = "The answer will be right.", wrong: str = "The answer will be wrong."
) -> str:
    """`right` where the reward is at least `threshold`, else `wrong`."""
    return right if rollout.reward >= threshold else wrong


def init_hindsight() -> dict[str, int]:
    """The totals that `hindsight_logps` counts in: of calls, and of those too long for it."""
    return {"calls": 0, "too_long": 0}


def hindsight_logps(
    policy: Params,
    aux: Mapping[str, int],
    rollouts: Sequence[Rollout],
    key: Array,
    *,
    logps: ResponseLogps,
    tokenizer: Any,
    say: Say = right_or_wrong,
    role: str = "user",
    multiple: int = 1,
) -> tuple[Evidence, dict[str, int]]:
    """The evidence producer of `hindsight_logp` and `response_logp`: one policy, asked with and without the outcome in its prompt.

      log h(aₜ | xₜ, Z) = Σₖ log π(aₜₖ | xₜ with a message that tells the outcome, aₜ₀ … aₜₖ₋₁),   log π(aₜ | xₜ) the same without it

    Hindsight credit (arXiv 1912.02503) learns h from data. That the policy itself may stand for it, with the outcome in its
    prompt, is HCAPO's idea (arXiv 2603.08754), of which we read the abstract and summaries: there it judges with a known success.
    What is our reading: every rollout is told its own outcome, a failure too, which is what theorem 2 of the former asks for; the
    words; and that the message comes last, right before the assistant's turn. As it tells the outcome and not what is left of
    the return, it is the theorem's Z only if all reward comes at the end. A policy that doesn't heed the message says nothing:
    both log-probs are then nearly equal.

    Args:
      policy: before its update; it scores both prompts, so that the ratio doesn't depend on how the sampler rounds.
      aux: totals so far, `init_hindsight()` at first.
      rollouts: those of the table, in its order.
      key: not read.
      logps: `scorer.response_logps` with its settings fixed.
      tokenizer: the policy's, whose chat template puts the message.
      say: the message.
      role: whose message it is, one that the template lets follow any other.
      multiple: N is the least multiple of it that holds the transitions.

    Returns:
      float32 [N] each, sums over the response; 0 at padding. Where the told prompt and the response don't fit a row the two are
      equal, so that the call earns what one that the outcome tells nothing about does; where even its own prompt doesn't, both
      are 0. And the totals with this call's added.

    Raises:
      ValueError: a prompt doesn't end with the opening of an assistant's turn, such as one of the text completion endpoint.
    """
    transitions, _ = table_calls(rollouts)
    prompts = hindsight_prompts(rollouts, tokenizer=tokenizer, say=say, role=role)
    told = [dataclasses.replace(t, prompt_ids=prompt) for t, prompt in zip(transitions, prompts, strict=True)]
    scored = logps(policy, [*transitions, *told])
    without, given = scored[: len(told)], scored[len(told) :]
    own = np.array([_total(x) for x in without], np.float32)
    hindsight = np.array([_total(x) if x is not None else y for x, y in zip(given, own, strict=True)], np.float32)
    counts = {"calls": len(given), "too_long": sum(x is None for x in given)}
    totals = {name: aux[name] + n for name, n in counts.items()}
    return Evidence(hindsight_logp=padded(hindsight, multiple), response_logp=padded(own, multiple)), totals


def hindsight_prompts(rollouts: Sequence[Rollout], *, tokenizer: Any, say: Say = right_or_wrong, role: str = "user") -> list[np.ndarray]:
    """The prompt of every transition of the table, int32, with the message that tells how its rollout ends as its last."""
    opening = opening_ids(tokenizer)
    messages: dict[str, np.ndarray] = {}
    prompts = []
    for rollout in trained_rollouts(rollouts):
        text = say(rollout)
        if text not in messages:
            messages[text] = message_ids(tokenizer, role, text)
        for t in sorted(rollout.transitions, key=lambda t: t.turn):
            try:
                prompts.append(with_message(t.prompt_ids, messages[text], opening))
            except ValueError as error:
                raise ValueError(f"call {t.turn} of rollout {rollout.id!r}: {error}") from None
    return prompts


def _total(logp: np.ndarray | None) -> float:
    return 0.0 if logp is None else float(np.sum(logp, dtype=np.float64))
