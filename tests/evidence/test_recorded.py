"""What the other tests here do not run on recorded rollouts: agents run again, roles, judges, potentials and critics, on text-to-SQL.

The agent is LangGraph's and its databases are SQLite files, as when the rollouts were recorded. Of the policy there are only
its answers: a prompt that was recorded is answered in one of the ways in which it was.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.agents import sql_langgraph
from experiments.text_to_sql import reward
from lightningrl.evidence.branches import branch_rollouts
from lightningrl.evidence.critic import turn_values
from lightningrl.evidence.greedy import greedy_rewards
from lightningrl.evidence.judges import judge_rollouts, potentials
from lightningrl.evidence.role_baseline import role_baselines
from lightningrl.gateway import Gateway, SamplingOverrides
from lightningrl.model import decoder
from lightningrl.packing.rows import pack
from lightningrl.recipes import get_recipe
from lightningrl.runtime import Runner
from lightningrl.sharding import make_mesh
from lightningrl.tabulate import table_from_rollouts
from lightningrl.tasks.text_to_sql.databases import build_databases
from lightningrl.tasks.text_to_sql.demonstrations import run_as_text
from lightningrl.train import TrainStep
from lightningrl.types import Completion, Rollout, SamplingParams
from tests.evidence.test_scorer import CONFIG, ROWS, recorded, tokenizer, weights

pytestmark = pytest.mark.slow
RunMore = Callable[..., list[Rollout]]


class Parrot:
    """Answers a recorded prompt as it was answered, in one of several ways by the key, greedily the first; any other with a query."""

    context_length, queue_length = 4096, 0

    def __init__(self, rollouts: list[Rollout]) -> None:
        self.ways: dict[bytes, list[Any]] = defaultdict(list)
        self.otherwise = [rollouts[0].transitions[0]]
        self.version = rollouts[0].transitions[0].policy_version  # what another policy samples is no sample of this one's states
        for t in (t for r in rollouts for t in r.transitions):
            self.ways[np.asarray(t.prompt_ids, np.int32).tobytes()].append(t)

    def submit(self, prompt_ids: np.ndarray, params: SamplingParams, key: tuple[int, int], on_tokens: Any = None) -> Future[Completion]:
        ways = self.ways.get(np.asarray(prompt_ids, np.int32).tobytes(), self.otherwise)
        said = ways[key[0] % len(ways) if params.temperature else 0]
        future: Future[Completion] = Future()
        future.set_result(Completion(said.response_ids, said.logprobs, "stop", self.version, said.text))
        return future


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> list[Rollout]:
    """The recorded ones, about databases that were made again as they were."""
    folder = tmp_path_factory.mktemp("databases")
    paths = {path.name: str(path) for path in build_databases(folder, 0, 3)}

    def here(r: Rollout) -> Rollout:
        database = paths[Path(r.task.input["database"]).name]
        return dataclasses.replace(r, task=dataclasses.replace(r.task, input={**r.task.input, "database": database}))

    return [here(r) for r in recorded()]


@pytest.fixture(scope="module")
def run_more(rollouts: list[Rollout]) -> Iterator[RunMore]:
    with Gateway(Parrot(rollouts), tokenizer()) as gateway:
        runner = Runner(gateway, functools.partial(sql_langgraph.answer, execute=run_as_text), reward)

        def run(requests: Any, *, phase: str, temperature: float | None = None) -> list[Rollout]:
            sampling = SamplingOverrides(temperature=1.0 if temperature is None else temperature, top_p=1.0, top_k=0, max_tokens=64)
            return runner.run(requests, phase=phase, iteration=4, seed=0, sampling=sampling)

        yield run


def test_branches_go_on_from_every_recorded_call(rollouts: list[Rollout], run_more: RunMore) -> None:
    made: list[Rollout] = []

    def run(requests: Any, **how: Any) -> list[Rollout]:
        made.extend(run_more(requests, **how))
        return made

    evidence, aux = branch_rollouts(None, {}, rollouts, jax.random.key(0), run=run, per_point=3)
    calls = sum(len(r.transitions) for r in rollouts)
    assert aux["branch_rollouts"] == len(made) == 3 * calls and aux["branch_diverged"] == aux["branch_failed"] == 0
    ids = {r.id: r for r in rollouts}
    for branch in made:
        parent, turn = ids[str(branch.parent)], int(branch.metrics["replayed_calls"])
        for a, b in zip(branch.transitions[:turn], parent.transitions[:turn], strict=True):
            np.testing.assert_array_equal(a.prompt_ids, b.prompt_ids)
            np.testing.assert_array_equal(a.response_ids, b.response_ids)
        assert branch.reward == reward(dict(branch.task.input), branch.task.target, branch.answer)
    assert {r.reward for r in made} == {0.0, 1.0}
    # Values by hand: of all that sampled on from a state, but the rollout itself.
    gains: dict[Any, list[tuple[str, float]]] = defaultdict(list)
    for r in [*rollouts, *made]:
        for t in r.transitions[int(r.metrics.get("replayed_calls", 0)) :]:
            gains[state(r, t.turn)].append((r.id, r.reward))
    expected = [mean_of_others(gains[state(r, t.turn)], r.id) for r in rollouts for t in r.transitions]
    np.testing.assert_allclose(evidence.branch_value[:calls, 0], expected, rtol=1e-6)
    assert (np.asarray(evidence.branch_count)[:calls, 0] >= 3).all()


def state(r: Rollout, turn: int) -> Any:
    """All that was said before a call, in words, and who is asked."""
    t = r.transitions[turn]
    return r.group, tuple(u.text for u in r.transitions[:turn]), t.role, np.asarray(t.prompt_ids).tobytes()


def mean_of_others(gains: list[tuple[str, float]], id_: str) -> float:
    return float(np.mean([gain for who, gain in gains if who != id_]))


def test_a_greedy_rollout_of_every_recorded_task(rollouts: list[Rollout], run_more: RunMore) -> None:
    evidence, aux = greedy_rewards(None, {}, rollouts, jax.random.key(0), run=run_more)
    assert aux == {"greedy_rollouts": 3.0, "greedy_failed": 0.0}
    # Greedily the parrot says what the first rollout of the group said first, and the first that was said to that.
    first: dict[bytes, str] = {}
    for t in (t for r in rollouts for t in r.transitions):
        first.setdefault(np.asarray(t.prompt_ids, np.int32).tobytes(), t.text)
    followed = {
        r.group: r.reward for r in rollouts if all(first[np.asarray(t.prompt_ids, np.int32).tobytes()] == t.text for t in r.transitions)
    }
    assert len(followed) == 3
    expected = [followed[r.group] for r in rollouts for _ in r.transitions]
    np.testing.assert_array_equal(np.asarray(evidence.greedy_reward)[: len(expected)], expected)


def test_roles_are_compared_with_their_own_means(rollouts: list[Rollout]) -> None:
    before = {"writer": 0.25, "checker": 0.5}
    evidence, after = role_baselines(None, before, rollouts, jax.random.key(0), decay=0.9)
    calls = [(r, t) for r in rollouts for t in r.transitions]
    np.testing.assert_array_equal(np.asarray(evidence.role_baseline)[: len(calls)], [before.get(t.role, 0.0) for _, t in calls])
    assert {t.role for _, t in calls} == {"writer", "checker", "rewriter"} == set(after)
    for role in after:
        acted = [r.reward for r in rollouts if role in {t.role for t in r.transitions}]
        kept = 0.9 ** len(acted)
        np.testing.assert_allclose(after[role], kept * before.get(role, 0.0) + (1 - kept) * np.mean(acted), rtol=1e-5)


def test_a_judge_of_every_call_and_a_potential_of_every_state(rollouts: list[Rollout]) -> None:
    """A scripted judge: a draft is worth its execution match, a verdict whether it is true."""
    matches = lambda r, sql: reward(dict(r.task.input), r.task.target, sql)  # noqa: E731

    def of_calls(r: Rollout) -> list[float]:
        scores, draft = [], ""
        for t in r.transitions:
            draft = t.text if t.role != "checker" else draft
            right = matches(r, draft)
            scores.append(float(("INCORRECT" in t.text) != bool(right)) if t.role == "checker" else right)
        return scores

    evidence, aux = judge_rollouts(None, None, rollouts, jax.random.key(0), judge=lambda group: [of_calls(r) for r in group])
    expected = [score for r in rollouts for score in of_calls(r)]
    np.testing.assert_array_equal(np.asarray(evidence.judge)[: len(expected)], expected)
    assert aux == {"judge_groups": 3.0, "judge_abstained": 0.0} and set(expected) == {0.0, 1.0}

    drafts_match = lambda r: [0.0, *np.maximum.accumulate([matches(r, t.text) for t in r.transitions])]  # noqa: E731
    shaped, _ = potentials(None, None, rollouts, jax.random.key(0), potential=drafts_match)
    phi = [drafts_match(r) for r in rollouts]
    np.testing.assert_array_equal(shaped.potential[: len(expected)], [pair for p in phi for pair in zip(p, p[1:], strict=False)])


def test_critics_value_recorded_states_as_one_row_does(rollouts: list[Rollout]) -> None:
    """The turn critic reads the last token of a prompt, the token critic every token before the one that it values."""
    params = {**weights(), "value_head": jnp.asarray(np.random.default_rng(1).normal(size=CONFIG.hidden_size), jnp.float32)}
    step = TrainStep(dataclasses.replace(CONFIG, value_head=True), get_recipe("ppo"), optax.sgd(1.0), make_mesh())
    calls = [t for r in rollouts for t in r.transitions]
    packed = pack(calls, range(len(calls)), ROWS, multiple=1)
    scores = step.score(params, packed.rows, packed.edges)
    table = table_from_rollouts(rollouts, size=128)

    @jax.jit
    def row_values(tokens: Any, end: Any) -> Any:
        return decoder.values(params, decoder.forward(params, CONFIG, tokens, jnp.arange(128)[None], end))[0]

    of_calls, of_tokens = [], {}
    for n, t in enumerate(calls):
        ids, end = np.zeros((1, 128), np.int32), np.zeros((1, 128), np.int32)
        whole = np.concatenate([t.prompt_ids, t.response_ids])
        ids[0, : len(whole)], end[0, : len(whole)] = whole, len(whole)
        values = np.asarray(row_values(ids, end))[len(t.prompt_ids) - 1 :]
        of_calls.append(values[0])
        of_tokens |= {(n, k): values[k] for k in range(len(t.response_ids))}
    edges = jax.tree.map(np.asarray, packed.edges)
    np.testing.assert_allclose(turn_values(table, packed.edges, scores.value)[: len(calls)], of_calls, rtol=1e-4, atol=1e-4)
    masked = list(zip(*np.nonzero(edges.mask), strict=True))
    at = [of_tokens[int(edges.transition[e]), int(edges.k[e])] for e in masked]
    np.testing.assert_allclose([np.asarray(scores.value)[e] for e in masked], at, rtol=1e-4, atol=1e-4)
    assert np.std(of_calls) > 0.1 and len(masked) == len(of_tokens)
