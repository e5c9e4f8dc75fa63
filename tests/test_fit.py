"""The command for agents of one's own: it trains one, goes on where it was stopped, and says what is wrong in one sentence."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from experiments import text_to_sql
from lightningrl import fit as fit_module
from lightningrl.errors import UserError
from lightningrl.fit import CommandConfig, fit
from lightningrl.policy import load_policy
from lightningrl.recipes import RECIPES
from lightningrl.types import Task

ROOT = pathlib.Path(__file__).parent.parent
TINY = {
    "iterations": 2,
    "learning_rate": 1e-3,
    "tasks_per_iteration": 2,
    "rollouts_per_task": 4,
    "max_tokens": 3,
    "eval_every": 2,
    "slots": 8,
    "vocab_size": 263,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 32,
    "context_length": 64,
}


async def agent(task: dict, base_url: str, api_key: str) -> float:
    """One call, paid by the ASCII character."""
    async with httpx.AsyncClient(base_url=base_url, headers={"Authorization": f"Bearer {api_key}"}, timeout=60) as client:
        body = {"model": "policy:speaker", "messages": [{"role": "user", "content": task["say"]}]}
        reply = await client.post("/chat/completions", json=body)
        reply.raise_for_status()
        return float(sum(character.isascii() for character in reply.json()["choices"][0]["message"]["content"]))


def silent_agent(task: dict, base_url: str, api_key: str) -> float:
    return 1.0


TASKS = [Task(f"t{i}", {"say": f"word {i}"}) for i in range(5)]


@pytest.fixture
def config(tmp_path: pathlib.Path) -> CommandConfig:
    return CommandConfig(out=str(tmp_path / "out"), cache=str(tmp_path / "cache"), **TINY)  # type: ignore[arg-type]


@pytest.mark.slow
def test_an_async_agent_without_any_framework_is_trained(config: CommandConfig) -> None:
    fitted = fit(agent, TASKS[:4], None, config, heldout={"heldout": TASKS[4:]})
    assert [row["iteration"] for row in fitted.metrics] == [0, 1, 2]
    assert all(row["rollouts"] == 8 and row["failed"] == 0 and row["calls"] == 8 for row in fitted.metrics[1:])
    assert all(row["logprob_gap_max"] <= 1e-4 for row in fitted.metrics[1:])
    out = pathlib.Path(config.out)
    names = {path.name.split(".out.")[0] for path in out.iterdir()}
    assert {"manifest.json", "metrics.jsonl", "reward.png", "rollouts.sqlite", "checkpoints", "policy", "events"} <= names
    assert load_policy(out / "policy").config.hidden_size == 16
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["config"]["seed"] == 0 and manifest["versions"]["jax"]

    # The same command again has nothing left to do; other settings or tasks are another run.
    assert fit(agent, TASKS[:4], None, config, heldout={"heldout": TASKS[4:]}).metrics == fitted.metrics
    with pytest.raises(UserError, match="holds a run of another config .learning_rate=0.001, now 0.01.: give another --out"):
        fit(agent, TASKS[:4], None, dataclasses.replace(config, learning_rate=0.01))
    with pytest.raises(UserError, match="holds a run of another config .data="):
        fit(agent, TASKS[:3], None, config)


@pytest.mark.slow
def test_an_agent_that_makes_no_call_leaves_nothing_to_learn(config: CommandConfig) -> None:
    with pytest.raises(UserError, match="nothing to learn from: no call of a trained role was made"):
        fit(silent_agent, TASKS[:4], None, config)


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_in_use(config: CommandConfig, busy_port: int) -> None:
    with pytest.raises(UserError, match=f"port {busy_port} on 127.0.0.1 is in use by another program: choose another one"):
        fit(agent, TASKS, None, dataclasses.replace(config, port=busy_port))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"recipe": "magic"}, f"no recipe 'magic': choose one of {', '.join(sorted(RECIPES))}"),
        ({"recipe": "judged"}, "recipe judged needs a judge: give --judge=package.module:function or --judge_model=NAME"),
        ({"recipe": "judged", "judge": "nowhere:judge"}, "nowhere"),
        ({"recipe": "shaped"}, "recipe shaped needs a potential: give --potential=package.module:function"),
        ({"data_parallel": 64}, "needs 64 devices"),
        (
            {"intermediate": ("applause",)},
            "no intermediate reward 'applause': choose from better_draft, new_support, repeated_call, tool_error",
        ),
        ({"policy": "nowhere"}, "no policy at nowhere: give a folder that a run has left"),
        ({"vocab_size": 200}, "vocab_size is 200, but 256 bytes and 7 markers need at least 263"),
        ({"hidden_size": 15}, "hidden_size=15 must be a multiple of num_heads=2"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"context_length": 100}, "context_length=100 must be a multiple of 16, the tokens of a piece of a prompt"),
        ({"prefill_chunk": 24}, "context_length=64 must be a multiple of 24, the tokens of a piece of a prompt"),
        ({"prefill_chunk": 0}, "prefill_chunk=0 must be at least 1"),
        ({"decode_group": -1}, "decode_group=-1 must be at least 0"),
        ({"agent_processes": 0}, "agent_processes=0 must be at least 1"),
        ({"rollouts_per_task": 0}, "rollouts_per_task=0 must be at least 1"),
        ({"eval_every": 0}, "eval_every=0 must be at least 1"),
        ({"rollout_budget": -1}, "rollout_budget=-1 must be at least 0"),
        ({"iterations": -1}, "iterations=-1 must be at least 0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"seed": 10**23}, "must be less than 2³²"),
        ({"time_limit": math.nan}, "time_limit=nan must be more than 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be more than 0"),
        ({"weight_decay": math.inf}, "weight_decay=inf must be finite"),
        ({"prefix_cache_mb": -1.0}, "prefix_cache_mb=-1.0 must be at least 0"),
        ({"data_parallel": 0}, "data_parallel=0 must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be more than 0"),
        ({"ray_cpus": -1.0}, "ray_cpus=-1.0 must be at least 0"),
        ({"engine": "http://127.0.0.1:1"}, "there is no engine at http://127.0.0.1:1"),
        ({"engine_reload": "magic"}, "engine_reload='magic' is neither vllm nor lightningrl nor JSON"),
    ],
)
def test_a_setting_that_cannot_be_used(config: CommandConfig, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        fit(agent, TASKS, None, dataclasses.replace(config, **settings))
    assert sentence in str(refused.value) and "\n" not in str(refused.value)
    assert not (pathlib.Path(config.out) / "manifest.json").exists()  # the corrected command is not one of another config


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_manifest_gets_a_sentence(config: CommandConfig, text: str) -> None:
    path = pathlib.Path(config.out) / "manifest.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    with pytest.raises(UserError, match="manifest.json is damaged"):
        fit(agent, TASKS, None, config)
    assert path.read_text() == text


def test_checkpoints_of_nobody_are_left_alone(config: CommandConfig) -> None:
    out = pathlib.Path(config.out)
    for folder in ("checkpoints/7", "start"):
        (out / folder).mkdir(parents=True)
    with pytest.raises(UserError, match="checkpoints but no manifest.json"):
        fit(agent, TASKS, None, config)
    assert (out / "start").is_dir() and not (out / "manifest.json").exists()


@pytest.mark.parametrize(
    ("tasks", "heldout", "sentence"),
    [
        ([], [], "there are no tasks to train on"),
        ([TASKS[0], TASKS[0]], [], "two tasks have the same id"),
        (TASKS, [TASKS[2]], "the heldout task t2 is also among the training tasks"),
    ],
)
def test_tasks_that_cannot_be_trained_on(config: CommandConfig, tasks: list, heldout: list, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        fit(agent, tasks, None, config, heldout={"heldout": heldout})


def test_the_readme_shows_the_forty_line_agent_as_it_is() -> None:
    source = (ROOT / "experiments/agents/plain_openai.py").read_text()
    assert f"```python\n{source}```" in (ROOT / "README.md").read_text()


# The command line

Main = Callable[..., None]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, config: CommandConfig) -> Main:
    """`main` of the command with the given flags, in this process."""

    def call(**flags: Any) -> None:
        given = dataclasses.replace(config, **flags)
        monkeypatch.setattr(fit_module.flags, "config_from_flags", lambda _: given)
        fit_module.main()

    return call


def tasks_file(folder: pathlib.Path, *lines: str) -> str:
    path = folder / "tasks.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


def test_what_is_wrong_with_the_commands_flags(main: Main, tmp_path: pathlib.Path) -> None:
    good, broken = tasks_file(tmp_path, '{"say": "a"}'), tmp_path / "broken.jsonl"
    broken.write_text('{"say": "a"}\n{"say": \n')
    name = "experiments.agents.plain_openai:agent"
    for flags, sentence in [
        ({}, "give --agent=package.module:function and --tasks=tasks.jsonl"),
        ({"agent": name}, "give --agent=package.module:function and --tasks=tasks.jsonl"),
        ({"agent": "nobody.wrote:this", "tasks": good}, "there is no module nobody"),
        ({"agent": name, "tasks": str(tmp_path / "none")}, f"cannot read {tmp_path / 'none'}"),
        ({"agent": name, "tasks": str(broken)}, f"{broken}, line 2: not valid JSON"),
        ({"agent": name, "tasks": good}, "there are no tasks to train on"),  # the only one is held out
        ({"agent": name, "tasks": good, "reward": name + "s"}, "has no 'agents'"),
    ]:
        with pytest.raises(UserError) as refused:
            main(**flags)
        assert sentence in str(refused.value), flags


@pytest.mark.slow
def test_every_tenth_task_is_held_out(main: Main, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"say": f"word {i}"}) for i in range(11)]
    main(agent=f"{__name__}:agent", tasks=tasks_file(tmp_path, *lines), iterations=0)
    assert "on 2 tasks" in capsys.readouterr().out


def test_databases_that_cannot_be_learned_about(tmp_path: pathlib.Path) -> None:
    text, empty, bare = tmp_path / "text.sqlite", tmp_path / "empty.sqlite", tmp_path / "bare.sqlite"
    text.write_text("no database, but some text that is long enough to be looked at\n" * 20)
    empty.touch()
    with sqlite3.connect(bare) as db:
        db.execute("CREATE TABLE singer (id, name)")
    for flags, sentence in [
        ({"database": str(text)}, "SQLite"),
        ({"database": str(empty)}, "empty.sqlite"),
        ({"database": str(bare)}, "bare.sqlite"),
        ({"database": str(tmp_path / "none.sqlite")}, "none.sqlite"),
        ({"data_dir": str(tmp_path)}, "tables.json"),
        ({"database": str(text), "data_dir": str(tmp_path)}, "give --database or --data_dir, not both"),
    ]:
        with pytest.raises(UserError) as refused:
            text_to_sql.load_data(text_to_sql.Config(**flags), tmp_path)  # type: ignore[arg-type]
        assert sentence in str(refused.value) and "\n" not in str(refused.value), flags


def command(module: str, *flags: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", module, *flags]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_the_commands_end_with_one_sentence(tmp_path: pathlib.Path) -> None:
    (tmp_path / "text.sqlite").write_text("text\n" * 200)
    started = {
        "error: give --agent": command("lightningrl.fit"),
        "error: there is no module nobody": command("lightningrl.fit", "--agent=nobody:x", "--tasks=none.jsonl"),
        "error: ": command("experiments.text_to_sql", f"--database={tmp_path / 'text.sqlite'}", f"--out={tmp_path / 'out'}"),
    }
    for sentence, process in started.items():
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 1 and stderr.startswith(sentence) and stderr.count("\n") == 1, stderr


@pytest.mark.slow
def test_ctrl_c_leaves_one_line_and_a_run_that_goes_on(tmp_path: pathlib.Path) -> None:
    lines = [json.dumps({"topic": f"word {i}", "letter": "a", "target": "a"}) for i in range(4)]
    flags = [f"--{name}={value}" for name, value in (TINY | {"iterations": 300, "context_length": 128}).items()]
    flags += [f"--out={tmp_path / 'out'}", f"--cache={tmp_path / 'cache'}", f"--tasks={tasks_file(tmp_path, *lines)}"]
    flags += [f"--{name}=experiments.agents.plain_openai:{name}" for name in ("agent", "reward")]
    process = command("lightningrl.fit", *flags)
    metrics = tmp_path / "out" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    said = stderr.splitlines()
    assert process.returncode == 130 and "interrupted" in said[-1], stderr
    assert all(line.startswith("iteration ") for line in said[:-1] if line), stderr

    done = metrics.read_text()
    again = command("lightningrl.fit", *flags)
    while again.poll() is None and metrics.read_text().count("\n") <= done.count("\n"):
        time.sleep(0.05)
    again.send_signal(signal.SIGINT)
    again.communicate(timeout=120)
    assert metrics.read_text().startswith(done[: done.rfind("\n", 0, -1) + 1])
