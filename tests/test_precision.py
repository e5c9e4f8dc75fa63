"""Computing in bfloat16 on float32 parameters, and gradients that are the same sums however a batch is cut."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lightningrl.packing.rows import PackedBatch, Rows, pack
from lightningrl.sampler.engine import PolicySampler, SamplerSettings
from lightningrl.sharding import make_mesh
from lightningrl.table import TokenTable
from lightningrl.train import TrainStep
from lightningrl.types import SamplingParams, Transition
from tests.small_step import CONFIG, REINFORCE, ROWS, advantages, edges_of, mean_so_far, params, recorded

BF16 = float(jnp.finfo(jnp.bfloat16).eps)  # 2⁻⁷, the gap between 1 and the next number


@functools.cache
def step(dtype: Any = None) -> TrainStep:
    return TrainStep(CONFIG, REINFORCE, optax.adam(1e-2), make_mesh(), compute_dtype=dtype)


@functools.cache
def batch() -> PackedBatch:
    flat = [t for r in recorded() for t in r.transitions]
    return pack(flat, range(len(flat)), ROWS)


@functools.cache
def updated(dtype: Any) -> tuple[Any, Any, Any]:
    state = step(dtype).init(params())
    scores = step(dtype).score(step(dtype).weights(state), batch().rows, batch().edges)
    return *step(dtype).update(state, batch().rows, edges_of(batch(), advantages())), scores


@pytest.mark.slow
def test_what_is_trained_and_what_trains_it_stay_float32() -> None:
    state, metrics, scores = updated(jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(step(jnp.bfloat16).weights(state))} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, metrics, scores))} == {np.dtype(np.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state)} == {np.dtype(np.float32), np.dtype(np.int32)}
    # None of a step is lost to rounding: it is as long as Adam's first one is, and ends between the numbers that bfloat16 has.
    after, before = np.asarray(state.params["layers"][0]["down"]), params()["layers"][0]["down"]
    np.testing.assert_allclose(np.median(np.abs(after - before)), 0.01, rtol=1e-4)
    assert np.mean(after == after.astype(jnp.bfloat16).astype(np.float32)) < 0.1


@pytest.mark.slow
def test_bfloat16_is_as_close_as_its_rounding() -> None:
    (exact, expected, scores), (rounded, metrics, coarse) = updated(None), updated(jnp.bfloat16)
    mask = np.asarray(batch().edges.mask)
    gap = np.abs(np.asarray(coarse.logp) - np.asarray(scores.logp))[mask]
    # Logits are sums over a handful of rounded layers, each off by half a gap of their size, which is about that of log-probs.
    size = np.abs(np.asarray(scores.logp))[mask].max()
    assert 0 < gap.mean() < BF16 * size / 2 and gap.max() < 2 * BF16 * size
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=0, atol=BF16 * size)
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=4 * BF16)
    moments = [jax.tree_util.tree_leaves_with_path(state.opt_state[0].mu) for state in (rounded, exact)]  # a tenth of the gradient
    for (path, a), (_, b) in zip(*moments, strict=True):
        cosine = np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
        assert cosine > 1 - 4 * BF16, jax.tree_util.keystr(path)


@pytest.mark.slow
def test_float32_is_the_program_without_a_compute_dtype() -> None:
    """Equation for equation, so that every bit is."""
    edges = edges_of(batch(), advantages())
    first = jax.tree.map(lambda x: x[0], edges)
    denominators = step(None)._denominators(edges.tokens, edges.counts)
    program = [
        str(jax.make_jaxpr(step(dtype)._gradients_of)(params(), None, batch().rows[0], first, denominators))
        for dtype in (None, jnp.dtype("float32"), jnp.bfloat16)
    ]
    assert program[0] == program[1] != program[2] and "bf16" not in program[0]


@pytest.mark.slow
def test_sampler_and_trainer_in_bfloat16_differ_by_its_rounding_alone() -> None:
    """Both compute with the same rounded weights; what is left are sums in another order, of numbers rounded alike."""
    trainer = step(jnp.bfloat16)
    rounded = trainer.rounded(params())
    settings = SamplerSettings(slots=8, context_length=64, prefill_rows=4, chunk=16, steps=4)

    class Tokens:
        eos_token_id = -1

        def decode(self, ids: Any, skip_special_tokens: bool) -> str:
            return ""

    rng = np.random.default_rng(0)
    prompts = [rng.integers(7, 300, 12).astype(np.int32) for _ in range(16)]
    with PolicySampler(rounded, CONFIG, Tokens(), settings) as sampler:
        assert sampler._cache.keys[0].dtype == jnp.bfloat16
        futures = [sampler.submit(p, SamplingParams(16), (i, 0)) for i, p in enumerate(prompts)]
        done = [future.result(60) for future in futures]
    calls = [Transition(p, c.token_ids, c.logprobs, 1.0, 0, "policy", 0) for p, c in zip(prompts, done, strict=True)]
    packed = pack(calls, range(16), ROWS)
    edges, mask = packed.edges, np.asarray(packed.edges.mask)
    ours, exact = (np.asarray(s.score(params(), packed.rows, edges).logp)[mask] for s in (trainer, step()))
    gap, rounding = np.abs(ours - edges.behaviour_logp[mask]), np.abs(ours - exact)
    # No further from each other than either is from float32.
    assert gap.mean() < 1.5 * rounding.mean() and gap.max() < 2 * rounding.max()


# ---- accumulation


def gradient(cuts: int, dtype: Any) -> Any:
    """Of ten rows of twelve tokens with five edges each, in so many micro-batches."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 300, (10, 12)).astype(np.int32)
    positions = np.tile(np.arange(12, dtype=np.int32), (10, 1))
    per = 10 // cuts
    rows = [Rows(tokens[i : i + per], positions[i : i + per], np.full((per, 12), 12, np.int32)) for i in range(0, 10, per)]
    node = rng.integers(0, 11, (10, 5)).astype(np.int32)
    fields = {
        "transition": np.repeat(np.arange(10, dtype=np.int32), 5),
        "k": np.tile(np.arange(5, dtype=np.int32), 10),
        "node": node + 12 * (np.arange(10, dtype=np.int32) % per)[:, None],
        "token": tokens[np.arange(10)[:, None], node + 1],
        "mask": rng.random(50) < 0.8,
        "temperature": np.ones(50, np.float32),
    }
    zeros = dict.fromkeys(("old_logp", "behaviour_logp", "ref_logp"), np.zeros(50, np.float32))
    table = TokenTable(**{name: x.reshape(cuts, -1) for name, x in (fields | zeros).items()})
    edges = edges_of(dataclasses.replace(batch(), edges=table), advantages())
    descent = TrainStep(CONFIG, REINFORCE, optax.sgd(1.0), make_mesh())
    start = params(dtype=dtype)
    after, metrics = descent.update(descent.init(start), rows, edges)
    moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), start, after.params)
    return {"embedding": moved["embedding"], "down": moved["layers"][0]["down"]}, metrics


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rounding"), [(np.float32, 1e-6), (np.float64, 1e-12)])
def test_micro_batches_add_up_to_one_gradient(monkeypatch: pytest.MonkeyPatch, dtype: Any, rounding: float) -> None:
    monkeypatch.setattr("lightningrl.train.score_edges", mean_so_far)
    with jax.enable_x64(dtype is np.float64):
        whole, expected = gradient(1, dtype)
        assert whole["embedding"].dtype == dtype and min(np.abs(g).max() for g in whole.values()) > 1e-2
        for cuts in (2, 5):
            cut, metrics = gradient(cuts, dtype)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=rounding), cut, whole)
            np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=rounding, atol=rounding)
