"""Adapters in the train step, and a policy for each role: what moves, what does not, and that roles are trained apart."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np
import optax
import pytest

from lightningrl.errors import UserError
from lightningrl.model.lora import LoraSettings, merge
from lightningrl.packing.rows import pack
from lightningrl.policies import (
    EVERY_ROLE,
    Policies,
    adapter_name,
    as_tree,
    check_roles,
    from_tree,
    load_adapted,
    merged,
    pack_policies,
    save_policies,
    score_policies,
    start_policies,
    update_policies,
    weights,
)
from lightningrl.policy import Policy
from lightningrl.recipes import get_recipe
from lightningrl.sharding import HOST, make_mesh
from lightningrl.train import TrainStep
from tests.small_step import CONFIG, REINFORCE, ROLES, ROWS, advantages, edges_of, params, recorded, table
from tests.tiny import tiny_policy

LORA = LoraSettings(rank=2, alpha=3.0, targets=("qkv", "down"))
EPS = np.finfo(np.float32).eps


@functools.cache
def step(lora: LoraSettings | None = LORA) -> TrainStep:
    # Plain descent with a learning rate of 1: what a parameter moves by is its gradient.
    return TrainStep(CONFIG, REINFORCE, optax.sgd(1.0), make_mesh(), lora=lora)


def updated(policies: Policies, lora: LoraSettings | None = LORA) -> tuple[Policies, Any]:
    whose, batches = pack_policies(policies, recorded(), table(), 1, ROWS, 1)
    return update_policies(step(lora), policies, whose, batches, [edges_of(b, advantages()) for b in batches])


def with_factors(policies: Policies, seed: int = 0) -> Policies:
    """Both factors random, so that neither has a gradient of 0."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jax.device_put(rng.normal(0, 0.3, leaf.shape).astype(np.float32), leaf.sharding)  # noqa: E731
    return {role: dataclasses.replace(state, adapter=jax.tree.map(draw, state.adapter)) for role, state in policies.items()}


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_an_update_moves_the_adapter_by_the_chain_rule_and_nothing_else() -> None:
    """dA = s·G·Bᵀ and dB = s·Aᵀ·G, G what an update of all parameters moves the merged matrix by."""
    start = with_factors(start_policies(step(), params()))
    before, whole = jax.device_get(start[EVERY_ROLE].adapter), merged(step(), start[EVERY_ROLE])
    after = updated(start)[0][EVERY_ROLE]
    dense = updated(start_policies(step(None), whole), None)[0][EVERY_ROLE]
    same(after.params, params())
    for i, pairs in enumerate(before["layers"]):
        for name, pair in pairs.items():
            g = np.asarray(whole["layers"][i][name], np.float64) - np.asarray(dense.params["layers"][i][name], np.float64)
            a, b = (
                pair[k].astype(np.float64).reshape(-1, 2) if k == "a" else pair[k].astype(np.float64).reshape(2, -1) for k in ("a", "b")
            )
            g = g.reshape(len(a), -1)
            moved = {k: pair[k] - np.asarray(after.adapter["layers"][i][name][k]) for k in ("a", "b")}
            for k, expected in (("a", LORA.scale * g @ b.T), ("b", LORA.scale * a.T @ g)):
                assert np.abs(expected).max() > 1e-3
                # Both subtract float32 weights of order 1 to see a gradient.
                np.testing.assert_allclose(moved[k].reshape(expected.shape), expected, rtol=0, atol=256 * EPS)


def test_the_optimizer_keeps_numbers_of_the_adapter_alone() -> None:
    trained = TrainStep(CONFIG, REINFORCE, optax.adam(1e-2), make_mesh(), lora=LORA)
    state = start_policies(trained, params())[EVERY_ROLE]
    adapter = sum(np.size(x) for x in jax.tree.leaves(state.adapter))
    assert sum(np.size(x) for x in jax.tree.leaves(state.opt_state)) == 2 * adapter + 1  # two moments, and a count
    assert adapter < 0.1 * sum(np.size(x) for x in jax.tree.leaves(state.params))
    with pytest.raises(ValueError, match="an adapter is trained by a step that was given its settings"):
        trained.init(params())


@pytest.mark.slow
def test_an_update_consumes_the_adapter_and_not_the_base() -> None:
    start = start_policies(step(), params())[EVERY_ROLE]
    after = updated({EVERY_ROLE: start})[0][EVERY_ROLE]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start.adapter))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((start.params, after)))


@pytest.mark.slow
def test_a_role_is_trained_as_if_it_were_alone() -> None:
    """Bit for bit the update of one adapter on the calls of that role, whatever the other role does."""
    policies = with_factors(start_policies(step(), params(), ROLES))
    alone = {}
    for role in ROLES:
        flat = [t for r in recorded() for t in r.transitions]
        index = [i for i, t in enumerate(flat) if t.role == role]
        packed = pack([flat[i] for i in index], index, ROWS)
        state = jax.tree.map(jax.numpy.copy, policies[role])
        alone[role], _ = step().update(state, packed.rows, edges_of(packed, advantages()))
    after, metrics = updated(policies)
    for role in ROLES:
        same(after[role].adapter, alone[role].adapter)
    assert not np.array_equal(after["reader"].adapter["layers"][0]["down"]["b"], after["writer"].adapter["layers"][0]["down"]["b"])
    assert {"loss/reader", "loss/writer", "grad_norm/reader", "grad_norm/writer"} <= metrics.keys() and "loss" not in metrics


def test_every_call_is_scored_by_its_own_policy() -> None:
    policies = with_factors(start_policies(step(), params(), ROLES))
    whose, batches = pack_policies(policies, recorded(), table(), 2, ROWS, 1)
    scored, scores = score_policies(step(), policies, params(), whose, batches)
    roles = np.array([t.role for r in recorded() for t in r.transitions])
    seen: list[int] = []
    for role, batch, s in zip(whose, scored, scores, strict=True):
        mask, transition = np.asarray(batch.edges.mask), np.asarray(batch.edges.transition)
        assert set(roles[transition[mask]]) == {role}
        seen += sorted(set(transition[mask].tolist()))
        same(s.logp, step().score(step().weights(policies[role]), batch.rows, batch.edges).logp)
        same(batch.edges.ref_logp, step().score(params(), batch.rows, batch.edges).logp)  # every role's reference is the base
        assert np.abs(np.asarray(s.logp - batch.edges.ref_logp))[mask].max() > 0.1
    assert sorted(seen) == list(range(len(roles)))


def test_roles_start_as_the_base_with_factors_of_their_own() -> None:
    policies = start_policies(step(), params(), ROLES, seed=5)
    for role_weights in weights(step(), policies, HOST).values():
        same(role_weights, params())
    a, b = (policies[role].adapter["layers"][0]["qkv"]["a"] for role in ROLES)
    assert not np.array_equal(a, b)
    same(a, start_policies(step(), params(), ROLES, seed=5)["reader"].adapter["layers"][0]["qkv"]["a"])


@pytest.mark.parametrize("roles", [(), ROLES])
def test_a_checkpoint_has_no_base_and_gives_the_policies_back(roles: tuple[str, ...]) -> None:
    policies = with_factors(start_policies(step(), params(), roles))
    tree = as_tree(policies)
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
    assert names and not any("embedding" in name for name in names)
    again = from_tree(start_policies(step(), params(), roles), tree)
    same(again, policies)


# ---- files


@pytest.mark.slow
@pytest.mark.parametrize("roles", [(), ROLES])
def test_adapters_are_saved_apart_and_merge_into_their_base_alone(tmp_path: pathlib.Path, roles: tuple[str, ...]) -> None:
    start = tiny_policy()
    trained = TrainStep(start.config, REINFORCE, optax.sgd(1.0), make_mesh(), lora=LORA)
    policies = with_factors(start_policies(trained, start.params, roles))
    saved = save_policies(tmp_path / "policy", start, trained, policies)
    save_policies(tmp_path / "start", start, TrainStep(start.config, REINFORCE, optax.sgd(1.0), make_mesh()), {})
    assert sorted(p.name for p in (tmp_path / "policy").glob("*.safetensors")) == sorted(
        [*map(adapter_name, policies), "model.safetensors"]
    )
    if roles:
        same(saved.params, start.params)
    for role, state in policies.items():
        loaded = load_adapted(tmp_path / "start", tmp_path / "policy" / adapter_name(role))
        same(loaded.params, merge(start.params, state.adapter, LORA.scale))
        # Compiled as a whole, the same sums may round otherwise in the last place.
        for x, y in zip(jax.tree.leaves(merged(trained, state)), jax.tree.leaves(loaded.params), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=4 * EPS)
    save_policies(tmp_path / "other", dataclasses.replace(start, params=tiny_policy(1).params), trained, {})
    with pytest.raises(UserError, match="was trained on another base .hash .{12}, not .{12}.: give the one of its run, OUT/start"):
        load_adapted(tmp_path / "other", tmp_path / "policy" / adapter_name(next(iter(policies))))


def test_a_file_that_is_no_adapter(tmp_path: pathlib.Path) -> None:
    start: Policy = tiny_policy()
    whole = TrainStep(start.config, REINFORCE, optax.sgd(1.0), make_mesh())
    save_policies(tmp_path, start, whole, {})
    with pytest.raises(UserError, match="is no adapter of ours: its header has no entry lightningrl_lora"):
        load_adapted(tmp_path, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="nothing.safetensors cannot be read as an adapter"):
        load_adapted(tmp_path, tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("roles", "recipe", "sentence"),
    [
        ((), "lightningrl", "lora_per_role needs the roles that get an adapter: name them in --train_roles=writer,rewriter"),
        (("a/b",), "lightningrl", "the role 'a/b' cannot name the file of its adapter: use letters, digits, '_', '.' and '-'"),
        (("a",), "hcapo", "recipe hcapo asks one policy for hindsight_logp, but lora_per_role has one for each role: leave it off"),
    ],
)
def test_roles_that_cannot_have_a_policy_each(roles: tuple[str, ...], recipe: str, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        check_roles(roles, get_recipe(recipe))
    assert str(refused.value) == sentence
