"""The return model against a loop in float64, what it learns where one call decides, and what it may not know."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import shutil
from typing import Any, get_args

import jax
import numpy as np
import pytest

from lightningrl.checkpoint import Checkpoints
from lightningrl.credit import attention_based, rudder, shapley, spa
from lightningrl.evidence.return_features import call_features, new_tokens, role_bucket
from lightningrl.evidence.return_model import Field, State, init_return_model, predict_returns, return_model
from lightningrl.runtime.store import Store
from lightningrl.types import Rollout, Task, Transition
from tests.batches import by_rollout, make_rollout, make_table

pytestmark = pytest.mark.slow

RECORDED = pathlib.Path(__file__).parents[2] / "notebooks" / "recorded" / "rollouts.sqlite"
FIELDS: tuple[Field, ...] = get_args(Field)
KEY = jax.random.key(0)
SIZE, TURNS, DECIDES, BATCHES = 256, 5, 1, 10
START = init_return_model(jax.random.key(1))
SPA: dict[str, Any] = {"fields": ["predicted_return"], "kind": "spa"}
RUDDER: dict[str, Any] = {"fields": FIELDS, "kind": "rudder"}  # two sorts of model and one shape of batch: little is compiled
produce = functools.partial(return_model, None, coalition_calls=TURNS, prompt_tokens=16, learning_rate=5e-3, multiple=SIZE)


def game(seed: int, count: int = 32) -> list[Rollout]:
    """Runs of two to five calls, each a coin among other words; the coin of call 1 decides: +1 or -1."""
    rng = np.random.default_rng(seed)
    return [played(rng.integers(0, 2, rng.integers(DECIDES + 1, TURNS + 1)).tolist(), f"r{i}", rng) for i in range(count)]


def played(coins: list[int], name: str, rng: np.random.Generator) -> Rollout:
    calls, prompt = [], np.array([1, 2], np.int32)
    for t, coin in enumerate(coins):
        prompt = np.append(prompt, 20 + t).astype(np.int32)
        response = np.array([5 + coin, *rng.integers(30, 50, 2)], np.int32)
        continues = t - 1 if t else None
        calls.append(Transition(prompt, response, np.zeros(3, np.float32), 1.0, 0, ("writer", "checker")[t % 2], t, continues=continues))
        prompt = np.concatenate([prompt, response])
    return Rollout(name, Task("t", {}), "g", 0, 0, tuple(calls), {"reward": 2.0 * coins[DECIDES] - 1.0})


@functools.cache
def learnt(kind: str) -> State:
    """A model after BATCHES batches, none of them seen twice."""
    state = START
    for i in range(BATCHES):
        _, state = produce(state, game(i), jax.random.fold_in(KEY, i), **(RUDDER if kind == "rudder" else SPA))
    return state


def recorded(tmp_path: pathlib.Path) -> list[Rollout]:
    with Store(shutil.copy(RECORDED, tmp_path / "rollouts.sqlite")) as store:
        return store.read("train", 4)


def deciding_share(rollouts: list[Rollout], credit: Any) -> float:
    """How much of all credit, by size, the deciding calls have."""
    size = {name: np.abs(mine) for name, mine in by_rollout(rollouts, np.asarray(credit.value)).items()}
    return float(sum(mine[DECIDES] for mine in size.values()) / sum(mine.sum() for mine in size.values()))


def agreement(rollouts: list[Rollout], credit: Any) -> float:
    """Correlation with the true credit, E[R | calls so far] less what it was a call earlier: all of R at the deciding call."""
    true = np.array([r.reward * (t == DECIDES) for r in rollouts for t in range(len(r.transitions))])
    return float(np.corrcoef(np.asarray(credit.value)[: len(true)], true)[0, 1])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Loop:
    """The model of one rollout, call by call, in float64, from the formulas."""

    def __init__(self, params: Any, rollout: Rollout) -> None:
        self.p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        self.x = [self._input(t, rollout.transitions) for t in rollout.transitions]

    def _input(self, call: Transition, calls: tuple[Transition, ...]) -> np.ndarray:
        skip = 0 if call.continues is None else len(calls[call.continues].prompt_ids) + len(calls[call.continues].response_ids)
        means = [
            np.mean([self.p["token"][i % len(self.p["token"])] for i in ids], 0) for ids in (call.prompt_ids[skip:], call.response_ids)
        ]
        return np.concatenate([*means, self.p["role"][role_bucket(call.role, len(self.p["role"]))]])

    def read(self, name: str, h: np.ndarray) -> float:
        return float(h @ self.p["readout"][name]["weight"] + self.p["readout"][name]["bias"])

    def states(self, turns: list[int]) -> list[np.ndarray]:
        gru, width = self.p["gru"], len(self.p["gru"]["hidden"])
        reset, update, new = (slice(i * width, (i + 1) * width) for i in range(3))
        states = [np.zeros(width)]
        for t in turns:
            h = states[-1]
            i, j = self.x[t] @ gru["inputs"] + gru["bias"], h @ gru["hidden"]
            z = sigmoid(i[update] + j[update])
            states.append(z * h + (1 - z) * np.tanh(i[new] + sigmoid(i[reset] + j[reset]) * j[new]))
        return states

    def after_calls(self, kind: str) -> np.ndarray:
        outputs = [self.read("predicted_return", h) for h in self.states(list(range(len(self.x))))[1:]]
        return np.array(outputs) if kind == "rudder" else np.cumsum(outputs)

    def attention(self) -> np.ndarray:
        p = self.p["attention"]
        e = np.exp([np.tanh(x @ p["keys"] + p["bias"]) @ p["query"] for x in self.x])
        return e / e.sum()

    def coalitions(self) -> list[float]:
        turns = range(len(self.x))
        return [self.read("coalition", self.states([t for t in turns if s >> t & 1])[-1]) for s in range(2 ** len(self.x))]


# Features


def test_what_a_call_is_read_as():
    rollouts = [played([0, 1, 1], "a", np.random.default_rng(0)), played([1, 0], "b", np.random.default_rng(1))]
    calls = call_features(rollouts, buckets=64, roles=8, prompt_tokens=2)
    assert calls.exists.shape == (32, 4) and calls.exists.sum() == 5 and calls.exists[0].tolist() == [True, True, True, False]
    assert calls.outcome[:3].tolist() == [1.0, -1.0, 0.0]
    assert calls.role[0, :3].tolist() == [role_bucket(name, 8) for name in ("writer", "checker", "writer")]
    for r, rollout in enumerate(rollouts):
        for t, transition in enumerate(rollout.transitions):
            new = [2, 20] if t == 0 else [20 + t]  # of the first prompt the last two tokens
            for part, ids in enumerate((new, transition.response_ids.tolist())):
                mine = (calls.place == (r * 4 + t) * 2 + part) & (calls.share > 0)
                assert calls.token[mine].tolist() == ids
                np.testing.assert_allclose(calls.share[mine], 1 / len(ids))
    assert (calls.share > 0).sum() == sum(len(new) + 3 for r in rollouts for new in [[2, 20], *([[0]] * (len(r.transitions) - 1))])
    assert len(calls.token) & (len(calls.token) - 1) == 0


def test_tokens_and_roles_are_put_in_buckets():
    calls = call_features([played([1, 1], "a", np.random.default_rng(0))], buckets=7, roles=2, prompt_tokens=9)
    assert calls.token[:3].tolist() == [1, 2, 20 % 7] and calls.role.max() < 2
    assert role_bucket("writer", 64) == 4  # in every process


def test_recorded_prompts_are_read_from_where_they_go_on(tmp_path):
    rollout = recorded(tmp_path)[0]
    by_turn = {t.turn: t for t in rollout.transitions}
    rewriter = rollout.transitions[2]
    assert rewriter.continues == 0
    first = rollout.transitions[0]
    seen = [*first.prompt_ids, *first.response_ids]
    assert [*seen, *new_tokens(rewriter, by_turn)] == rewriter.prompt_ids.tolist()
    assert new_tokens(rollout.transitions[1], by_turn).tolist() == rollout.transitions[1].prompt_ids.tolist()


# The model


def check_loop(got: Any, wanted: Any) -> None:
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[: len(wanted)], wanted, rtol=2e-4, atol=2e-5)
    assert not got[len(wanted) :].any()


def test_is_that_of_a_loop():
    state, rollouts = learnt("rudder"), game(100)
    evidence, _ = produce(state, rollouts, KEY, **RUDDER)
    loops = [Loop(state["params"], rollout) for rollout in rollouts]
    check_loop(evidence.predicted_return, np.concatenate([loop.after_calls("rudder") for loop in loops]))
    check_loop(evidence.attention, np.concatenate([loop.attention() for loop in loops]))
    assert evidence.coalition.shape == (32, 2**TURNS)
    for got, loop in zip(evidence.coalition, loops[:12], strict=False):
        check_loop(got[: 2 ** len(loop.x)], loop.coalitions())


def test_contributions_are_those_of_a_loop():
    state, rollouts = learnt("spa"), game(100)
    evidence, _ = produce(state, rollouts, KEY, **SPA)
    check_loop(evidence.predicted_return, np.concatenate([Loop(state["params"], rollout).after_calls("spa") for rollout in rollouts]))


def test_calls_beyond_the_last_player_are_in_no_coalition():
    rollouts = [played([1, 0], "a", np.random.default_rng(0)), played([0, 1], "b", np.random.default_rng(1))]
    state, calls = learnt("rudder"), call_features(rollouts, buckets=1024, roles=64, prompt_tokens=16)
    settings: dict[str, Any] = {"fields": ("coalition",), "kind": "rudder"}
    few, all_, more = (predict_returns(state["params"], calls, **settings, coalition_calls=m)["coalition"] for m in (1, 2, 3))
    np.testing.assert_allclose(few, all_[:, :2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(more[:, :4], all_, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(all_[0], Loop(state["params"], rollouts[0]).coalitions(), rtol=2e-4, atol=2e-5)
    assert few.shape == (32, 2) and more.shape == (32, 8) and not more[2:].any()


def test_a_model_that_has_seen_nothing_splits_equally():
    rollouts = game(0, 8)
    evidence, _ = produce(START, rollouts, KEY, **RUDDER)
    table = make_table(*rollouts, size=SIZE)
    assert not evidence.predicted_return.any() and not evidence.coalition.any()
    for assign in (rudder, attention_based):
        np.testing.assert_allclose(assign(table, evidence).value, table.outcome[:, 0] * table.weight, rtol=1e-6)
    for assign in (spa, shapley):
        assert not np.asarray(assign(table, evidence).value).any()


def test_size_of_the_model():
    params = init_return_model(KEY)["params"]
    assert 45_000 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 55_000


# What it learns


def test_rudder_finds_the_call_that_decides():
    rollouts = game(200)
    evidence, _ = produce(learnt("rudder"), rollouts, KEY, **RUDDER)
    table = make_table(*rollouts, size=SIZE)
    credit = rudder(table, evidence)
    assert deciding_share(rollouts, credit) > 0.7  # an equal split: 0.3
    assert agreement(rollouts, credit) > 0.9
    np.testing.assert_allclose(
        [sum(x) for x in by_rollout(rollouts, np.asarray(credit.value)).values()], [r.reward for r in rollouts], rtol=1e-5
    )


def test_spa_finds_the_call_that_decides():
    rollouts = game(200)
    evidence, _ = produce(learnt("spa"), rollouts, KEY, **SPA)
    table = make_table(*rollouts, size=SIZE)
    credit = spa(table, evidence)
    assert deciding_share(rollouts, credit) > 0.7
    assert agreement(rollouts, credit) > 0.9
    # Its credits sum to what the model says of the whole rollout, which is nearly R.
    total = [sum(x) for x in by_rollout(rollouts, np.asarray(credit.value)).values()]
    last = [x[-1] for x in by_rollout(rollouts, evidence.predicted_return).values()]
    np.testing.assert_allclose(total, last, rtol=1e-4, atol=1e-5)
    assert np.mean((np.array(total) - [r.reward for r in rollouts]) ** 2) < 0.05


def test_attention_and_coalitions_find_the_call_that_decides():
    rollouts = game(200)
    evidence, _ = produce(learnt("rudder"), rollouts, KEY, **RUDDER)
    table = make_table(*rollouts, size=SIZE)
    sums = [sum(x) for x in by_rollout(rollouts, evidence.attention).values()]
    np.testing.assert_allclose(sums, 1.0, rtol=1e-5)
    assert deciding_share(rollouts, attention_based(table, evidence)) > 0.8
    credit = shapley(table, evidence)
    assert deciding_share(rollouts, credit) > 0.7
    assert agreement(rollouts, credit) > 0.9
    total = [sum(x) for x in by_rollout(rollouts, np.asarray(credit.value)).values()]
    whole = [evidence.coalition[i, 2 ** len(r.transitions) - 1] - evidence.coalition[i, 0] for i, r in enumerate(rollouts)]
    np.testing.assert_allclose(total, whole, rtol=1e-4, atol=1e-5)


def test_the_loss_falls_on_rollouts_that_were_never_seen():
    _, first = produce(START, game(0), KEY, **RUDDER)
    assert learnt("rudder")["loss"][0] < 0.3 * first["loss"][0]
    assert first["loss"][1] < first["loss"][0]


def test_recorded_rollouts_are_learnt_and_their_outcomes_handed_out(tmp_path):
    rollouts, state, losses = recorded(tmp_path), START, []
    assert len({r.reward for r in rollouts}) > 1
    for _ in range(4):
        evidence, state = produce(state, rollouts, KEY, **RUDDER)
        losses.append(np.asarray(state["loss"]).tolist())
    assert losses[-1][1] < 0.5 * losses[0][0]
    assert [before for before, _ in losses] == sorted((before for before, _ in losses), reverse=True)
    table = make_table(*rollouts, size=SIZE)
    credit = by_rollout(rollouts, np.asarray(rudder(table, evidence).value))
    np.testing.assert_allclose([sum(credit[r.id]) for r in rollouts], [r.reward for r in rollouts], atol=1e-5)
    assert any(np.ptp(mine) > 0.05 for mine in credit.values())
    attention = by_rollout(rollouts, evidence.attention)
    np.testing.assert_allclose([sum(attention[r.id]) for r in rollouts], 1.0, rtol=1e-5)


# What it may not know, and what must not matter


def turned(rollouts: list[Rollout]) -> list[Rollout]:
    """The same calls, ended otherwise."""
    return [dataclasses.replace(r, outcome={"reward": -r.reward}) for r in rollouts]


def test_no_rollout_is_predicted_by_a_model_that_knows_its_end():
    rollouts = game(300)
    for predict, same in (("before", True), ("after", False)):
        one, other = (produce(learnt("rudder"), x, KEY, **RUDDER, predict=predict)[0] for x in (rollouts, turned(rollouts)))
        for name in FIELDS:
            assert np.array_equal(getattr(one, name), getattr(other, name)) == same


def test_the_same_again_to_the_last_bit():
    rollouts = game(300)
    runs = [produce(learnt("rudder"), rollouts, KEY, **RUDDER, predict="after") for _ in range(2)]
    for one, other in zip(*map(jax.tree.leaves, runs), strict=True):
        assert np.array_equal(one, other)


def test_the_key_decides_which_subsets_are_learnt_and_nothing_else():
    for settings, same in ((SPA, True), (RUDDER, False)):
        one, other = (produce(START, game(300), jax.random.key(i), **settings)[1]["params"]["token"] for i in range(2))
        assert np.array_equal(one, other) == same


def test_other_rollouts_and_their_order_do_not_matter():
    state, rollouts = learnt("rudder"), game(300)
    evidence, _ = produce(state, rollouts, KEY, **RUDDER)
    alone, _ = produce(state, rollouts[20:25][::-1], KEY, **RUDDER, multiple=32)
    all_of_them, few = by_rollout(rollouts, evidence.predicted_return), by_rollout(rollouts[20:25][::-1], alone.predicted_return)
    for name, mine in few.items():
        np.testing.assert_allclose(mine, all_of_them[name], rtol=1e-4, atol=1e-5)
    assert len(alone.predicted_return) == 32 and not alone.predicted_return[sum(map(len, few.values())) :].any()


def test_only_what_is_asked_for_is_filled_and_learnt():
    evidence, state = produce(START, game(0), KEY, **SPA)
    assert evidence.predicted_return is not None and evidence.attention is None and evidence.coalition is None
    before, after = ({"/".join(str(k.key) for k in path): x for path, x in jax.tree.leaves_with_path(s["params"])} for s in (START, state))
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert same == {f"attention/{n}" for n in ("bias", "keys", "query")} | {
        f"readout/{readout}/{n}" for readout in ("attention", "coalition") for n in ("bias", "weight")
    }


def test_the_state_keeps_its_structure_and_goes_through_a_checkpoint(tmp_path):
    state = learnt("rudder")
    shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (START, state)]
    assert jax.tree.structure(state) == jax.tree.structure(START) and shapes[0] == shapes[1]
    assert int(state["step"]) == BATCHES * 16
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state, {})
    restored, _ = checkpoints.restore(1, START)
    checkpoints.close()
    for left, right in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert left.dtype == right.dtype and np.array_equal(left, right)


def test_failed_rollouts_are_not_learnt_from_and_an_empty_batch_changes_nothing():
    rollouts = game(0, 8)
    failed = dataclasses.replace(rollouts[0], id="failed", status="failed", outcome={"reward": 9.0})
    (one, left), (other, right) = (produce(START, x, KEY, **RUDDER, predict="after") for x in (rollouts, [failed, *rollouts]))
    assert np.array_equal(one.predicted_return, other.predicted_return) and np.array_equal(left["loss"], right["loss"])
    evidence, state = produce(START, [failed], KEY, **RUDDER, multiple=4)
    assert evidence.predicted_return.tolist() == evidence.attention.tolist() == [0.0] * 4 and not evidence.coalition.any()
    assert state is START


def test_calls_without_tokens_are_calls():
    rollouts = [make_rollout("a", 1.0, [0.0] * 5, lengths=[0, 2, 0, 0, 1]), make_rollout("a", 0.0, [0.0])]
    evidence, state = produce(START, rollouts, KEY, **RUDDER, predict="after")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((evidence, state)))
    np.testing.assert_allclose([evidence.attention[:5].sum(), evidence.attention[5]], 1.0, rtol=1e-6)


def test_coalitions_hold_every_call_of_the_longest_rollout():
    rng = np.random.default_rng(0)

    def coalitions(calls: int) -> Any:
        rollouts = [played([1, 0] * (calls // 2), "long", rng), played([0, 1], "short", rng)]
        made, _ = return_model(None, START, rollouts, KEY, fields=["coalition"], steps=1, prompt_tokens=16)
        return np.asarray(made.coalition)

    assert coalitions(4).shape[1] == 2**6
    of_eight = coalitions(8)
    assert of_eight.shape[1] == 2**8
    with pytest.raises(ValueError, match="a rollout has 12 calls, but coalitions are of 10 at most"):
        coalitions(12)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"fields": ["value"]}, "no field 'value': choose of predicted_return, attention, coalition"),
        ({"kind": "lstm"}, "no kind 'lstm': choose of rudder, spa"),
        ({"predict": "never"}, "no predict 'never': choose of before, after"),
        ({"steps": 0}, "learns in 0 steps"),
        ({"prompt_tokens": 0}, "reads 0 tokens of a prompt"),
        ({"coalition_calls": 11}, "coalitions of 11 calls: choose 1 to 10"),
    ],
)
def test_wrong_settings_get_a_sentence(wrong, sentence):
    with pytest.raises(ValueError) as error:
        return_model(None, START, game(0, 2), KEY, **wrong)
    assert sentence in str(error.value)
