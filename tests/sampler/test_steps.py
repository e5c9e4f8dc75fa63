"""The compiled turn: that it copies no cache, and what choosing a token comes to."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningrl.model.cache import cache_bytes, copy_blocks, init_cache
from lightningrl.sampler.choose import draw, uniforms
from lightningrl.sampler.steps import Plan, TurnShape, turn
from tests.tiny import tiny_policy

SHAPE = TurnShape(slots=24, group=8, steps=3, chunk=16, rows=2, pieces=4, loads=8, length=512)
BLOCKS = 700


@pytest.mark.slow
def test_the_compiled_turn_copies_no_cache():
    """Neither in the loops nor around them: no copy of a cache's shape, and less working memory than half a cache. What a group's
    decoding takes out of the cache is a third of it, once a turn, and in the loop over tokens that is not copied either."""
    policy = tiny_policy()
    cache, pool = (init_cache(policy.config, *size) for size in ((SHAPE.slots, SHAPE.length), (BLOCKS, SHAPE.chunk)))
    compiled = turn.lower(
        policy.params, cache, pool, Plan.empty(SHAPE).flat(), config=policy.config, shape=SHAPE, end_tokens=(0,)
    ).compile()
    text = compiled.as_text()
    kv, d = policy.config.num_kv_heads, policy.config.head_dim
    for slots, length in ((SHAPE.slots, SHAPE.length), (SHAPE.group, SHAPE.length), (BLOCKS, SHAPE.chunk)):
        for dims in (f"{slots},{kv},{d},{length}", f"{slots},{kv},{length},{d}"):
            assert f"f32[{dims}]" in text
            assert not re.findall(rf"= f32\[{dims}\]\S* copy\(", text)
    memory = compiled.memory_analysis()
    whole = cache_bytes(policy.config, SHAPE.slots * SHAPE.length)
    assert memory.alias_size_in_bytes == whole + cache_bytes(policy.config, BLOCKS * SHAPE.chunk)
    assert memory.temp_size_in_bytes < whole // 2


def test_blocks_are_copied_where_they_belong():
    config = tiny_policy().config
    rng = np.random.default_rng(0)
    fill = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)  # noqa: E731
    source, target = (jax.tree.map(fill, init_cache(config, *size)) for size in ((3, 8), (5, 16)))
    copies = np.array([(2, 4, 0, 8), (1, 0, 4, 12), (0, 0, 3, 0)], np.int32)
    copied = jax.jit(copy_blocks, static_argnums=4)(source, target, copies, 2, 4)
    for name, axis in (("keys", 3), ("values", 2)):
        for before, after, from_ in zip(getattr(target, name), getattr(copied, name), getattr(source, name), strict=True):
            expected, taken = np.moveaxis(np.array(before), axis, 1), np.moveaxis(np.asarray(from_), axis, 1)
            expected[0, 8:12] = taken[2, 4:8]
            expected[4, 12:16] = taken[1, 0:4]
            np.testing.assert_array_equal(np.moveaxis(np.asarray(after), axis, 1), expected)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 7, 64, 100, 1000])
def test_draw_inverts_the_running_sum(size):
    """Token i for uniforms in [Σ_{j<i} w, Σ_{j≤i} w) / Σ w, up to the rounding of the sums at the edges."""
    rng = np.random.default_rng(size)
    weights = rng.exponential(size=(200, size)).astype(np.float32) * (rng.random((200, size)) < 0.7)
    weights[np.arange(200), rng.integers(size, size=200)] = 1.0
    uniform = rng.random(200).astype(np.float32)
    drawn = np.asarray(jax.jit(draw)(weights, uniform))
    sums = np.cumsum(weights.astype(np.float64), axis=1) / weights.sum(axis=1, dtype=np.float64, keepdims=True)
    for row, (token, u) in enumerate(zip(drawn, uniform, strict=True)):
        assert weights[row, token] > 0
        low = sums[row, token - 1] if token else 0.0
        assert low - 1e-6 <= u <= sums[row, token] + 1e-6


@pytest.mark.slow
def test_draw_never_gives_a_token_of_no_weight():
    """At both ends: a uniform of 0, and one so near 1 that rounding passes every sum."""
    weights = np.zeros((3, 50), np.float32)
    weights[:, [13, 31]] = 0.1
    drawn = np.asarray(draw(weights, np.array([0.0, np.nextafter(np.float32(1), np.float32(0)), 0.6], np.float32)))
    assert drawn.tolist() == [13, 31, 31]


def test_uniforms_depend_on_key_and_index_alone():
    keys = np.array([[1, 2, 1], [5, 6, 5]], np.int32)
    index = np.array([[0, 3, 7], [1, 4, 0]], np.int32)
    u = np.asarray(uniforms(keys, index))
    assert u.shape == (2, 3) and u[0, 0] == u[1, 2]
    assert len(set(u.ravel().tolist())) == 5
    for t, s in ((0, 0), (1, 1)):
        key = jax.random.fold_in(jax.random.wrap_key_data(keys[:, s].view(np.uint32)), index[t, s])
        assert u[t, s] == jax.random.uniform(key)


def test_a_plan_is_what_its_array_says():
    plan = jax.tree.map(lambda x: np.arange(x.size, dtype=np.int32).reshape(x.shape) + x.size, Plan.empty(SHAPE))
    again = Plan.of(plan.flat(), SHAPE)
    for field in dataclasses.fields(Plan):
        np.testing.assert_array_equal(getattr(plan, field.name), getattr(again, field.name))
