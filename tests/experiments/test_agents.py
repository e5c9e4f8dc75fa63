from __future__ import annotations

import asyncio
import functools
import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.agents import plain_openai, sql_langgraph
from experiments.agents.sql_langgraph import (
    CHECKER_REQUEST,
    CHECKER_SYSTEM,
    REWRITE_REQUEST,
    WRITER_REQUEST,
    WRITER_SYSTEM,
    answer,
    query_in,
    read_only,
)
from lightningrl.gateway import Gateway, SamplingOverrides
from lightningrl.runtime import Runner, RunnerSettings, Store, load_tasks, rollout_requests, tool_error
from lightningrl.tokenizer import train_tokenizer
from lightningrl.types import Rollout, Task
from tests.gateway.scripted_sampler import ScriptedSampler
from tests.runtime.fake_gateway import FakeGateway

TASK = {"question": "How many singers?", "schema": "singer: id, name", "database": "music.sqlite"}


def execute(database: str, sql: str) -> str:
    return {"SELECT 3": "3"}.get(sql, "error: no such column")


def script(drafts: list[str], verdicts: list[str]) -> Any:
    """Replies by role: the next draft to writer and rewriter, the next verdict to the checker."""
    lines = {"checker": iter(verdicts), "writer": (remaining := iter(drafts)), "rewriter": remaining}
    return lambda body: next(lines[body["model"].removeprefix("policy:")])


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def spoken(requests: list[dict[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Who was asked, and the messages of each request, without what a client adds."""
    return [(body["model"], [(message["role"], message["content"]) for message in body["messages"]]) for body in requests]


def expected(*calls: tuple[str, list[dict[str, str]]]) -> list[tuple[str, list[tuple[str, str]]]]:
    return [(model, [(message["role"], message["content"]) for message in messages]) for model, messages in calls]


def solve(gateway: FakeGateway, **settings: Any) -> str:
    return asyncio.run(answer(dict(TASK), gateway.base_url, gateway.open("rollout", seed=0), execute, **settings))


OPENING = [system("Write one SQLite query."), user("singer: id, name\nHow many singers?")]


def checked(sql: str, result: str) -> tuple[str, list[dict[str, str]]]:
    messages = [
        system("Is the query right? Say CORRECT or INCORRECT."),
        user(f"How many singers?\n{sql}\nResult: {result}"),
    ]
    return "policy:checker", messages


def test_a_first_draft_that_the_checker_likes_is_the_answer() -> None:
    with FakeGateway(script(["SELECT 3"], ["CORRECT"])) as gateway:
        assert solve(gateway) == "SELECT 3"
        assert spoken(gateway.requests) == expected(("policy:writer", OPENING), checked("SELECT 3", "3"))
        assert all((body["temperature"], body["max_completion_tokens"]) == (1.0, 64) for body in gateway.requests)


def test_the_rewriter_goes_on_in_the_writers_conversation() -> None:
    with FakeGateway(script(["SELECT x", "SELECT 3"], ["INCORRECT", "It is correct."])) as gateway:
        assert solve(gateway) == "SELECT 3"
        complaint = user("Result: error: no such column\nThe check says INCORRECT. Write it again.")
        assert spoken(gateway.requests) == expected(
            ("policy:writer", OPENING),
            checked("SELECT x", "error: no such column"),
            ("policy:rewriter", [*OPENING, assistant("SELECT x"), complaint]),
            checked("SELECT 3", "3"),
        )


def test_there_are_at_most_three_drafts_and_the_last_is_not_checked() -> None:
    with FakeGateway(script(["a", "b", "c"], ["INCORRECT", "incorrect."])) as gateway:
        assert solve(gateway) == "c"
        roles = [body["model"] for body in gateway.requests]
        assert roles == ["policy:writer", "policy:checker", "policy:rewriter", "policy:checker", "policy:rewriter"]
        speakers = [message["role"] for message in gateway.requests[-1]["messages"]]
        assert speakers == ["system", "user", "assistant", "user", "assistant", "user"]


def test_an_empty_draft_is_a_draft() -> None:
    with FakeGateway(script(["", "SELECT 3"], ["INCORRECT", "CORRECT"])) as gateway:
        assert solve(gateway) == "SELECT 3"
        assert gateway.requests[2]["messages"][2]["content"] == ""


def test_the_experiment_can_build_the_same_conversation() -> None:
    assert WRITER_REQUEST.format_map(TASK) == OPENING[1]["content"] and WRITER_SYSTEM == OPENING[0]["content"]
    _, (rules, request) = checked("q", "r")
    assert CHECKER_REQUEST.format(question=TASK["question"], sql="q", result="r") == request["content"]
    assert CHECKER_SYSTEM == rules["content"]
    assert REWRITE_REQUEST.format(result="r") == "Result: r\nThe check says INCORRECT. Write it again."


def test_all_roles_can_be_one_model_of_an_endpoint_without_roles() -> None:
    models = dict.fromkeys(("policy:writer", "policy:checker", "policy:rewriter"), "some-model")
    with FakeGateway(lambda body: "SELECT 3" if "Write" in body["messages"][0]["content"] else "CORRECT") as gateway:
        assert solve(gateway, models=models) == "SELECT 3"
        assert [body["model"] for body in gateway.requests] == ["some-model"] * 2


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("SELECT 1", "SELECT 1"),
        (" SELECT 1\n", "SELECT 1"),
        ("Here it is:\n```sql\nSELECT 1\nFROM t\n```\nEnjoy!", "SELECT 1\nFROM t"),
        ("```\nSELECT 1\n```", "SELECT 1"),
        ("SELECT '```'", "SELECT '```'"),
        ("", ""),
    ],
)
def test_the_query_in_a_reply(text: str, sql: str) -> None:
    assert query_in(text) == sql


# The agent on its own, against any endpoint


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "my music.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE singer (id, name)")
        db.executemany("INSERT INTO singer VALUES (?, ?)", [(i, f"singer {i}") for i in range(8)])
    return path


@pytest.mark.parametrize(
    ("sql", "shown"),
    [
        ("SELECT count(*) FROM singer", "8"),
        ("SELECT id, name FROM singer WHERE id < 2", "0 | singer 0\n1 | singer 1"),
        ("SELECT id FROM singer", "0\n1\n2\n3\n4"),
        ("SELECT 1 WHERE 0", "no rows"),
        ("SELECT age FROM singer", "error: no such column: age"),
        ("", "no rows"),
        ("SELECT 1; SELECT 2", "error: You can only execute one statement at a time."),
        ("DROP TABLE singer", "error: not authorized"),
        ("ATTACH 'other.sqlite' AS other", "error: not authorized"),
        ("PRAGMA journal_mode = DELETE", "error: not authorized"),
        ("WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT max(x) FROM n", "error: interrupted"),
    ],
)
def test_the_agents_own_tool_reads_and_does_nothing_else(database: Path, sql: str, shown: str) -> None:
    before = database.read_bytes()
    assert read_only(str(database), sql, time_limit_s=0.1 if "RECURSIVE" in sql else 10.0) == shown
    assert database.read_bytes() == before and list(database.parent.iterdir()) == [database]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    module = [sys.executable, "-m", "experiments.agents.sql_langgraph"]
    return subprocess.run([*module, *arguments], capture_output=True, text=True, cwd=root, timeout=60)


@pytest.mark.slow
def test_the_agent_as_a_command(database: Path) -> None:
    with FakeGateway(script(["SELECT count(*) FROM singer"], ["CORRECT"])) as gateway:
        key = gateway.open("rollout", seed=0)
        end = command("--base_url", gateway.base_url, "--api_key", key, "--database", str(database), "How many?")
        assert (end.stdout, end.returncode) == ("SELECT count(*) FROM singer\n8\n", 0), end.stderr
        assert gateway.requests[0]["messages"][1]["content"] == "singer: id, name\nHow many?"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "there is no file "), ("some text that is not a database\n" * 20, "is not a SQLite database")],
)
def test_the_command_refuses_what_is_no_database(
    tmp_path: Path, content: str | None, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_text(content)
    arguments = ["--base_url", "http://127.0.0.1:1", "--api_key", "k", "--database", str(path), "?"]
    monkeypatch.setattr(sys, "argv", ["agent", *arguments])
    with pytest.raises(SystemExit) as end:
        sql_langgraph.main()
    assert end.value.code != 0 and sentence in capsys.readouterr().err


# Under the runner


def test_clients_that_frameworks_cache_outlive_a_batch() -> None:
    """A client bound to one event loop fails under the next; all runs of the process share a loop."""
    agent = functools.partial(answer, execute=execute)
    with FakeGateway(lambda body: "CORRECT" if "checker" in body["model"] else "SELECT 3") as gateway:
        for iteration in range(3):
            requests = rollout_requests([Task("t", TASK)], phase="train", iteration=iteration, samples=6)
            runner = Runner(gateway, agent, lambda task, target, sql: float(sql == "SELECT 3"))
            rollouts = runner.run(requests, phase="train", iteration=iteration, seed=0)
            assert [rollout.outcome for rollout in rollouts] == [{"reward": 1.0}] * 6, rollouts[0].error
            assert [len(rollout.transitions) for rollout in rollouts] == [2] * 6


def test_an_endpoint_that_answers_503_is_an_infrastructure_failure() -> None:
    with FakeGateway(lambda body: 503 if len(gateway.opened) == 1 else "SELECT 3") as gateway:
        requests = rollout_requests([Task("t", TASK)], phase="train", iteration=0, samples=1)
        runner = Runner(gateway, functools.partial(answer, execute=execute), lambda *_: 1.0)
        (rollout,) = runner.run(requests, phase="train", iteration=0, seed=0)
        assert (rollout.status, rollout.attempt) == ("ok", 1), rollout.error


def test_an_endpoint_that_answers_404_is_a_failure() -> None:
    with FakeGateway(lambda body: 404) as gateway:
        requests = rollout_requests([Task("t", TASK)], phase="train", iteration=0, samples=1)
        runner = Runner(gateway, functools.partial(answer, execute=execute), lambda *_: 1.0)
        (rollout,) = runner.run(requests, phase="train", iteration=0, seed=0)
        assert (rollout.status, len(gateway.opened)) == ("failed", 1)
        assert "NotFoundError" in rollout.error


# With the real gateway


def tokenizer() -> Any:
    texts = ["Write one SQLite query. Is the query right? Say CORRECT or INCORRECT. SELECT name FROM singer Result: error"]
    return train_tokenizer(texts, 320)


@pytest.fixture
def rollouts_by(tmp_path: Path) -> Iterator[Any]:
    made = tokenizer()

    def run(say: Any, agent: Any, tasks: list[Task], reward: Any, **settings: Any) -> list[Rollout]:
        sampler = ScriptedSampler(made, say)
        with Gateway(sampler, made) as gateway, Store(tmp_path / "rollouts.sqlite") as store:
            runner = Runner(gateway, agent, reward, RunnerSettings(concurrency=8), (tool_error,), store)
            requests = rollout_requests(tasks, phase="train", iteration=0, samples=4)
            return runner.run(requests, phase="train", iteration=0, seed=5, **settings)

    yield run


def say_sql(prompt: str) -> str:
    if "Is the query right?" in prompt:
        return "INCORRECT" if "error" in prompt else "CORRECT"
    return "SELECT 3" if "write it again" in prompt.lower() else "SELECT  x "


def test_a_graph_under_the_gateway_is_recorded_token_by_token(rollouts_by: Any) -> None:
    agent = functools.partial(answer, execute=execute)
    overrides = SamplingOverrides(max_tokens=32)
    rollouts = rollouts_by(
        say_sql,
        agent,
        [Task("t", TASK, "SELECT 3")],
        lambda task, target, sql: float(sql == target),
        train_roles=("writer", "rewriter"),
        sampling=overrides,
    )
    assert [rollout.status for rollout in rollouts] == ["ok"] * 4, rollouts[0].error
    for rollout in rollouts:
        writer, checker, rewriter, second = rollout.transitions
        assert [each.role for each in rollout.transitions] == ["writer", "checker", "rewriter", "checker"]
        assert [each.trainable for each in rollout.transitions] == [True, False, True, False]
        assert [each.continues for each in rollout.transitions] == [None, None, 0, None]
        assert writer.text == "SELECT  x "
        before = np.concatenate([writer.prompt_ids, writer.response_ids])
        np.testing.assert_array_equal(rewriter.prompt_ids[: len(before)], before)
        assert [each.reward for each in rollout.transitions] == [-0.1, 0.0, 0.0, 0.0]
        assert rollout.outcome == {"reward": 1.0} and rollout.answer == "SELECT 3"
        assert rollout.metrics["calls"] == 4.0


# The forty-line agent


def test_the_plain_agents_tasks_file(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(json.dumps(task) for task in plain_openai.tasks()))
    tasks = load_tasks(path)
    assert len(tasks) == 64
    assert tasks[0] == Task("snow-a", {"topic": "snow", "letter": "a"}, "a")


@pytest.mark.parametrize(("verse", "share"), [(["a", "aA"], 1.0), (["a b", "bcd a"], 0.375), (["", " "], 0.0), (["b", "A"], 0.5)])
def test_the_plain_agents_reward(verse: list[str], share: float) -> None:
    assert plain_openai.reward({}, "a", verse) == share


def test_the_plain_agent_under_the_gateway(rollouts_by: Any) -> None:
    def say(prompt: str) -> str:
        return "aaa" if "One more line." in prompt else "bab"

    task = next(plain_openai.tasks())
    fields: Mapping[str, Any] = {"topic": task["topic"], "letter": task["letter"]}
    rollouts = rollouts_by(say, plain_openai.agent, [Task("t", fields, task["target"])], plain_openai.reward)
    for rollout in rollouts:
        assert rollout.status == "ok", rollout.error
        assert rollout.answer == ["bab", "aaa"]
        assert rollout.reward == (1 / 3 + 1) / 2
        first, second = rollout.transitions
        assert second.continues == 0
        before = np.concatenate([first.prompt_ids, first.response_ids])
        np.testing.assert_array_equal(second.prompt_ids[: len(before)], before)


def test_the_plain_agent_is_about_forty_lines() -> None:
    assert len(Path(plain_openai.__file__).read_text().splitlines()) <= 45
