"""What has to hold on eight devices. Not collected by itself: `test_sharding.py` runs it in a process that forces so many."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lightningrl import scaling
from lightningrl.config import FitConfig
from lightningrl.model.attention import choose_attention
from lightningrl.model.config import ModelConfig
from lightningrl.model.lora import LoraSettings, adapter_sharding
from lightningrl.model.params import init_params, shapes
from lightningrl.packing.rows import Rows, RowSettings
from lightningrl.policies import pack_policies, start_policies, update_policies, weights
from lightningrl.policy import save_policy
from lightningrl.sampler.engine import PolicySampler, SamplerSettings
from lightningrl.sharding import (
    HOST,
    ShardingRules,
    batch_multiple,
    cache_sharding,
    edges_sharding,
    gathered,
    make_mesh,
    optimizer_sharding,
    params_sharding,
    place,
    replicated,
)
from lightningrl.start import starting_policy
from lightningrl.train import OptimizerSettings, TrainState, TrainStep, make_optimizer
from lightningrl.types import Completion, SamplingParams
from lightningrl.warm_start import _edges_of
from tests import small_step as small
from tests import test_train as one
from tests.tiny import tiny_policy

SHAPE = ModelConfig(
    vocab_size=256, hidden_size=64, num_layers=1, num_heads=8, num_kv_heads=4, head_dim=8, intermediate_size=128, max_positions=64
)
SGD = optax.sgd(1.0, momentum=0.9)
ADAM = make_optimizer(OptimizerSettings())
FOUR = ((1, 4, 1), (1, 2, 2), (1, 1, 4))  # fsdp × tensor = 4


@pytest.fixture(scope="module", autouse=True)
def eight_devices() -> None:
    assert jax.device_count() == 8


def updated(shape: tuple[int, int, int]) -> tuple[TrainState, dict[str, Any]]:
    """After a step of plain descent at rate 1: what the parameters lost is their gradient."""
    policy = tiny_policy(value_head=True)
    step = TrainStep(policy.config, one.PPO, one.DESCENT, make_mesh(*shape))
    return one.updated(step, policy.params, one.ONE_ROW_LENGTH, multiple=batch_multiple(step.mesh))


def test_the_step_on_eight_devices_is_that_on_one() -> None:
    """Loss and gradients, policy's and critic's, but for the rounding of sums in another order."""
    (state, metrics), (expected, numbers) = updated((2, 2, 2)), updated((1, 1, 1))
    before = tiny_policy(value_head=True).params
    gradient = jax.tree.map(lambda b, a: np.asarray(b) - np.asarray(a), before, gathered(state.params, HOST))
    jax.tree.map(one.close, gradient, jax.tree.map(lambda b, a: np.asarray(b) - np.asarray(a), before, expected.params))
    assert max(float(np.abs(g).max()) for g in jax.tree.leaves(gradient)) > 1e-3  # far more than what `close` lets pass
    for metric in numbers:
        one.close(metrics[metric], numbers[metric])


def bytes_of(tree: Any) -> int:
    """Of one device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@functools.cache
def step_of(shape: tuple[int, int, int]) -> TrainStep:
    return TrainStep(SHAPE, one.LIGHTNINGRL, ADAM, make_mesh(*shape))


@functools.cache
def argument_bytes(shape: tuple[int, int, int]) -> dict[str, int]:
    """What the compiled programs of an update take per device: state and gradients, and what accumulating needs."""
    step = step_of(shape)
    state = step.init(init_params(SHAPE, jax.random.key(0)))
    zeros = jax.jit(lambda: jax.tree.map(jnp.zeros_like, shapes(SHAPE)), out_shardings=params_sharding(SHAPE, step.mesh))
    apply = step._apply.lower(state, zeros(), {}).compile().memory_analysis()
    assert apply is not None
    return {"apply": apply.argument_size_in_bytes, "state": bytes_of((state.params, state.opt_state))}


@pytest.mark.parametrize("shape", FOUR)
def test_parameters_and_optimizer_are_a_quarter_each(shape: tuple[int, int, int]) -> None:
    """By the compiled program's own account; what is not split, norms and counts, is in the tenth beyond the quarter."""
    whole, part = argument_bytes((1, 1, 1)), argument_bytes(shape)
    assert part["apply"] <= 0.3 * whole["apply"]
    assert part["state"] <= 0.3 * whole["state"]


def test_the_state_stays_sharded_over_updates() -> None:
    """Moments lie as their parameters do, before and after, and nothing is whole that the rules split."""
    step = TrainStep(tiny_policy().config, one.LIGHTNINGRL, ADAM, make_mesh(1, 2, 2))
    packed, table = one.packed_in(one.ONE_ROW_LENGTH, multiple=batch_multiple(step.mesh))
    state = step.init(tiny_policy().params)
    before = jax.tree.map(lambda x: x.sharding, state)
    assert len(before.params["embedding"].device_set) == 4 and not before.params["embedding"].is_fully_replicated
    adam = optax.tree.get(state.opt_state, "mu")
    assert jax.tree.map(lambda x: x.sharding, adam) == before.params
    state, _ = step.update(state, packed.rows, one.edges_of(packed, table, step, state.params))
    assert jax.tree.map(lambda x: x.sharding, state) == before


def test_adapters_and_a_moving_mean_are_sharded_and_trained_as_on_one_device() -> None:
    """Factors, their moments and their mean lie as the rules say before and after an update; roles share one base."""

    def trained(shape: tuple[int, int, int]) -> tuple[Any, Any, Any]:
        mesh = make_mesh(*shape)
        step = TrainStep(SHAPE, small.REINFORCE, SGD, mesh, lora=LoraSettings(rank=4), ema_decay=0.5)
        start = start_policies(step, init_params(SHAPE, jax.random.key(0)), small.ROLES)
        rows = RowSettings((64,), 512, 512)
        whose, batches = pack_policies(start, small.recorded(), small.table(), 1, rows, 8)
        before = jax.tree.map(lambda x: x.sharding, start)
        assert all(start[role].params["embedding"] is start["reader"].params["embedding"] for role in start)
        after, _ = update_policies(step, start, whose, batches, [small.edges_of(b, small.advantages()) for b in batches])
        assert jax.tree.map(lambda x: x.sharding, after) == before
        return after, step, weights(step, after, HOST)

    (after, step, weights_of), (one_device, _, expected) = trained((2, 2, 2)), trained((1, 1, 1))
    at = adapter_sharding(params_sharding(SHAPE, step.mesh), SHAPE, LoraSettings(rank=4))
    for role, state in after.items():
        for tree in (state.adapter, state.reference, optax.tree.get(state.opt_state, "trace")):
            assert jax.tree.map(lambda x: x.sharding, tree) == at
        assert not state.adapter["layers"][0]["qkv"]["a"].sharding.is_fully_replicated
        moved = [np.abs(np.asarray(pair["b"])).max() for pair in one_device[role].adapter["layers"][0].values()]
        assert min(moved) > 1e-3  # B started as 0
        jax.tree.map(one.close, gathered(state.reference, HOST), one_device[role].reference)
        jax.tree.map(one.close, weights_of[role], expected[role])


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(1.0),
        optax.sgd(1.0, momentum=0.9),
        ADAM,
        optax.masked(optax.adam(1e-3), lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
        optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
    ],
)
def test_any_optimizers_state_is_sharded(optimizer: optax.GradientTransformation) -> None:
    mesh, params = make_mesh(1, 2, 2), init_params(SHAPE, jax.random.key(0))
    at = params_sharding(SHAPE, mesh)
    state = jax.jit(optimizer.init, out_shardings=optimizer_sharding(optimizer, params, at, replicated(mesh)))(params)
    large = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 1000]
    assert all(leaf.addressable_shards[0].data.size * 4 == leaf.size for leaf in large)


def test_the_batch_is_split_and_with_it_the_work() -> None:
    """FLOPs of the compiled gradient on one of eight devices: an eighth, and what cannot be split, a sixteenth at most."""
    flops, (packed, _) = {}, one.packed_in(one.ONE_ROW_LENGTH)
    edges = _edges_of(packed)
    for shape in ((1, 1, 1), (8, 1, 1)):
        step = step_of(shape)
        params = place(init_params(SHAPE, jax.random.key(0)), params_sharding(SHAPE, step.mesh))
        rows = Rows(*(np.zeros((8, 64), np.int32) for _ in range(3)))
        batch = (*step._micro_batch(0, rows, edges), {"policy": np.float32(1), "value": np.float32(1)})
        cost = jax.jit(step._gradients_of).lower(params, None, *batch).compile().cost_analysis()
        flops[shape] = cost["flops"]
    assert flops[8, 1, 1] <= flops[1, 1, 1] * (1 / 8 + 1 / 16)


def test_an_axis_that_does_not_divide_stays_whole() -> None:
    three = dataclasses.replace(SHAPE, num_kv_heads=1, vocab_size=255)
    at = params_sharding(three, make_mesh(1, 1, 4))
    assert at["embedding"].is_fully_replicated and at["layers"][0]["qkv"].is_fully_replicated
    assert not at["layers"][0]["down"].is_fully_replicated
    assert edges_sharding(make_mesh(8), 12).is_fully_replicated and not edges_sharding(make_mesh(8), 16).is_fully_replicated


def test_the_mesh_puts_tensor_innermost() -> None:
    ids = np.vectorize(lambda device: device.id)(make_mesh(2, 2, 2).devices)
    np.testing.assert_array_equal(ids, np.arange(8).reshape(2, 2, 2))


# Sampling

SLOTS, LENGTH = 8, 32


def sampled(mesh: Any) -> tuple[Any, Any, list[Completion]]:
    """Eight prompts are read and eight tokens written after each."""
    params = place(init_params(SHAPE, jax.random.key(0)), params_sharding(SHAPE, mesh, ShardingRules(embed=None)))
    nothing_ends = types.SimpleNamespace(eos_token_id=-1, decode=lambda tokens, **_: "")
    prompts = np.random.default_rng(0).integers(0, 256, (SLOTS, 8)).astype(np.int32)
    with PolicySampler(params, SHAPE, nothing_ends, SamplerSettings(slots=SLOTS, context_length=LENGTH), mesh=mesh) as sampler:
        futures = [sampler.submit(prompt, SamplingParams(8), (i, 0)) for i, prompt in enumerate(prompts)]
        done = [future.result(120) for future in futures]
        return sampler._cache, cache_sharding(SHAPE, mesh, SLOTS), done


def test_the_cache_is_split_and_stays_so_and_samples_the_same() -> None:
    """Slots over data and fsdp, key/value heads over tensor."""
    (cache, at, done), (_, _, expected) = sampled(make_mesh(2, 2, 2)), sampled(make_mesh())
    for array, sharding in zip(jax.tree.leaves(cache), jax.tree.leaves(at), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    for split, other in zip(done, expected, strict=True):
        np.testing.assert_array_equal(split.token_ids, other.token_ids)
        np.testing.assert_allclose(split.logprobs, other.logprobs, rtol=0, atol=1e-5)  # sums over heads are taken in another order


def test_slots_or_heads_that_do_not_divide_stay_whole() -> None:
    one_head = dataclasses.replace(SHAPE, num_kv_heads=1)
    spec = cache_sharding(one_head, make_mesh(2, 2, 2), 8).keys[0].spec
    assert spec == jax.P(("data", "fsdp"), None)
    assert cache_sharding(SHAPE, make_mesh(2, 2, 2), 6).keys[0].spec == jax.P(None, "tensor")


def test_a_policy_that_is_read_lies_in_its_parts_from_the_start(tmp_path: pathlib.Path) -> None:
    """On no device is more than its part, whether it comes from --policy or from OUT/start, where a run that goes on finds it."""
    given, mesh = tiny_policy(), make_mesh(1, 4, 2)
    save_policy(tmp_path / "given", given)
    at = params_sharding(given.config, mesh)
    for _ in range(2):
        start = starting_policy(FitConfig(policy=str(tmp_path / "given")), tmp_path / "out", (), (), critic=False, mesh=mesh)
        jax.tree.map(np.testing.assert_array_equal, gathered(start.params, HOST), given.params)
        assert all(leaf.sharding == place for leaf, place in zip(jax.tree.leaves(start.params), jax.tree.leaves(at), strict=True))
    assert bytes_of(start.params) < 0.3 * bytes_of(given.params)


# Memory as `lightningrl.scaling` has it, against the account of compiled programs. Nothing is allocated: all shapes are abstract.


def abstract(tree: Any, at: Any) -> Any:
    at = jax.tree.map(lambda _: at, tree) if isinstance(at, jax.sharding.Sharding) else at
    return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), tree, at)


def abstract_state(step: TrainStep) -> TrainState:
    params = shapes(step.config)
    state = TrainState(params=params, opt_state=jax.eval_shape(ADAM.init, params), step=jax.ShapeDtypeStruct((), np.int32))
    return abstract(state, step._state_at)


def test_a_billion_parameters_take_the_bytes_of_the_formula() -> None:
    """Parameters, moments and gradients, to a hundredth."""
    mesh = scaling.Mesh(1, 4, 2)
    step = TrainStep(scaling.LLAMA_1B, one.LIGHTNINGRL, ADAM, make_mesh(1, 4, 2))
    state = abstract_state(step)
    memory = step._apply.lower(state, state.params, {}).compile().memory_analysis()
    expected = scaling.state_bytes(scaling.LLAMA_1B, mesh) + scaling.gradient_bytes(scaling.LLAMA_1B, mesh)
    assert memory.argument_size_in_bytes == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("model", "shape", "length"),
    [
        (SHAPE, (2, 2, 2), 256),  # short enough for dense attention
        (dataclasses.replace(scaling.LLAMA_1B, num_layers=2), (1, 1, 1), 512),
        (dataclasses.replace(scaling.LLAMA_1B, num_layers=2), (8, 1, 1), 512),
        (dataclasses.replace(scaling.LLAMA_1B, num_layers=2), (1, 4, 2), 512),
    ],
)
def test_a_micro_batch_takes_the_bytes_of_the_formula(model: ModelConfig, shape: tuple[int, int, int], length: int) -> None:
    """What adding up its gradient holds for a while, within a factor of two: the compiler reuses and keeps buffers as it likes."""
    mesh, ways = scaling.Mesh(*shape), shape[0] * shape[1]
    step = TrainStep(model, one.LIGHTNINGRL, ADAM, make_mesh(*shape))
    edges = 128 * ways
    rows = Rows(*(np.zeros((ways, length), np.int32) for _ in range(3)))
    packed, _ = one.packed_in(one.ONE_ROW_LENGTH)
    table = jax.tree.map(lambda x: np.zeros(edges, x.dtype), _edges_of(packed))
    params = abstract_state(step).params
    batch = (
        abstract(rows, step._rows_at),
        abstract(table, edges_sharding(step.mesh, edges)),
        {"policy": np.float32(1), "value": np.float32(1)},
    )
    gradients, metrics = jax.eval_shape(step._gradients_of, params, None, *batch)
    total = (abstract(gradients, step._state_at.params), abstract(metrics, step._whole))
    memory = step._accumulate.lower(total, params, None, *batch).compile().memory_analysis()
    assert memory.argument_size_in_bytes == pytest.approx(2 * scaling.gradient_bytes(model, mesh), rel=0.05, abs=1e5)
    # As the step is without bfloat16, remat and a loss in chunks.
    dense = choose_attention(length, "cpu") == "dense"
    plain = scaling.Workload(
        tokens=ways * length, edges=edges, row=length, chunk=model.vocab_size, compute_bytes=4, remat=False, dense_attention=dense
    )
    expected = scaling.passing_bytes(model, mesh, plain)
    assert expected / 2 <= memory.temp_size_in_bytes <= 2 * expected
