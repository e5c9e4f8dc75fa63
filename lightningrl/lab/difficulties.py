"""Eight processes, each with one thing that makes credit hard to assign. Action 0 is mostly the right one."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from lightningrl.lab.process import ACTIONS, Process, Ways, make_process


def delayed_reward() -> Process:
    """Four calls, each as important as the others; what was got right is paid at the end, as a sum."""
    calls: dict[str, list[Ways | str]] = {}
    for turn in range(4):
        for right in range(turn + 1):
            calls[f"{right} of {turn}"] = [f"{right + 1} of {turn + 1}", *[f"{right} of {turn + 1}"] * 2]
    return make_process(
        calls,
        start={"0 of 0": 1.0},
        outcome={f"{right} of 4": right / 4 for right in range(5)},
        potential={f"{right} of {turn}": right / 4 for turn in range(5) for right in range(turn + 1)},
    )


def distractor_turn() -> Process:
    """The first call and the last decide; the two between them are long, lead to different states, and change nothing."""
    calls: dict[str, list[Ways | str]] = {"task": ["well begun", "badly begun", "badly begun"]}
    tokens: dict[tuple[str, int], int] = {}
    for begun, gained in (("well begun", 0.5), ("badly begun", 0.0)):
        calls[begun] = [f"{begun}, topic {topic}" for topic in range(ACTIONS)]
        tokens |= {(begun, action): 3 for action in range(ACTIONS)}
        for topic in range(ACTIONS):
            calls[f"{begun}, topic {topic}"] = [f"{begun}, joke {joke}" for joke in range(ACTIONS)]
            calls[f"{begun}, joke {topic}"] = [f"paid {gained + 0.5}", f"paid {gained}", f"paid {gained}"]
            tokens |= {(f"{begun}, topic {topic}", action): 3 for action in range(ACTIONS)}
    return make_process(
        calls,
        start={"task": 1.0},
        outcome={"paid 0.5": 0.5, "paid 1.0": 1.0},
        tokens=tokens,
        potential={name: 0.5 for name in calls if name.startswith("well")},
    )


def mistake_and_recovery() -> Process:
    """Three steps, each of which may end in an error that can be repaired: rollouts that succeed hold mistakes, and repairs.

    An error costs 0.1 at once, as a tool that reports one lets it (Automatic Intermediate Rewarding), and a turn of six.
    """
    calls: dict[str, list[Ways | str]] = {}
    for step, after in (("step 0", "step 1"), ("step 1", "step 2"), ("step 2", "done")):
        calls[step] = [after, f"error at {step}", f"error at {step}"]
        calls[f"error at {step}"] = [after, f"error at {step}", "given up"]
    failing = {(f"step {i}", action): -0.1 for i in range(3) for action in (1, 2)}
    repeated = {(f"error at step {i}", 1): -0.1 for i in range(3)}
    progress = {f"{what}step {i}": i / 3 for i in range(3) for what in ("", "error at ")}
    return make_process(calls, start={"step 0": 1.0}, outcome={"done": 1.0}, reward=failing | repeated, potential=progress)


def redundant_call() -> Process:
    """Two facts are to be looked up, then comes the answer; to look one up again changes nothing but uses a turn of six."""
    return make_process(
        {
            "nothing known": ["a known", "b known", {"right": 0.1, "wrong": 0.9}],
            "a known": ["a known", "both known", {"right": 0.4, "wrong": 0.6}],
            "b known": ["both known", "b known", {"right": 0.4, "wrong": 0.6}],
            "both known": ["both known", "both known", "right"],
        },
        start={"nothing known": 1.0},
        outcome={"right": 1.0},
        potential={"a known": 0.5, "b known": 0.5, "both known": 1.0},
    )


def one_to_blame() -> Process:
    """Planner, writer, checker, and the planner's report: only what the checker does matters much, all are paid the same."""
    return make_process(
        {
            "task": ["plan 0", "plan 1", "plan 2"],
            **{f"plan {i}": [{"good draft": p, "bad draft": 1 - p} for p in (0.55, 0.5, 0.45)] for i in range(ACTIONS)},
            "good draft": ["all well", "all well", "all wrong"],
            "bad draft": ["all well", "all wrong", "half well"],
            "all well": ["paid 1"] * ACTIONS,
            "half well": ["paid ½"] * ACTIONS,
            "all wrong": ["paid 0"] * ACTIONS,
        },
        start={"task": 1.0},
        outcome={"paid 1": 1.0, "paid ½": 0.5},
        role={**{f"plan {i}": 1 for i in range(ACTIONS)}, "good draft": 2, "bad draft": 2},
        potential={"good draft": 0.5, "all well": 1.0, "half well": 0.5},
    )


def stochastic_tools() -> Process:
    """An easy and a hard task: a tool has to work three times within six calls, and fails at random even when used well."""
    calls: dict[str, list[Ways | str]] = {}
    for task, chances in (("easy", (0.8, 0.5, 0.3)), ("hard", (0.5, 0.25, 0.1))):
        for stage in range(3):
            after = f"{task} {stage + 1}" if stage < 2 else "done"
            calls[f"{task} {stage}"] = [{after: p, f"{task} {stage}": 1 - p} for p in chances]
    progress = {f"{task} {stage}": stage / 3 for task in ("easy", "hard") for stage in range(3)}
    return make_process(calls, start={"easy 0": 0.5, "hard 0": 0.5}, outcome={"done": 1.0}, potential=progress)


def unequal_lengths() -> Process:
    """A quick answer is one token and right two times in five; careful work takes up to six calls of three tokens and is better.

    Every careful call done well makes an answer a tenth likelier to be right, so that there is something to learn on the way: were it paid
    at the end alone, the lab would measure who explores, which is no matter of credit.
    """
    calls: dict[str, list[Ways | str]] = {
        "task": [{"right": 0.4, "wrong": 0.6}, "well 1", {"right": 0.2, "wrong": 0.8}],
    }
    tokens = {("task", 1): 3}
    for turn in range(1, 6):
        for how, better, chance in (("well", f"well {turn + 1}", 0.5 + turn / 10), ("badly", f"badly {turn + 1}", 0.3)):
            worse = f"badly {turn + 1}"
            if turn == 5:
                better, worse = ("right", "half right") if how == "well" else ("half right", "half right")
            calls[f"{how} {turn}"] = [better, worse, {"right": chance, "wrong": 1 - chance}]
            tokens |= {(f"{how} {turn}", action): 3 for action in (0, 1)}
    del calls["badly 1"], tokens["badly 1", 0], tokens["badly 1", 1]
    return make_process(
        calls,
        start={"task": 1.0},
        outcome={"right": 1.0, "half right": 0.3},
        tokens=tokens,
        potential={f"well {turn}": 0.5 + turn / 10 for turn in range(1, 6)} | {f"badly {turn}": 0.3 for turn in range(2, 6)},
    )


def key_used_late() -> Process:
    """One of three keys is chosen, two calls say nothing, and then the lock wants that key: all keys look alike from outside."""
    calls: dict[str, list[Ways | str]] = {"task": [f"key {k}, idle 0" for k in range(ACTIONS)]}
    shows: dict[str, str] = {}
    for key, worth in enumerate((1.0, 0.6, 0.3)):
        places = [f"key {key}, idle 0", f"key {key}, idle 1", f"key {key}, lock"]
        calls |= {place: [after] * ACTIONS for place, after in zip(places, places[1:], strict=False)}
        calls[places[-1]] = [f"paid {worth}" if action == key else "paid 0" for action in range(ACTIONS)]
        shows |= {place: place.split(", ")[1] for place in places}
    return make_process(calls, start={"task": 1.0}, outcome={f"paid {worth}": worth for worth in (1.0, 0.6, 0.3)}, shows=shows)


PROCESSES: dict[str, Callable[[], Process]] = {
    process.__name__: process
    for process in (
        delayed_reward,
        distractor_turn,
        mistake_and_recovery,
        redundant_call,
        one_to_blame,
        stochastic_tools,
        unequal_lengths,
        key_used_late,
    )
}


def stacked(names: tuple[str, ...] = tuple(PROCESSES)) -> Process:
    """The processes of these names, every array with an axis in front."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *(PROCESSES[name]() for name in names))
