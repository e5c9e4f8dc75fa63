"""The train step: how a batch is cut, over micro-batches or devices, changes nothing but rounding; nothing is compiled twice."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lightningrl import losses
from lightningrl.batches import edge_batches, pack_updates
from lightningrl.evidence.critic import turn_values
from lightningrl.loop import assign
from lightningrl.model import decoder
from lightningrl.packing.rows import PackedBatch, RowSettings, pack
from lightningrl.recipe import Recipe
from lightningrl.recipes import get_recipe
from lightningrl.sharding import batch_multiple, make_mesh
from lightningrl.table import Evidence
from lightningrl.tabulate import table_from_rollouts
from lightningrl.train import EdgeBatch, OptimizerSettings, Scores, TrainState, TrainStep, make_optimizer
from lightningrl.types import Transition
from lightningrl.warm_start import ImitationSettings, imitate
from tests.conversations import rollouts
from tests.tiny import tiny_policy

LIGHTNINGRL, PPO = get_recipe("lightningrl"), get_recipe("ppo")
SMALL, LARGE = RowSettings((16, 32), 64, 32), RowSettings((16, 32), 256, 128)
ONE_ROW_LENGTH = RowSettings((64,), 256, 256)
# Plain gradient descent shows rounding as rounding. Adam's first step is the sign of the gradient, and a gradient that is 0 but
# for rounding has no sign.
DESCENT = optax.sgd(1.0)
GENTLE = optax.sgd(0.01)
EPS = np.finfo(np.float32).eps


def close(result: Any, expected: Any) -> None:
    """Equal up to float32 rounding of sums in another order, relative to the largest value of an array."""
    a, b = np.asarray(result), np.asarray(expected)
    np.testing.assert_allclose(a, b, rtol=0, atol=128 * EPS * max(np.abs(b).max(), 1e-3))


@functools.cache
def step_of(recipe: Recipe, optimizer: optax.GradientTransformation = DESCENT, value_head: bool = False) -> TrainStep:
    return TrainStep(tiny_policy(value_head=value_head).config, recipe, optimizer, make_mesh())


def packed_in(settings: RowSettings, seed: int = 3, multiple: int = 1) -> tuple[PackedBatch, Any]:
    made = rollouts(seed)
    table = table_from_rollouts(made, size=32)
    flat = [t for r in made for t in r.transitions]
    return pack(flat, range(len(flat)), settings, multiple=multiple), table


def edges_of(packed: PackedBatch, table: Any, step: TrainStep, params: Any) -> EdgeBatch:
    """Through the recipe's stages, as the loop does."""
    scores = step.score(params, packed.rows, packed.edges)
    edges = dataclasses.replace(packed.edges, old_logp=scores.logp, ref_logp=packed.edges.behaviour_logp)
    evidence = Evidence(value=turn_values(table, edges, scores.value))
    advantage, value_target = assign(step.recipe, table, evidence)
    return edge_batches(step.recipe, table, [edges], [scores], advantage, value_target, evidence)[0]


def updated(step: TrainStep, params: Any, settings: RowSettings, multiple: int = 1) -> tuple[TrainState, dict[str, Any]]:
    packed, table = packed_in(settings, multiple=multiple)
    return step.update(step.init(params), packed.rows, edges_of(packed, table, step, params))


def test_a_spread_takes_its_statistics_from_all_updates_of_an_iteration() -> None:
    """REINFORCE++ whitens over the whole batch: alone, a group of equal rewards would be all zeros."""
    recipe = get_recipe("reinforce_pp")
    made = [dataclasses.replace(r, outcome={"reward": float(r.group == "g1")}) for r in rollouts()]
    table = table_from_rollouts(made, size=32)
    advantage, target = assign(recipe, table, Evidence())
    for_edges = {}
    for updates in (1, 2):
        parts = [b.edges for b in pack_updates(made, table, updates, SMALL, 1)]
        scores = [Scores(*(jnp.zeros(p.mask.shape) for _ in range(4))) for p in parts]
        batches = edge_batches(recipe, table, parts, scores, advantage, target, Evidence())
        assert len(batches) == updates and [b.advantage.shape for b in batches] == [p.mask.shape for p in parts]
        for_edges[updates] = {
            (int(b.tokens.transition[at]), int(b.tokens.k[at])): float(b.advantage[at])
            for b in batches
            for at in zip(*np.nonzero(np.asarray(b.tokens.mask)), strict=True)
        }
    assert for_edges[1] == pytest.approx(for_edges[2], rel=1e-6)  # float32 sums in another order
    assert {x > 0 for x in for_edges[1].values()} == {True, False}


@pytest.mark.slow
def test_micro_batches_change_nothing() -> None:
    step, params = step_of(LIGHTNINGRL), tiny_policy().params
    many, metrics = updated(step, params, SMALL)
    few, expected = updated(step, params, LARGE)
    assert len(packed_in(SMALL)[0].rows) > 2 * len(packed_in(LARGE)[0].rows)
    jax.tree.map(close, many.params, few.params)
    for name in expected:
        close(metrics[name], expected[name])
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), few.params, params)
    assert max(jax.tree.leaves(moved)) > 1e-3  # far more than what `close` lets pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fraction", "settings"),
    [
        ("clip_cov", "cov_clip_fraction", {"fraction": 0.2, "cov_low": -10.0, "cov_high": 10.0}),
        ("kl_cov", "cov_kl_fraction", {"fraction": 0.2}),
        ("m2po", "dropped_fraction", {"threshold": 0.3}),
    ],
)
def test_a_loss_of_batch_scope_selects_from_the_whole_batch(name: str, fraction: str, settings: dict[str, float]) -> None:
    """However the batch is cut: some of it and not all."""
    recipe, params = get_recipe(name), tiny_policy().params
    assert recipe.select is not None
    recipe = dataclasses.replace(recipe, select=functools.partial(recipe.select, **settings))
    many, metrics = updated(step_of(recipe), params, SMALL)
    few, expected = updated(step_of(recipe), params, LARGE)
    jax.tree.map(close, many.params, few.params)
    for metric in expected:
        close(metrics[metric], expected[metric])
    assert 0.05 < float(metrics[fraction]) < 0.95


@pytest.mark.slow
def test_the_state_is_consumed_and_what_it_was_made_from_is_not() -> None:
    step, params = step_of(LIGHTNINGRL), tiny_policy().params
    packed, table = packed_in(LARGE)
    state = step.init(params)
    after, _ = step.update(state, packed.rows, edges_of(packed, table, step, params))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, params)))
    assert int(after.step) == 1


def test_an_update_of_nothing_is_refused() -> None:
    step = step_of(LIGHTNINGRL)
    packed, table = packed_in(LARGE)
    with pytest.raises(ValueError, match="at least one micro-batch"):
        step.update(step.init(tiny_policy().params), (), edges_of(packed, table, step, tiny_policy().params))


def more_of(packed: PackedBatch, edges: EdgeBatch, number: int) -> tuple[list[Any], EdgeBatch]:
    """A batch of so many micro-batches, each the first of another batch again."""
    return [packed.rows[0]] * number, jax.tree.map(lambda x: np.repeat(np.asarray(x)[:1], number, axis=0), edges)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), [("lightningrl", {}), ("kl_cov", {"fraction": 0.2})])
def test_the_number_of_programs_grows_with_the_logarithm_of_micro_batches(name: str, settings: dict[str, Any]) -> None:
    recipe = get_recipe(name)
    recipe = recipe if recipe.select is None else dataclasses.replace(recipe, select=functools.partial(recipe.select, **settings))
    step, params = TrainStep(tiny_policy().config, recipe, GENTLE, make_mesh()), tiny_policy().params
    packed, table = packed_in(ONE_ROW_LENGTH)
    made = edges_of(packed, table, step_of(recipe), params)  # another step: only updates are counted
    counted, losses_of = {}, {}
    for number in (5, 6, 7, 8, 9):
        state = step.init(params)
        _, metrics = step.update(state, *more_of(packed, made, number))
        counted[number], losses_of[number] = step.compiled, float(metrics["loss"])
    of_whole_batches = 1 if recipe.select is None else 2  # denominators, and selection, for which edges are scored first
    # Beside them gradients and the optimizer, and scores where they are needed.
    assert counted[5] == counted[6] == counted[7] == counted[8] == (3 if recipe.select is None else 5)
    assert counted[9] == counted[8] + of_whole_batches
    if recipe.select is None:  # equal micro-batches, each divided by the denominator of all: zeros that fill up count for nothing
        np.testing.assert_allclose(list(losses_of.values()), losses_of[8], rtol=16 * EPS)


@pytest.mark.slow
def test_one_program_for_each_shape_of_a_micro_batch() -> None:
    """The objective is traced once for shapes and once for each shape of a micro-batch; other data, and more of it, compiles nothing."""
    traced = []

    def loss(inputs: Any) -> Any:
        traced.append(inputs.logp.shape)
        return losses.ppo_clip(inputs, clip_low=0.2, clip_high=0.2)

    step = step_of(dataclasses.replace(LIGHTNINGRL, loss=loss))
    params = tiny_policy().params
    batches = [packed_in(SMALL, seed) for seed in (3, 4, 5)]
    made = [edges_of(packed, table, step, params) for packed, table in batches]
    assert {r.tokens.shape for packed, _ in batches for r in packed.rows} == {(2, 16), (2, 32), (1, 32)}
    state = step.init(params)
    state, _ = step.update(state, batches[0][0].rows, made[0])
    assert len(traced) == 1 + 3

    compiled = []
    listener = lambda event, *_, **__: compiled.append(event) if "compile" in event else None  # noqa: E731
    state, _ = step.update(state, batches[0][0].rows, made[0])  # its state came out of an update, no longer out of init
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        state, _ = step.update(state, batches[0][0].rows, made[0])
        assert compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    for (packed, _), edges in zip(batches, made, strict=True):
        state, _ = step.update(state, packed.rows, edges)
    assert len(traced) == 1 + 3


def test_scores_are_the_old_logprobs_of_the_update() -> None:
    """At the weights that were scored every ratio is 1, so nothing is clipped: but for rounding, as gradients are another program."""
    _, metrics = updated(step_of(LIGHTNINGRL), tiny_policy().params, LARGE)
    close(metrics["ratio_mean"], 1.0)
    close(metrics["ratio_squared_mean"], 1.0)
    assert float(metrics["clip_fraction_high"]) == float(metrics["clip_fraction_low"]) == 0.0
    step, params = step_of(LIGHTNINGRL), tiny_policy().params
    packed, _ = packed_in(LARGE)
    first, again = (step.score(params, packed.rows, packed.edges) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.slow
def test_scores_are_those_of_one_distribution() -> None:
    """Against the logits themselves, in float64."""
    policy = tiny_policy()
    packed, _ = packed_in(LARGE)
    scores = step_of(LIGHTNINGRL).score(policy.params, packed.rows, packed.edges)
    rows, edges = packed.rows[0], jax.tree.map(lambda x: np.asarray(x)[0], packed.edges)
    hidden = decoder.forward(policy.params, policy.config, rows.tokens, rows.positions, rows.end)
    logits = np.asarray(decoder.logits(policy.params, policy.config, hidden.reshape(-1, hidden.shape[-1])), np.float64)
    tempered = logits[edges.node] / np.asarray(edges.temperature, np.float64)[:, None]
    p = np.exp(tempered - tempered.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    chosen = p[np.arange(len(edges.token)), edges.token]
    for name, expected in {"logp": np.log(chosen), "entropy": -(p * np.log(p)).sum(-1), "sum_pi2": (p**2).sum(-1)}.items():
        # Sums of a few hundred float32 terms, relative to numbers of order 1.
        np.testing.assert_allclose(np.asarray(getattr(scores, name))[0][edges.mask], expected[edges.mask], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "token_ppo"])
def test_a_critic_is_trained(name: str) -> None:
    step, params = step_of(get_recipe(name), GENTLE, value_head=True), tiny_policy(value_head=True).params
    state, metrics = updated(step, params, ONE_ROW_LENGTH)
    assert all(np.isfinite(float(value)) for value in metrics.values())
    assert float(metrics["value_loss"]) > 0
    packed, table = packed_in(ONE_ROW_LENGTH)
    before = edges_of(packed, table, step, params)
    states = np.asarray(packed.edges.mask & ((packed.edges.k == 0) | (name == "token_ppo")))
    after = np.asarray(step.score(state.params, packed.rows, packed.edges).value)[states]
    target = np.asarray(before.value_target)[states]
    assert np.mean((after - target) ** 2) < np.mean(target**2)


@pytest.mark.slow
def test_a_kl_term_pulls_towards_the_reference() -> None:
    kl = dataclasses.replace(LIGHTNINGRL, name="kl", kl=losses.k3, kl_coef=1.0)
    step, params = step_of(kl, GENTLE), tiny_policy().params
    packed, table = packed_in(ONE_ROW_LENGTH)
    made = edges_of(packed, table, step, params)
    made = dataclasses.replace(made, advantage=jnp.zeros_like(made.advantage))
    reference = step.score(tiny_policy(1).params, packed.rows, packed.edges).logp
    made = dataclasses.replace(made, tokens=dataclasses.replace(made.tokens, ref_logp=reference))
    state, first = step.update(step.init(params), packed.rows, made)
    _, second = step.update(state, packed.rows, made)
    assert 0 < float(second["kl"]) < float(first["kl"])
    same = dataclasses.replace(made, tokens=dataclasses.replace(made.tokens, ref_logp=made.tokens.old_logp))
    _, metrics = step.update(step.init(params), packed.rows, same)
    assert float(metrics["kl"]) < EPS


@pytest.mark.slow
def test_the_learning_rate_follows_its_schedule_and_matrices_only_decay() -> None:
    params = {"matrix": jnp.ones((2, 2)), "norm": jnp.ones(2)}
    nothing = jax.tree.map(jnp.zeros_like, params)
    optimizer = make_optimizer(OptimizerSettings(learning_rate=0.5, warmup_steps=1, weight_decay=0.1))
    state, shrunk = optimizer.init(params), []
    for _ in range(3):
        updates, state = optimizer.update(nothing, state, params)
        np.testing.assert_array_equal(updates["norm"], np.zeros(2))
        shrunk.append(float(updates["matrix"][0, 0]))
    np.testing.assert_allclose(shrunk, [-0.025, -0.05, -0.05], rtol=4 * EPS)


def demonstrations() -> list[list[Transition]]:
    return [[dataclasses.replace(t, temperature=1.0) for t in r.transitions] for r in rollouts()]


@pytest.mark.slow
def test_imitation_lowers_the_loss_and_repeats_to_the_last_bit() -> None:
    policy = tiny_policy()

    def run() -> tuple[Any, list[float]]:
        seen: list[float] = []
        settings = ImitationSettings(steps=25, learning_rate=1e-2, tokens_per_step=200)
        on_step = lambda step, loss: seen.append(loss)  # noqa: E731
        params = imitate(policy.params, policy.config, demonstrations(), settings, ONE_ROW_LENGTH, make_mesh(), 0, on_step)
        return params, seen

    (params, seen), (again, seen_again) = run(), run()
    assert len(seen) == 25
    assert np.mean(seen[-5:]) < 0.5 * seen[0]
    assert seen == seen_again
    jax.tree.map(np.testing.assert_array_equal, params, again)


SHARDED = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from lightningrl.sharding import make_mesh
from lightningrl.train import TrainStep
from tests import test_train as t

step = TrainStep(t.tiny_policy(value_head=True).config, t.PPO, t.DESCENT, make_mesh(data=2, fsdp=2, tensor=2))
state, metrics = t.updated(step, t.tiny_policy(value_head=True).params, t.ONE_ROW_LENGTH, multiple=t.batch_multiple(step.mesh))
embedding = state.params["embedding"].sharding
assert len(embedding.device_set) == 8 and not embedding.is_fully_replicated, embedding
leaves = {f"p{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state.params))}
np.savez(sys.argv[1], **leaves, **{"m_" + name: np.asarray(value) for name, value in metrics.items()})
"""


@pytest.mark.slow
def test_eight_devices_do_what_one_does(tmp_path: pathlib.Path) -> None:
    assert batch_multiple(make_mesh()) == 1
    path = tmp_path / "sharded.npz"
    root = pathlib.Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", SHARDED, str(path)], cwd=root, check=True, timeout=300)
    state, metrics = updated(step_of(PPO, value_head=True), tiny_policy(value_head=True).params, ONE_ROW_LENGTH)
    with np.load(path) as sharded:
        for i, leaf in enumerate(jax.tree.leaves(state.params)):
            close(sharded[f"p{i}"], leaf)
        for name, value in metrics.items():
            close(sharded[f"m_{name}"], value)
