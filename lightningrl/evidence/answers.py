"""Information gain: how likely the policy finds the true answer before and after each call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lightningrl.evidence.scorer import ResponseLogps, next_turn_ids, padded
from lightningrl.model.params import Params
from lightningrl.table import Array, Evidence
from lightningrl.tabulate import trained_rollouts
from lightningrl.types import Rollout, Task, Transition

AnswerOf = Callable[[Task], str]  # the true answer, as the policy would write it


def true_answer(task: Task) -> str:
    """The task's target if it is a text, or the text that it names "gold", as text-to-SQL's does.

    Raises:
      ValueError: it is something else.
    """
    target = task.target.get("gold") if isinstance(task.target, Mapping) else task.target
    if not isinstance(target, str) or not target:
        raise ValueError(f"the target of task {task.id!r} is no text and names none as 'gold': give answer_of, a function of the task")
    return target


def init_answers() -> dict[str, int]:
    """The totals that `answer_logps` counts in: of prompts to answer, and of those too long for it."""
    return {"prompts": 0, "too_long": 0}


def answer_logps(
    policy: Params,
    aux: Mapping[str, int],
    rollouts: Sequence[Rollout],
    key: Array,
    *,
    logps: ResponseLogps,
    tokenizer: Any,
    answer_of: AnswerOf = true_answer,
    roles: Collection[str] | None = None,
    preface: str = "",
    ended: bool = True,
    multiple: int = 1,
) -> tuple[Evidence, dict[str, int]]:
    """The evidence producer of `answer_logp`: the true answer, scored as the assistant's next response (IGPO, arXiv 2510.14967).

      ℓ(s) = 1/|a*| Σₖ log π(a*ₖ | s, a*₀ … a*ₖ₋₁),   at s before and after every call

    In the paper one conversation holds a rollout, and s after a call is s before the next one: prompt, response and what the
    tool said. Here a rollout may have several conversations; `answer_prompts` says which s a call has. The paper's code puts
    a sentence that closes the thinking before the answer, and counts neither it nor what ends the turn: `preface` and `ended`.

    Args:
      policy: before its update.
      aux: totals so far, `init_answers()` at first.
      rollouts: those of the table, in its order.
      key: not read.
      logps: `scorer.response_logps` with its settings fixed. The distribution is that of temperature 1.
      tokenizer: the policy's, whose chat template opens the turn that answers.
      answer_of: the true answer of a task, not empty.
      roles: whose prompts ask for the answer; None for everybody's. With a writer, a checker and a rewriter of queries, name the
        writer and the rewriter: nobody would answer with a query where the checker is asked for a verdict.
      preface: what the response starts with before the answer; not part of the mean.
      ended: whether the end of the turn counts as the answer's last token. With it exp ℓ is about giving this answer, without it
        (the paper's) about starting with it.
      multiple: N is the least multiple of it that holds the transitions.

    Returns:
      float32 [N, 2], at most 0; 0 at padding. A state in which the answer doesn't fit a row has the value of the last one of
      the rollout in which it does, so that it is no gain, and 0 where there is none before it. And the totals with this call's
      added.

    Raises:
      ValueError: a task has no answer, or the chat template doesn't close an assistant's turn.
    """
    prompts, owner = [], []
    opened = _ids(tokenizer, preface)
    for number, rollout in enumerate(trained_rollouts(rollouts)):
        text = answer_of(rollout.task)
        if not text:
            raise ValueError(f"the true answer of task {rollout.task.id!r} is empty: the log-prob of nothing says nothing")
        answer = np.concatenate([_ids(tokenizer, text), [tokenizer.eos_token_id] if ended else []]).astype(np.int32)
        for states in answer_prompts(rollout, tokenizer=tokenizer, roles=roles):
            prompts += [_answered(rollout, np.concatenate([state, opened]), answer) for state in states]
            owner += [number, number]
    scored = logps(policy, prompts)
    means = np.array(_carried(scored, owner), np.float32).reshape(-1, 2)
    counts = {"prompts": len(scored), "too_long": sum(x is None for x in scored)}
    totals = {name: aux[name] + n for name, n in counts.items()}
    return Evidence(answer_logp=padded(means, multiple)), totals


def answer_prompts(rollout: Rollout, *, tokenizer: Any, roles: Collection[str] | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """The prompts that the true answer is a response to, before and after every call.

    - A call of `roles`. Before: its own prompt. After: the prompt of the call that comes next, if that is of `roles` and goes on from
      this one (its ids start with this one's prompt and response), so that it holds what the call brought about; else its prompt
      and response, its turn ended, and the assistant's turn opened again at once.
    - Another call. Before: the last call of `roles`, its turn ended and the next one opened. After: the prompt of the call that comes
      next, if that is of `roles` and goes on from there, so that what this one brought about is told in it; else as before.
      With no call of `roles` before it: its own prompt, both times.

    Within a conversation the state after a call is the one before the next, whoever spoke between: gains add up to what the
    whole conversation gained.

    Args:
      rollout: one with calls.
      tokenizer: the policy's.
      roles: whose prompts ask for the answer; None for everybody's.

    Returns:
      (before, after), int32 [p] each, for every call in order of turn.
    """
    opening, end = next_turn_ids(tokenizer), tokenizer.eos_token_id
    calls = sorted(rollout.transitions, key=lambda t: t.turn)
    pairs = []
    asked: np.ndarray | None = None  # prompt and response of the last call of `roles`
    for t, following in zip(calls, [*calls[1:], None], strict=True):
        speaks = roles is None or t.role in roles
        if speaks:
            asked = np.concatenate([t.prompt_ids, t.response_ids])
        if asked is None:
            pairs.append((t.prompt_ids, t.prompt_ids))
            continue
        closed = asked if asked[-1] == end else np.append(asked, end)
        again = np.concatenate([closed, opening]).astype(np.int32)
        prompt = following.prompt_ids if following is not None and (roles is None or following.role in roles) else None
        pairs.append((t.prompt_ids if speaks else again, prompt if prompt is not None and _starts_with(prompt, asked) else again))
    return pairs


def _answered(rollout: Rollout, prompt: np.ndarray, answer: np.ndarray) -> Transition:
    logprobs = np.zeros(len(answer), np.float32)
    first = rollout.transitions[0]
    return dataclasses.replace(first, prompt_ids=prompt.astype(np.int32), response_ids=answer, logprobs=logprobs, temperature=1.0)


def _carried(scored: Sequence[np.ndarray | None], owner: Sequence[int]) -> list[float]:
    """Means, and where there is none the last one of the same rollout, or 0."""
    means: list[float] = []
    for i, logp in enumerate(scored):
        before = means[-1] if i and owner[i] == owner[i - 1] else 0.0
        means.append(before if logp is None else float(np.mean(logp, dtype=np.float64)))
    return means


def _starts_with(ids: np.ndarray, start: np.ndarray) -> bool:
    return len(ids) >= len(start) and np.array_equal(ids[: len(start)], start)


def _ids(tokenizer: Any, text: str) -> np.ndarray:
    return np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int32)
