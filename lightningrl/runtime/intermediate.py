"""Rewards of single calls, read off what passed through the gateway (automatic intermediate rewarding, arXiv 2508.03680, §3.2).

Each function maps a rollout to one number per transition. The runner adds them to the transitions' rewards and never to the
outcome: what is measured stays what it was.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lightningrl.errors import UserError
from lightningrl.runtime.outcome import Reward, outcome_of
from lightningrl.types import Rollout, Task, Transition

Intermediate = Callable[[Rollout], tuple[float, ...]]

FENCED = re.compile(r"```(?:sql|sqlite)?\s*\n(.*?)```", re.DOTALL | re.IGNORECASE)  # as the text-to-SQL agent reads a reply
ERROR_LINE = re.compile(r"^result:\s*error", re.IGNORECASE | re.MULTILINE)


def tool_error(rollout: Rollout, penalty: float = -0.1) -> tuple[float, ...]:
    """`penalty` for every call whose output a tool answered with an error.

    The error is seen where the agent shows it to the policy: in a later call, as a tool message that starts with "error", or as
    a line "Result: error…" in a user message. It is charged to the call that this one continues. A new conversation continues
    none (a checker's, which quotes the writer's query): there it is the latest earlier call whose text the message quotes. A
    call is charged once, however often its error is shown.
    """
    rewards = [0.0] * len(rollout.transitions)
    index = {transition.turn: i for i, transition in enumerate(rollout.transitions)}
    for i, transition in enumerate(rollout.transitions):
        for culprit in _answered_with_error(rollout.transitions, index, i, transition):
            rewards[culprit] = penalty
    return tuple(rewards)


def repeated_call(rollout: Rollout, penalty: float = -0.1) -> tuple[float, ...]:
    """`penalty` for every call that says what an earlier call of its conversation has said: the same search, sum or draft again.

    The conversation of a call is what it continues, and what that continues. The same answer in a conversation of its own is no
    repetition: a checker that is shown an unchanged draft again rightly says the same again, and it was the rewriter who repeated.
    """
    index = {transition.turn: i for i, transition in enumerate(rollout.transitions)}
    said: list[frozenset[str]] = []  # in the conversation up to each call
    rewards = []
    for transition in rollout.transitions:
        before = frozenset() if transition.continues is None else said[index[transition.continues]]
        text = " ".join(transition.text.split())
        rewards.append(penalty if text in before else 0.0)
        said.append(before | {text})
    return tuple(rewards)


def new_support(rollout: Rollout, bonus: float = 0.1) -> tuple[float, ...]:
    """`bonus` for every call whose search returned a supporting passage that no search of the run had returned before.

    The task's target names the titles of the supporting passages (`target["support"]`; without any, nothing is paid), and a passage is a
    line "title: text" of a tool message, seen in the later call that the agent shows it to. It is paid to the call that this one
    continues, or in a shortened conversation to the latest earlier call of its role; once, however many such passages were new. What
    the last call's search returned is shown to nobody, and not paid.
    """
    rewards = [0.0] * len(rollout.transitions)
    index = {transition.turn: i for i, transition in enumerate(rollout.transitions)}
    missing = {" ".join(title.split()) for title in _support(rollout.task.target)}
    for i, transition in enumerate(rollout.transitions):
        results = [message for message in _since_last_reply(transition.messages) if message.get("role") == "tool"]
        lines = [line for message in results for line in _text(message).splitlines()]
        found = {title for title in missing if any(line.startswith(f"{title}: ") for line in lines)}
        missing -= found
        searches = [index[transition.continues]] if transition.continues is not None else _latest_of_role(rollout.transitions, i)
        if found and searches:
            rewards[searches[0]] = bonus
    return tuple(rewards)


def better_draft(rollout: Rollout, score: Callable[[Task, str], float], bonus: float = 0.1) -> tuple[float, ...]:
    """`bonus` for every call whose text scores more than all drafts before it in its conversation.

    Drafts are the calls that continue each other: of the text-to-SQL agent the writer's query and the rewriter's. The first is paid
    nothing, however good, and one that is as good as an earlier one neither. `score` is the task's own reward, as if the draft were the
    answer; for queries, execution match. Of a text with a fenced block, as chat models write, the draft is what is in the first.
    """
    index = {transition.turn: i for i, transition in enumerate(rollout.transitions)}
    best: list[float] = []  # of the conversation up to each call
    rewards = []
    for transition in rollout.transitions:
        before = -math.inf if transition.continues is None else best[index[transition.continues]]
        fenced = FENCED.search(transition.text)
        scored = score(rollout.task, (fenced[1] if fenced else transition.text).strip())
        best.append(max(before, scored))
        rewards.append(bonus if -math.inf < before < scored else 0.0)
    return tuple(rewards)


def intermediate_rewards(names: Sequence[str], reward: Reward | None = None) -> tuple[Intermediate, ...]:
    """The intermediate rewards of these names. Raises UserError for one that there is not, or that needs a reward function."""
    known: dict[str, Intermediate] = {
        "tool_error": tool_error,
        "repeated_call": repeated_call,
        "new_support": new_support,
        "better_draft": functools.partial(better_draft, score=lambda task, text: outcome_of(task, text, reward, None)["reward"]),
    }
    for name in names:
        if name not in known:
            raise UserError(f"there is no intermediate reward {name!r}: choose from {', '.join(sorted(known))}")
    if "better_draft" in names and reward is None:
        raise UserError("the intermediate reward better_draft scores drafts by the reward function, and there is none: give one")
    return tuple(known[name] for name in names)


def with_rewards(rollout: Rollout, functions: Sequence[Intermediate]) -> Rollout:
    """The rollout with what the functions give added to its transitions' rewards.

    Raises:
        ValueError: a function that doesn't give one finite number per transition.
    """
    totals = [transition.reward for transition in rollout.transitions]
    for function in functions:
        rewards = function(rollout)
        if len(rewards) != len(totals) or not all(math.isfinite(reward) for reward in rewards):
            raise ValueError(
                f"the intermediate reward {getattr(function, '__name__', function)!s} gave {rewards} for {len(totals)} calls: "
                "it must give one finite number per call"
            )
        totals = [total + float(reward) + 0.0 for total, reward in zip(totals, rewards, strict=True)]
    transitions = (dataclasses.replace(transition, reward=total) for transition, total in zip(rollout.transitions, totals, strict=True))
    return dataclasses.replace(rollout, transitions=tuple(transitions))


def _answered_with_error(transitions: tuple[Transition, ...], index: Mapping[int, int], i: int, transition: Transition) -> Iterator[int]:
    messages = transition.messages
    recent = _since_last_reply(messages)
    errors = [message for message in recent if _is_error(message)]
    if not errors:
        return
    if transition.continues is not None:
        yield index[transition.continues]
        return
    if len(recent) < len(messages):  # goes on in a conversation that was shortened or rewritten on the way
        yield from _latest_of_role(transitions, i)
        return
    for message in errors:
        text = _text(message)
        quoted = [k for k in range(i) if transitions[k].text.strip() and transitions[k].text.strip() in text]
        if quoted:
            yield quoted[-1]


def _since_last_reply(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """What is new: results before the last reply were answered in the conversation that this one continues."""
    last_reply = max((k for k, message in enumerate(messages) if message.get("role") == "assistant"), default=-1)
    return messages[last_reply + 1 :]


def _latest_of_role(transitions: tuple[Transition, ...], i: int) -> list[int]:
    return [k for k in range(i) if transitions[k].role == transitions[i].role][-1:]


def _support(target: Any) -> Sequence[str]:
    return target.get("support", ()) if isinstance(target, Mapping) else ()


def _is_error(message: Mapping[str, Any]) -> bool:
    match message.get("role"):
        case "tool":
            return _text(message).lstrip().lower().startswith("error")
        case "user":
            return ERROR_LINE.search(_text(message)) is not None
        case _:
            return False


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    return ""
