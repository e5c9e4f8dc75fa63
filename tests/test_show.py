"""The command that shows a rollout, on a small store."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightningrl import show
from lightningrl.runtime.store import Store
from lightningrl.types import Task
from tests.batches import make_rollout

GROUP = {"0": (1.0, [0.0]), "1": (0.0, [0.0, -0.5]), "2": (1.0, [0.25, 0.0, 0.0])}


def rollout_of(group: str, sample: str, reward: float, rewards: list[float], phase: str = "train", iteration: int = 2, **changes):
    made = make_rollout(
        group, reward, rewards, name=f"{phase}/{iteration}/{group}/{sample}", roles=["writer", "checker", "writer"][: len(rewards)]
    )
    calls = tuple(
        dataclasses.replace(call, text=f"answer {call.turn}", messages=({"role": "user", "content": f"question {call.turn}"},))
        for call in made.transitions
    )
    return dataclasses.replace(made, **{"transitions": calls, "task": Task(group, {"question": "how many?"}, {"gold": 7}), **changes})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two iterations; in the last one a group of three, a group of one, and a failed run."""
    with Store(tmp_path / "rollouts.sqlite") as store:
        store.write(rollout_of("a", "0", 1.0, [0.0], iteration=1), "train", 1)
        for sample, (outcome, rewards) in GROUP.items():
            store.write(rollout_of("a", sample, outcome, rewards), "train", 2)
        store.write(rollout_of("b", "0", 0.5, [0.0]), "train", 2)
        store.write(rollout_of("b", "1", 0.5, [0.0], status="failed", outcome={}, error="Traceback …\nOSError: gone\n"), "train", 2)
        store.write(rollout_of("a", "0", 0.0, [0.0], phase="heldout"), "heldout", 2)
    (tmp_path / "manifest.json").write_text(json.dumps({"config": {"recipe": "lightningrl_rtg"}}))
    return tmp_path


def printed(capsys, *arguments: object) -> str:
    assert show.main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def earned(text: str, recipe: str) -> list[tuple[float, float]]:
    """(credit, advantage) of every call."""
    rows = [line.split() for line in text.splitlines() if line.split()[:2] == ["earned", recipe]]
    return [(float(row[3]), float(row[5])) for row in rows]


def refused(capsys, *arguments: object) -> str:
    """The one sentence on stderr."""
    assert show.main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    return captured.err


def test_lists_the_last_iteration_and_shows_the_rollout_that_tells_most(run, capsys):
    text = printed(capsys, run)
    listed, _, rollout = text.partition("\n\n")
    lines = listed.splitlines()
    assert lines[0] == "5 rollouts of train, iteration 2:" and lines[1].split() == ["id", "status", "reward", "calls"]
    assert [line.split() for line in lines[2:7]] == [
        ["train/2/a/0", "ok", "1", "1"],
        ["train/2/a/1", "ok", "0", "2"],
        ["train/2/a/2", "ok", "1", "3"],
        ["train/2/b/0", "ok", "0.500", "1"],
        ["train/2/b/1", "failed", "-", "1"],
    ]
    assert lines[7] == f"Pick one with: python -m lightningrl.show {run} --rollout=ID"
    assert rollout.startswith("train/2/a/2: ok, 3 calls\n")


def test_every_call_has_its_role_text_reward_credit_and_advantage(run, capsys):
    text = printed(capsys, run, "--rollout=train/2/a/1", "--recipe=lightningrl")
    first, second = text.split("\n\n")[1:]
    assert [line.split(maxsplit=1) for line in second.splitlines()] == [
        ["call", "1, checker"],
        ["user", "question 1"],
        ["response", "answer 1"],
        ["reward", "-0.500 (intermediate)"],
        ["earned", "lightningrl  credit      0  advantage -1.155"],  # (0 - ⅔) / √⅓: every rollout weighs one
    ]
    assert first.startswith("call 0, writer\n")
    assert "group       a: 3 rollouts, rewards 1 0 1" in text
    assert 'target      {"gold": 7}' in text and "question    how many?" in text


def test_the_recipe_is_the_runs_own_unless_others_are_named(run, capsys):
    own = printed(capsys, run, "--rollout=train/2/a/2")
    assert [credit for credit, _ in earned(own, "lightningrl_rtg")] == [1.25, 1.0, 1.0]
    two = printed(capsys, run, "--rollout=train/2/a/2", "--recipe=last_only,rloo")
    assert earned(two, "last_only")[0][0] == 0 and earned(two, "last_only")[2][0] == 1
    assert earned(two, "rloo") == [(1.0, 0.5)] * 3
    assert "lightningrl_rtg" not in two
    (run / "manifest.json").unlink()
    assert earned(printed(capsys, run, "--rollout=train/2/a/2"), "lightningrl")


def test_a_group_of_one_has_nothing_to_be_compared_with(run, capsys):
    assert earned(printed(capsys, run, "--rollout=train/2/b/0", "--recipe=lightningrl"), "lightningrl") == [(0.5, 0.0)]


def test_statistics_are_those_of_the_phase_and_the_iteration(run, capsys):
    assert earned(printed(capsys, run, "--rollout=train/1/a/0", "--recipe=lightningrl"), "lightningrl") == [(1.0, 0.0)]
    assert earned(printed(capsys, run, "--rollout=heldout/2/a/0", "--recipe=lightningrl"), "lightningrl") == [(0.0, 0.0)]


def test_a_recipe_says_what_kind_its_credit_is_and_what_its_tokens_get(run, capsys):
    text = printed(capsys, run, "--rollout=train/2/a/0", "--recipe=gigpo,reinforce_pp_baseline")
    assert "gigpo: credit gigpo (an advantage already), advantage unchanged" in text
    assert "tokens then get theirs by reinforce_plus_plus_baseline" in " ".join(text.split())


def test_evidence_that_no_store_has_is_named_and_the_rest_is_shown(run, capsys):
    text = printed(capsys, run, "--rollout=train/2/a/1", "--recipe=ppo,lightningrl")
    assert "ppo needs value, which a run does not store: its credit cannot be shown." in text
    assert not earned(text, "ppo") and len(earned(text, "lightningrl")) == 2


def test_a_failed_rollout_shows_its_error_and_earns_nothing(run, capsys):
    text = printed(capsys, run, "--rollout=train/2/b/1")
    assert "error       OSError: gone" in text and "A rollout that failed is in no statistic and earns no credit." in text
    assert "answer 0" in text and "earned" not in text


def test_a_run_without_training_shows_its_evaluation(tmp_path, capsys):
    with Store(tmp_path / "rollouts.sqlite") as store:
        store.write(rollout_of("a", "0", 1.0, [0.0], phase="heldout", iteration=0), "heldout", 0)
    assert printed(capsys, tmp_path).startswith("1 rollout of heldout, iteration 0:\n")


def test_only_failed_rollouts_are_listed_too(tmp_path, capsys):
    with Store(tmp_path / "rollouts.sqlite") as store:
        store.write(rollout_of("a", "0", 1.0, [], status="timed_out", outcome={}), "train", 1)
    assert "train/2/a/0: timed_out, 0 calls" in printed(capsys, tmp_path)


def test_what_a_model_wrote_does_not_drive_the_terminal(tmp_path, capsys):
    wild = rollout_of("a", "0", 1.0, [0.0], iteration=1)
    call = dataclasses.replace(wild.transitions[0], text="one\n  two \x1b[2J\x07 é", trainable=False, finish_reason="length")
    with Store(tmp_path / "rollouts.sqlite") as store:
        store.write(dataclasses.replace(wild, transitions=(call,)), "train", 1)
    text = printed(capsys, tmp_path)
    assert "response    one\n                two \\x1b[2J\\x07 é\n" in text
    assert "call 0, writer, not trained, cut off at max_tokens" in text


def test_long_prompts_are_cut_and_responses_are_not(tmp_path, capsys):
    long = rollout_of("a", "0", 1.0, [0.0], iteration=1)
    call = dataclasses.replace(long.transitions[0], text="word " * 400, messages=({"role": "user", "content": "ask " * 400},))
    with Store(tmp_path / "rollouts.sqlite") as store:
        store.write(dataclasses.replace(long, transitions=(call,)), "train", 1)
    text = printed(capsys, tmp_path)
    assert text.count("word") == 400 and 0 < text.count("ask") < 120 and "…" in text


def test_mistakes_get_one_sentence(run, tmp_path, capsys):
    assert "there is no folder" in refused(capsys, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no rollouts.sqlite: give the folder of a run" in refused(capsys, tmp_path / "empty")
    assert not (tmp_path / "empty" / "rollouts.sqlite").exists()
    near = refused(capsys, run, "--rollout=train/2/a/9")
    assert "has no rollout 'train/2/a/9'; near it: " in near and "train/2/a/" in near.split("near it:")[1]
    assert "near it: train/2/b/1" in refused(capsys, run, "--rollout=zzzz")
    assert "There is no recipe 'grop': choose one of " in refused(capsys, run, "--recipe=grop")
    (run / "manifest.json").write_text("{}")
    assert "is not the manifest of a run" in refused(capsys, run)
    (run / "rollouts.sqlite").write_text("this is no database, only a text that is long enough")
    assert "is not a store of rollouts" in refused(capsys, run, "--recipe=lightningrl")


def test_a_store_that_nothing_was_written_to(tmp_path, capsys):
    Store(tmp_path / "rollouts.sqlite").close()
    assert "has no rollouts yet" in refused(capsys, tmp_path)


@pytest.mark.slow
def test_the_command(run):
    done = subprocess.run(
        [sys.executable, "-m", "lightningrl.show", str(run), "--recipe=salt"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "") and "earned      salt" in done.stdout
    done = subprocess.run([sys.executable, "-m", "lightningrl.show"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "RUN_DIR" in done.stderr
