"""Values from branched rollouts against exact enumeration, and what of a branch may be used."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from lightningrl.credit.monte_carlo import vineppo
from lightningrl.evidence.branches import (
    branch_requests,
    branch_rollouts,
    branch_values,
    describe_branches,
    every_call,
    later_calls,
    random_calls,
)
from lightningrl.gateway import Gateway
from lightningrl.runtime import Runner, rollout_requests
from lightningrl.tabulate import table_from_rollouts
from lightningrl.tabulate_tree import first_sampled
from lightningrl.types import Replay, Rollout, RolloutRequest, Status, Task, Transition
from tests import chance
from tests.chance import ChanceSampler, Words, walk, words

IDS = {"up": 7, "down": 8, "stop": 9}


def walked(said: Words, name: str, *, parent: Rollout | None = None, turn: int = 0, status: Status = "ok", group: str = "g") -> Rollout:
    """The rollout that says these words, with prompts that go on from each other."""
    calls, prompt = [], [1]
    for k, word in enumerate(said):
        response = np.array([IDS[word]], np.int32)
        reward = chance.PENALTY * (word == "down")
        logprobs = np.zeros(1, np.float32)
        calls.append(Transition(np.array(prompt, np.int32), response, logprobs, 1.0, 0, "policy", k, reward, text=word))
        prompt += [IDS[word], 2]
    rollout = Rollout(name, Task("t", {}), group, 0, 0, tuple(calls), {"reward": chance.outcome(said)}, status)
    if parent is None:
        return rollout
    return dataclasses.replace(rollout, parent=parent.id, metrics={"replayed_calls": float(turn)})


def ways_on(said: Words) -> list[tuple[Words, float]]:
    """Every end of a walk that goes on from a state, with its chance."""
    if chance.over(said):
        return [(said, 1.0)]
    return [(end, share * c) for word, c in chance.chances(said).items() for end, share in ways_on((*said, word))]


def in_their_shares(parent: Rollout) -> list[Rollout]:
    """1000 branches before every call, each way on as often as its chance asks."""
    branches = []
    for turn in range(len(parent.transitions)):
        ends = [end for end, share in ways_on(words(parent)[:turn]) for _ in range(round(1000 * share))]
        assert len(ends) == 1000
        branches += [walked(end, f"{parent.id}@{turn}.{k}", parent=parent, turn=turn) for k, end in enumerate(ends)]
    return branches


# Values


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_every_way_on_in_its_share_gives_the_true_value(gamma: float) -> None:
    parents = [walked(("down", "up", "up"), "a"), walked(("stop",), "b")]
    branches = [branch for parent in parents for branch in in_their_shares(parent)]
    value, count = branch_values(parents, branches, size=6, gamma=gamma, pooled=False)
    truth = [true_value(("down", "up", "up")[:t], gamma) for t in range(3)]
    np.testing.assert_allclose(value[:3, 0], truth, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value[:3, 1], [*truth[1:], 2.0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value[3], [truth[0], 0.0], rtol=1e-5, atol=1e-6)
    assert count[:4].tolist() == [[1000, 1000], [1000, 1000], [1000, 1], [1000, 1]]
    assert not value[4:].any() and not count[4:].any()
    assert value.dtype == count.dtype == np.float32


def true_value(said: Words, gamma: float) -> float:
    """Over whole walks, not by recursion: the outcome comes with the reward of the last call."""

    def gain(end: Words) -> float:
        rewards = [chance.PENALTY * (word == "down") for word in end]
        rewards[-1] += chance.outcome(end)
        return sum(gamma**k * reward for k, reward in enumerate(rewards[len(said) :]))

    return sum(share * gain(end) for end, share in ways_on(said))


def test_the_two_ways_to_work_out_a_value_agree() -> None:
    for said in ((), ("up",), ("down", "up")):
        for gamma in (1.0, 0.5):
            assert chance.value(said, gamma) == pytest.approx(true_value(said, gamma))


def test_all_that_came_to_a_state_count_but_the_rollout_itself() -> None:
    a, b, c = walked(("down", "up", "up"), "a"), walked(("down", "up", "down"), "b"), walked(("up", "stop"), "c")
    branch = walked(("down", "stop"), "a@1.0", parent=a, turn=1)
    value, count = branch_values([a, b, c], [branch], size=8)
    after_down = {"a": 2.0, "b": 0.0 + chance.PENALTY, "branch": -1.0}
    assert chance.outcome(words(b)) == -1.0
    after_down["b"] = -1.0 + chance.PENALTY
    # The branch began with a's "down", so it is no sample of the first state; it is one of the second, for a and for b.
    assert count[:, 0].tolist() == [2, 2, 1, 2, 2, 1, 2, 0]
    np.testing.assert_allclose(value[0, 0], (after_down["b"] + chance.PENALTY + 1.0) / 2)
    np.testing.assert_allclose(value[1, 0], (after_down["b"] + after_down["branch"]) / 2)
    np.testing.assert_allclose(value[2, 0], after_down["b"])
    np.testing.assert_allclose(value[4, 0], (after_down["a"] + after_down["branch"]) / 2)
    assert value[7].tolist() == [0.0, 1.0] and count[7].tolist() == [0.0, 1.0]  # c was alone there
    np.testing.assert_array_equal(value[:2, 1], value[1:3, 0])
    alone, only = branch_values([a, b, c], [branch], size=8, pooled=False)
    assert only[:, 0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0] and alone[1, 0] == -1.0


def test_a_group_is_a_world_of_its_own() -> None:
    a, b = walked(("up", "stop"), "a"), walked(("up", "up", "up"), "b", group="another")
    assert not branch_values([a, b], [], size=5)[1][:, 0].any()


@pytest.mark.parametrize("change", [{"policy_version": 1}, {"temperature": 0.5}, {"role": "checker"}, {"prompt_ids": np.array([1, 5])}])
def test_another_state_or_policy_is_no_sample(change: dict[str, Any]) -> None:
    parent = walked(("up", "up", "up"), "a")
    good = walked(("up", "stop"), "a@1.0", parent=parent, turn=1)
    changed = dataclasses.replace(good, transitions=(good.transitions[0], dataclasses.replace(good.transitions[1], **change)))
    for pooled in (True, False):
        assert branch_values([parent], [good], size=3, pooled=pooled)[1][1, 0] == 1
        assert branch_values([parent], [changed], size=3, pooled=pooled)[1][1, 0] == 0
    assert describe_branches([parent], [good])["branch_elsewhere"] == 0
    assert describe_branches([parent], [changed])["branch_elsewhere"] == 1


def test_branches_that_did_not_end_well_are_counted_and_not_used() -> None:
    parent = walked(("up", "up", "up"), "a")
    statuses: tuple[Status, ...] = ("ok", "diverged", "failed")
    branches = [walked(("up", "stop"), f"a@1.{k}", parent=parent, turn=1, status=status) for k, status in enumerate(statuses)]
    branches += [walked(("up",), "a@1.9", parent=parent, turn=1)]  # ended where it was to go on
    value, count = branch_values([parent, walked(("up", "stop"), "b", status="timed_out")], branches, size=3, pooled=False)
    assert (value[1, 0], count[1, 0]) == (1.0, 1.0)
    assert describe_branches([parent], branches) == {
        "branch_rollouts": 4.0,
        "branch_diverged": 1.0,
        "branch_failed": 1.0,
        "branch_timed_out": 0.0,
        "branch_elsewhere": 1.0,
        "branch_calls": 3.0,
        "branch_tokens": 3.0,
    }


def test_rows_are_those_of_the_table() -> None:
    parents = [walked(("up", "stop"), "a"), walked(("up",), "b", status="failed"), walked(("down", "up", "up"), "c")]
    shuffled = [dataclasses.replace(parent, transitions=parent.transitions[::-1]) for parent in parents]
    branches = [branch for parent in parents if parent.status == "ok" for branch in in_their_shares(parent)]
    table = table_from_rollouts(shuffled, size=7)
    value, count = branch_values(shuffled, branches, size=7, pooled=False)
    assert ((count > 0).all(1) == table.valid).all()
    states: list[Words] = [(), ("up",), (), ("down",), ("down", "up")]
    np.testing.assert_allclose(value[:5, 0], [chance.value(said) for said in states], rtol=1e-5, atol=1e-6)


def test_too_small_a_table() -> None:
    with pytest.raises(ValueError, match="have 3 transitions but the table holds 2: give it a size of at least 3"):
        branch_values([walked(("up", "up", "up"), "a")], [], size=2)


def test_no_rollouts() -> None:
    value, count = branch_values([], [], size=2)
    assert not value.any() and not count.any() and value.shape == count.shape == (2, 2)


# Requests


def parents_of(*lengths: int) -> list[Rollout]:
    return [walked(("up", "up", "up")[:n], f"r{i}") for i, n in enumerate(lengths)]


def places(requests: Sequence[RolloutRequest]) -> list[tuple[str, int]]:
    return [(request.replay.parent.id, request.replay.calls) for request in requests if request.replay]


def test_requests_name_parent_turn_and_number() -> None:
    parents = [*parents_of(2, 1), walked(("up",), "bad", status="failed")]
    requests = branch_requests(parents, per_point=2)
    assert [request.id for request in requests] == ["r0@0.0", "r0@0.1", "r0@1.0", "r0@1.1", "r1@0.0", "r1@0.1"]
    assert places(requests[2:3]) == [("r0", 1)]
    assert [(r.task, r.group, r.sample) for r in requests[2:4]] == [(parents[0].task, "g", 0), (parents[0].task, "g", 1)]
    assert isinstance(requests[0].replay, Replay) and requests[0].replay.parent is parents[0]


def test_where_to_branch() -> None:
    parents = parents_of(3, 1)
    rng = np.random.default_rng(0)
    assert list(every_call(parents[0], rng)) == [0, 1, 2] and list(later_calls(parents[0], rng)) == [1, 2]
    assert list(later_calls(parents[1], rng)) == []

    def two(rollout: Rollout, rng: np.random.Generator) -> Any:
        return random_calls(rollout, rng, count=2)

    chosen = {tuple(places(branch_requests(parents, per_point=1, points=two, seed=(s,)))) for s in range(20)}
    assert len(chosen) == 3 and all(len(set(c)) == 3 and c[-1] == ("r1", 0) for c in chosen)
    one, again = (places(branch_requests(p, per_point=1, points=two, seed=(5,))) for p in (parents, parents[::-1]))
    assert sorted(one) == sorted(again)


def test_bad_requests_get_a_sentence() -> None:
    with pytest.raises(ValueError, match="per_point is 0: a point needs at least one branch"):
        branch_requests(parents_of(1), per_point=0)
    with pytest.raises(ValueError, match="rollout 'r0' has 1 calls: it has no call 1 to branch before"):
        branch_requests(parents_of(1), per_point=1, points=lambda rollout, rng: [1])


# From the agent to the evidence


@pytest.mark.slow
def test_the_producer_comes_near_the_true_values_of_a_known_policy() -> None:
    """Three recorded walks, 40 branches before each call: within four standard errors of the exact values and credits."""
    with Gateway(ChanceSampler(), chance.tokenizer()) as gateway:
        runner = Runner(gateway, walk, None, intermediate=(chance.down_costs,))

        def run(requests: Sequence[RolloutRequest], phase: str = "branch") -> list[Rollout]:
            return runner.run(requests, phase="branch", iteration=0, seed=0)

        parents = run(rollout_requests([Task("t", {})], phase="train", iteration=0, samples=3))
        branches: list[Rollout] = []

        def run_and_keep(requests: Sequence[RolloutRequest], phase: str) -> list[Rollout]:
            branches.extend(run(requests))
            return branches

        settings: dict[str, Any] = {"per_point": 40, "multiple": 8}
        separate, totals = branch_rollouts(None, None, parents, jax.random.key(0), run=run_and_keep, pooled=False, **settings)
    pooled, more = branch_rollouts(None, totals, parents, jax.random.key(0), run=lambda requests, phase: branches, **settings)
    states = [words(parent)[:t] for parent in parents for t in range(len(parent.transitions))]
    ends = [words(parent)[: t + 1] for parent in parents for t in range(len(parent.transitions))]
    known = len(states)
    table = table_from_rollouts(parents, size=-(-known // 8) * 8)
    truth = [
        chance.PENALTY * (end[-1] == "down") + (chance.outcome(end) if chance.over(end) else chance.value(end)) - chance.value(said)
        for said, end in zip(states, ends, strict=True)
    ]
    spread = np.array([chance.deviation(said) for said in states])
    for evidence in (separate, pooled):
        value, count = np.asarray(evidence.branch_value), np.asarray(evidence.branch_count)
        assert value.shape == count.shape == (len(table.valid), 2)
        error = np.abs(value[:known, 0] - [chance.value(said) for said in states])
        assert (error <= 4 * spread / np.sqrt(count[:known, 0])).all()
        found = np.asarray(vineppo(table, evidence).value)[:known]
        np.testing.assert_allclose(found, truth, atol=4 * np.sqrt(2) * spread.max() / np.sqrt(40))
        assert np.corrcoef(found, truth)[0, 1] > 0.9
    before = np.asarray(separate.branch_count)[:known, 0], np.asarray(pooled.branch_count)[:known, 0]
    assert (before[0] == 40).all() and (before[1] >= 40).all() and (before[1] > 40).any()
    assert totals["branch_rollouts"] == 40 * known and more == {name: 2 * number for name, number in totals.items()}
    assert totals["branch_diverged"] == totals["branch_failed"] == totals["branch_elsewhere"] == 0


def test_a_tool_that_answers_otherwise_is_elsewhere_or_diverged_and_counted() -> None:
    """The prompt after the first call differs in every other run: half the branches before the second call say nothing."""
    readings = itertools.cycle([0, 1])

    async def agent(task: Any, base_url: str, api_key: str) -> float:
        reading = next(readings)
        messages = [{"role": "user", "content": "Climb."}]
        for k in range(3):
            word = await chance.chat(base_url, api_key, messages)
            told = f"The clock shows {reading}." if k == 0 else "Go on."
            messages += [{"role": "assistant", "content": word}, {"role": "user", "content": told}]
        return 1.0

    with Gateway(ChanceSampler(lambda said: {"up": 0.5, "down": 0.5}), chance.tokenizer()) as gateway:
        runner = Runner(gateway, agent, None)

        def run(requests: Sequence[RolloutRequest], phase: str = "branch") -> list[Rollout]:
            return runner.run(requests, phase="branch", iteration=0, seed=0)

        parents = run(rollout_requests([Task("t", {})], phase="train", iteration=0, samples=1))
        evidence, totals = branch_rollouts(None, None, parents, jax.random.key(0), run=run, per_point=10, pooled=False)
    assert np.asarray(evidence.branch_count).tolist() == [[10, 5], [5, 5], [5, 1]]
    assert (totals["branch_rollouts"], totals["branch_elsewhere"], totals["branch_diverged"]) == (30, 5, 5)


def test_the_first_own_call() -> None:
    parent = walked(("up", "up", "up"), "a")
    assert first_sampled(parent) == 0 and first_sampled(walked(("up", "stop"), "b", parent=parent, turn=1)) == 1
