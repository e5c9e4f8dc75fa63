"""The question-answering agent, in both protocols of its framework, and the demonstrations that it is warm-started on."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import multi_hop_qa
from experiments.agents import qa_agents_sdk
from experiments.agents.qa_agents_sdk import MAX_TURNS, answer
from lightningrl.gateway import Gateway, SamplingOverrides
from lightningrl.gateway.rendering import Renderer
from lightningrl.runtime import Runner, RunnerSettings, new_support, rollout_requests
from lightningrl.start import texts_of
from lightningrl.tasks.multi_hop_qa.demonstrations import demonstrate, search_call
from lightningrl.tasks.multi_hop_qa.retrieval import search_as_text
from lightningrl.tokenizer import train_tokenizer
from lightningrl.types import DemonstratedCall, Rollout, Task
from lightningrl.warm_start import encode
from tests.gateway.scripted_sampler import ScriptedSampler

PASSAGES = [
    {"pid": "a", "title": "owner of Mill", "text": "Mill belongs to Ann, formerly Bob."},
    {"pid": "b", "title": "birthplace of Ann", "text": "Ann was born in Rome."},
    {"pid": "c", "title": "birthplace of Bob", "text": "Bob was born in Oslo."},
]
QUESTION = "What is the birthplace of the owner of Mill?"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps(passage) + "\n" for passage in PASSAGES))
    return str(path)


def search(query: str) -> str:
    return search_call(multi_hop_qa.PROMPTS.tool, query)


SCRIPT = [search("owner of Mill"), search("birthplace of Ann"), "<answer> Rome </answer>"]


class Endpoint:
    """A gateway whose policy says a script, one line a call, in every rollout."""

    def __init__(self) -> None:
        self.tokenizer = train_tokenizer([QUESTION, *SCRIPT, *(p["text"] for p in PASSAGES)] * 20, 400)
        self.sampler = ScriptedSampler(self.tokenizer, [])
        self.gateway = Gateway(self.sampler, self.tokenizer)

    def run(self, script: Sequence[str], task: dict[str, Any], **options: Any) -> Rollout:
        # By how many replies there are in the prompt, so that an answer does not depend on what else is asked meanwhile.
        self.sampler.restart(lambda prompt: script[prompt.count("assistant\n") - 1])
        agent = functools.partial(answer, find=search_as_text, **options)
        runner = Runner(self.gateway, agent, multi_hop_qa.reward, RunnerSettings(max_attempts=1), (new_support,))
        target = {"gold": "Rome", "aliases": [], "support": ["owner of Mill", "birthplace of Ann"]}
        requests = rollout_requests([Task("t", task, target)], phase="train", iteration=0, samples=1)
        (rollout,) = runner.run(requests, phase="train", iteration=0, seed=0, sampling=SamplingOverrides(max_tokens=64))
        return rollout


@pytest.fixture(scope="module")
def endpoint() -> Any:
    made = Endpoint()
    with made.gateway:
        yield made


def demonstrated(corpus: str, script: Sequence[str], found: Sequence[str]) -> list[DemonstratedCall]:
    """What somebody shows who says the script and gets these results."""
    prompts = multi_hop_qa.PROMPTS
    messages: list[Any] = [{"role": "system", "content": prompts.system}, {"role": "user", "content": QUESTION}]
    calls = []
    for said, result in zip(script, [*found, None], strict=True):
        calls.append(DemonstratedCall(prompts.role, tuple(messages), said, (prompts.tool,)))
        messages += [{"role": "assistant", "content": said}, {"role": "tool", "content": result}]
    return calls


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_it_searches_reads_searches_again_and_answers(endpoint: Endpoint, corpus: str, api: str) -> None:
    rollout = endpoint.run(SCRIPT, {"question": QUESTION, "corpus": corpus, "results": 1}, api=api)
    assert rollout.answer == "<answer> Rome </answer>" and rollout.outcome == {"reward": 1.0}
    assert [t.role for t in rollout.transitions] == ["agent"] * 3 and [t.continues for t in rollout.transitions] == [None, 0, 1]
    shown = rollout.transitions[-1].messages
    assert [message["role"] for message in shown] == ["system", "user", "assistant", "tool", "assistant", "tool"]
    found = [message["content"] for message in shown if message["role"] == "tool"]
    assert found == ["owner of Mill: Mill belongs to Ann, formerly Bob.", "birthplace of Ann: Ann was born in Rome."]
    assert [t.reward for t in rollout.transitions] == [0.1, 0.1, 0.0]  # both found their passage, beside the outcome


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_demonstrations_are_encoded_as_the_agents_runs_are_recorded(endpoint: Endpoint, corpus: str, api: str) -> None:
    rollout = endpoint.run(SCRIPT, {"question": QUESTION, "corpus": corpus, "results": 2}, api=api)
    found = [search_as_text(corpus, query, 2) for query in ("owner of Mill", "birthplace of Ann")]
    encoded = encode(demonstrated(corpus, SCRIPT, found), Renderer(endpoint.tokenizer))
    for ours, theirs in zip(encoded, rollout.transitions, strict=True):
        np.testing.assert_array_equal(ours.prompt_ids, theirs.prompt_ids)
        np.testing.assert_array_equal(ours.response_ids, theirs.response_ids)
        assert (ours.role, ours.continues) == (theirs.role, theirs.continues)


def test_a_demonstrators_run_is_the_agents_run(endpoint: Endpoint, tmp_path: Path) -> None:
    """Of generated questions, with a tokenizer as the experiment trains it."""
    config = multi_hop_qa.Config(worlds=2, questions=16, heldout_questions=4)
    question = multi_hop_qa.load_data(config, tmp_path).train[5]
    task = multi_hop_qa.task_of(question)
    find = functools.partial(search_as_text, results=task.input["results"])
    calls = demonstrate(question, multi_hop_qa.PROMPTS, np.random.default_rng(0), search=find)
    rollout = endpoint.run([call.response for call in calls], dict(task.input))
    encoded = encode(calls, Renderer(endpoint.tokenizer))
    assert len(rollout.transitions) == len(calls) >= 2
    for ours, theirs in zip(encoded, rollout.transitions, strict=True):
        np.testing.assert_array_equal(ours.prompt_ids, theirs.prompt_ids)
        np.testing.assert_array_equal(ours.response_ids, theirs.response_ids)
    assert all(text for call in calls for text in texts_of(call))


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_an_agent_that_goes_on_searching_answers_nothing(endpoint: Endpoint, corpus: str, api: str) -> None:
    rollout = endpoint.run([search("Mill")] * 20, {"question": QUESTION, "corpus": corpus}, api=api)
    assert (rollout.answer, rollout.outcome, len(rollout.transitions)) == ("", {"reward": 0.0}, MAX_TURNS)


@pytest.mark.parametrize(
    "said",
    [
        '<tool_call>{"name": "search", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "search", "arguments": {"query": 7}}</tool_call>',
        '<tool_call>{"name": "search", "arguments": {"query": null}}</tool_call>',
        '<tool_call>{"name": "search", "arguments": {"q": "Mill"}}</tool_call>',
    ],
)
def test_a_search_without_a_query_is_an_error_that_the_policy_sees(endpoint: Endpoint, corpus: str, said: str) -> None:
    rollout = endpoint.run([said, "<answer> Rome </answer>"], {"question": QUESTION, "corpus": corpus})
    assert rollout.transitions[1].messages[-1]["content"] == "error: a search needs one query"
    assert rollout.outcome == {"reward": 1.0}


@pytest.mark.parametrize("said", ["Rome", "", '<tool_call>{"name": "find"}</tool_call>', "<tool_call>search", "<answer>"])
def test_anything_else_ends_the_run_without_an_answer(endpoint: Endpoint, corpus: str, said: str) -> None:
    rollout = endpoint.run([said], {"question": QUESTION, "corpus": corpus})
    assert (len(rollout.transitions), rollout.outcome) == (1, {"reward": 0.0})


def test_two_searches_at_once(endpoint: Endpoint, corpus: str) -> None:
    both = search("owner of Mill") + search("birthplace of Ann")
    rollout = endpoint.run([both, "<answer> Rome </answer>"], {"question": QUESTION, "corpus": corpus, "results": 1})
    found = [message["content"] for message in rollout.transitions[1].messages if message["role"] == "tool"]
    assert found == ["owner of Mill: Mill belongs to Ann, formerly Bob.", "birthplace of Ann: Ann was born in Rome."]
    assert [t.reward for t in rollout.transitions] == [0.1, 0.0]


def test_a_search_that_fails_is_no_reply_of_the_tool(endpoint: Endpoint, tmp_path: Path) -> None:
    rollout = endpoint.run([search("Mill")], {"question": QUESTION, "corpus": str(tmp_path / "none.jsonl")})
    assert rollout.status == "failed" and "none.jsonl" in rollout.error and len(rollout.transitions) == 1


def test_its_own_search_is_the_tasks(corpus: str) -> None:
    for query in ("owner of Mill", "Bob", "where was Ann born"):
        assert qa_agents_sdk.bm25(corpus, query, 1) == search_as_text(corpus, query, 1)


def test_it_imports_nothing_of_the_trainer() -> None:
    code = (
        "import sys; import experiments.agents.qa_agents_sdk; print([m for m in sys.modules if m.split('.')[0] in ('lightningrl', 'jax')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]"


def test_the_command(endpoint: Endpoint, corpus: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint.sampler.restart(SCRIPT)
    key = endpoint.gateway.open("rollout", seed=0)
    qa_agents_sdk.connections.cache_clear()  # a pool belongs to its event loop, and the command has one of its own
    command = ["qa", "--base_url", endpoint.gateway.base_url, "--api_key", key, "--corpus", corpus, QUESTION]
    monkeypatch.setattr(sys, "argv", command)
    qa_agents_sdk.main()
    assert capsys.readouterr().out == "<answer> Rome </answer>\n"
    monkeypatch.setattr(sys, "argv", [*command[:6], "none.jsonl", QUESTION])
    with pytest.raises(SystemExit):
        qa_agents_sdk.main()
    assert "there is no file none.jsonl" in capsys.readouterr().err
