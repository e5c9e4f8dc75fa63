from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.agents import sql_langgraph
from lightningrl.errors import UserError
from lightningrl.runtime import better_draft, new_support, repeated_call, tool_error
from lightningrl.runtime.intermediate import intermediate_rewards, with_rewards
from lightningrl.runtime.store import Store
from lightningrl.types import Rollout, Task, Transition


def call(text: str, *messages: tuple[str, Any], role: str = "writer", continues: int | None = None, reward: float = 0.0) -> Transition:
    sent = tuple({"role": speaker, "content": content} for speaker, content in messages)
    prompt = np.frombuffer(repr(sent).encode(), np.uint8).astype(np.int32)
    response = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    logprobs = np.zeros(len(response), np.float32)
    return Transition(prompt, response, logprobs, 1.0, 0, role, turn=0, reward=reward, continues=continues, messages=sent, text=text)


def run(*calls: Transition) -> Rollout:
    numbered = tuple(dataclasses.replace(each, turn=turn) for turn, each in enumerate(calls))
    return Rollout("r", Task("t", {}), "g", 0, 0, numbered, {"reward": 1.0})


ASK = ("user", "how many?")


def test_a_tool_message_with_an_error_is_charged_to_the_call_it_answers() -> None:
    first = call("<tool_call>a</tool_call>", ASK)
    second = call("<tool_call>b</tool_call>", ASK, ("assistant", None), ("tool", "Error: no such table"), continues=0)
    shown = (ASK, ("assistant", None), ("tool", "Error: no such table"), ("assistant", None), ("tool", "42"))
    third = call("done", *shown, continues=1)
    assert tool_error(run(first, second, third)) == (-0.1, 0.0, 0.0)
    assert tool_error(run(first, second, third), penalty=-1.0) == (-1.0, 0.0, 0.0)


def test_of_several_tool_results_one_error_is_charged_once() -> None:
    first = call("two calls", ASK)
    second = call("done", ASK, ("assistant", None), ("tool", "error: a"), ("tool", "42"), ("tool", "ERROR: b"), continues=0)
    assert tool_error(run(first, second)) == (-0.1, 0.0)


def test_a_result_line_in_a_user_message_counts_and_is_charged_once() -> None:
    """The text-to-SQL agent: the checker's new conversation quotes the query, the rewriter goes on in the writer's."""
    writer = call("SELECT x", ASK)
    checker = call("INCORRECT", ("user", "how many?\nSELECT x\nResult: error: no such column: x"), role="checker")
    complaint = "Result: error: no such column: x\nThe check says INCORRECT. Write it again."
    rewriter = call("SELECT y", ASK, ("assistant", "SELECT x"), ("user", complaint), role="rewriter", continues=0)
    second_check = call("CORRECT", ("user", "how many?\nSELECT y\nResult: 3"), role="checker")
    assert tool_error(run(writer, checker, rewriter, second_check)) == (-0.1, 0.0, 0.0, 0.0)
    assert tool_error(run(writer, checker)) == (-0.1, 0.0)


def test_the_latest_call_that_is_quoted_pays() -> None:
    first, second = call("SELECT 1", ASK), call("SELECT 1", ASK)
    checker = call("INCORRECT", ("user", "SELECT 1\nresult: ERROR"), role="checker")
    assert tool_error(run(first, second, checker)) == (0.0, -0.1, 0.0)


def test_a_conversation_that_was_shortened_is_charged_to_the_last_call_of_its_role() -> None:
    other = call("hm", ("user", "what?"), role="checker")
    rollout = run(call("a", ASK), other, call("b", ("assistant", "…"), ("tool", "error: late")))
    assert tool_error(rollout) == (-0.1, 0.0, 0.0)


@pytest.mark.parametrize(
    "message",
    [
        ("tool", "42"),
        ("tool", "no error here"),
        ("user", "Errors are human"),
        ("user", "The Result: error is in the middle of a line"),
        ("assistant", "error: I give up"),
        ("user", None),
        ("tool", [{"type": "image_url", "image_url": "x"}]),
    ],
)
def test_what_is_no_error(message: tuple[str, Any]) -> None:
    assert tool_error(run(call("a", ASK), call("b", ASK, ("assistant", "a"), message, continues=0))) == (0.0, 0.0)


def test_text_in_parts_is_read() -> None:
    parts = [{"type": "text", "text": "error: "}, {"type": "text", "text": "no"}]
    assert tool_error(run(call("a", ASK), call("b", ASK, ("assistant", "a"), ("tool", parts), continues=0))) == (-0.1, 0.0)


def test_an_error_that_answers_no_known_call_costs_nobody() -> None:
    assert tool_error(run(call("a", ("user", "Result: error: given by the task")))) == (0.0,)


def test_repeated_calls() -> None:
    """A search that is made a second and a third time, with another between them; prompts have grown meanwhile."""
    rollout = run(call("a", ASK), call("a", ASK, continues=0), call("b", ASK, continues=1), call(" a\n", ASK, continues=2))
    assert repeated_call(rollout) == (0.0, -0.1, 0.0, -0.1)
    assert repeated_call(rollout, penalty=-2.0) == (0.0, -2.0, 0.0, -2.0)


def test_who_repeats_a_draft_is_charged_and_not_who_checks_it_again() -> None:
    checked = call("INCORRECT", ASK, role="checker")
    rollout = run(call("q", ASK), checked, call("q", ASK, role="rewriter", continues=0), checked, call("r", ASK, continues=2))
    assert repeated_call(rollout) == (0.0, 0.0, -0.1, 0.0, 0.0)


@pytest.mark.parametrize("name", ["rollouts.sqlite", "qa/rollouts.sqlite", "math/rollouts.sqlite"])
def test_repetitions_of_recorded_agents_are_of_what_was_said_to_the_model(name: str, tmp_path: Path) -> None:
    """In all three frameworks a call is charged if and only if its own prompt holds its response already."""
    recorded = Path(__file__).parents[2] / "notebooks" / "recorded" / name
    with Store(shutil.copy(recorded, tmp_path / "rollouts.sqlite")) as store:
        rollouts = [store.read_rollout(id_) for id_ in store.places()]
    charged = 0
    for rollout in rollouts:
        for transition, reward in zip(rollout.transitions, repeated_call(rollout), strict=True):
            replies = [t.text for t in rollout.transitions if t.turn < transition.turn and t.role != "checker"]
            repeats = transition.role != "checker" and transition.text.split() in [text.split() for text in replies]
            assert (reward < 0) == repeats
            charged += reward < 0
    assert charged > 0 or name != "rollouts.sqlite"


@pytest.mark.parametrize("function", [tool_error, repeated_call])
def test_no_calls(function: Any) -> None:
    assert function(run()) == ()


def test_rewards_add_up_on_the_calls_and_never_on_the_outcome() -> None:
    rollout = run(call("a", ASK, reward=1.0), call("a", ASK, continues=0))
    shaped = with_rewards(rollout, (repeated_call, lambda rollout: (0.5, 0.25)))
    assert [transition.reward for transition in shaped.transitions] == [1.5, 0.25 - 0.1]
    assert shaped.outcome == {"reward": 1.0}
    assert [transition.reward for transition in rollout.transitions] == [1.0, 0.0]


def searched(*calls: Transition, support: Any = ("Mill", "Ann  of\nRome")) -> Rollout:
    target = {"gold": "Rome", "support": list(support)} if support is not None else "Rome"
    return dataclasses.replace(run(*calls), task=Task("t", {}, target))


def test_a_search_is_paid_for_a_supporting_passage_that_is_new() -> None:
    first = call("search a", ASK)
    shown = (ASK, ("assistant", None), ("tool", "Sea: salty\nMill: old"))
    second = call("search b", *shown, continues=0)
    shown = (*shown, ("assistant", None), ("tool", "Mill: old"))
    third = call("search c", *shown, continues=1)
    shown = (*shown, ("assistant", None), ("tool", "Mill: old\nAnn of Rome: born there"))
    fourth = call("Rome", *shown, continues=2)
    rollout = searched(first, second, third, fourth)
    assert new_support(rollout) == (0.1, 0.0, 0.1, 0.0)
    assert new_support(rollout, bonus=1.0) == (1.0, 0.0, 1.0, 0.0)
    assert with_rewards(rollout, [new_support]).outcome == {"reward": 1.0}


def test_two_new_passages_are_one_search() -> None:
    results = (("tool", "Mill: old"), ("tool", "Ann of Rome: born there"))
    assert new_support(searched(call("both", ASK), call("Rome", ASK, ("assistant", None), *results, continues=0))) == (0.1, 0.0)


def test_a_shortened_conversation_pays_the_last_call_of_its_role() -> None:
    other = call("hm", ("user", "what?"), role="checker")
    assert new_support(searched(call("a", ASK), other, call("b", ("tool", "Mill: old")))) == (0.1, 0.0, 0.0)
    assert new_support(searched(call("b", ("tool", "Mill: old")))) == (0.0,)  # nobody has searched


@pytest.mark.parametrize(
    "message",
    [
        ("tool", "The Mill: old"),
        ("tool", "see Mill: old"),
        ("tool", "Mill"),
        ("user", "Mill: old"),
        ("assistant", "Mill: old"),
        ("tool", None),
    ],
)
def test_what_is_no_supporting_passage(message: tuple[str, Any]) -> None:
    assert new_support(searched(call("a", ASK), call("b", ASK, ("assistant", None), message, continues=0))) == (0.0, 0.0)


@pytest.mark.parametrize("support", [None, ()])
def test_without_known_support_nothing_is_paid(support: Any) -> None:
    later = call("b", ASK, ("assistant", None), ("tool", "Mill: old"), continues=0)
    assert new_support(searched(call("a", ASK), later, support=support)) == (0.0, 0.0)


SCORES = {"wrong": 0.0, "half": 0.5, "right": 1.0, "CORRECT": 0.0}


def drafts(*texts: str) -> Rollout:
    """Each continues the one before, but a check, which is a conversation of its own."""
    calls: list[Transition] = []
    last: int | None = None
    for i, text in enumerate(texts):
        check = text == "CORRECT"
        calls.append(call(text, ASK, role="checker" if check else "writer", continues=None if check else last))
        last = last if check else i
    return run(*calls)


@pytest.mark.parametrize(
    ("texts", "paid"),
    [
        (("wrong", "CORRECT", "right"), (0.0, 0.0, 0.1)),
        (("right", "wrong", "right"), (0.0, 0.0, 0.0)),  # no better than the first
        (("wrong", "half", "half", "right"), (0.0, 0.1, 0.0, 0.1)),
        (("right",), (0.0,)),
        (("half", "wrong"), (0.0, 0.0)),
        ((), ()),
    ],
)
def test_a_draft_that_is_better_than_all_before_it_is_paid(texts: tuple[str, ...], paid: tuple[float, ...]) -> None:
    assert better_draft(drafts(*texts), lambda task, text: SCORES[text]) == paid


REPLIES = ["Sure:\n```sql\nright\n```\nThat is it.", "```\nright\n```", "```SQLite\n right\n```", " right\n", "```python\nright\n```"]


@pytest.mark.parametrize("text", REPLIES)
def test_a_draft_is_what_the_agent_takes_out_of_the_reply(text: str) -> None:
    scores = {"wrong": 0.0, sql_langgraph.query_in(text): 1.0}
    assert better_draft(drafts("wrong", text), lambda task, draft: scores[draft]) == (0.0, 0.1)


def test_drafts_are_scored_by_the_reward_function() -> None:
    seen: list[Any] = []

    def reward(task: Any, target: Any, answer: Any) -> dict[str, float]:
        seen.append((task, target, answer))
        return {"reward": SCORES[answer], "length": 9.0}

    (function,) = intermediate_rewards(["better_draft"], reward)
    assert function(drafts("wrong", "right")) == (0.0, 0.1) and seen == [({}, None, "wrong"), ({}, None, "right")]
    with pytest.raises(UserError, match="scores drafts by the reward function, and there is none"):
        intermediate_rewards(["better_draft"])
    with pytest.raises(UserError, match="choose from better_draft, new_support, repeated_call, tool_error"):
        intermediate_rewards(["better"])
