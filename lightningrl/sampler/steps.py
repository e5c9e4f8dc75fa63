"""The sampler's compiled program: one turn. It takes up prefixes that were read before, reads pieces of prompts, and decodes.

All of it is one program with one input and one output array, because each call of a program and each fetched array is a wait for
Python's lock while agents run beside it. How much of each part there is to do are numbers in the plan, so nothing is done in vain.

No part's shape depends on who is in the batch, and no row looks at another: a request's tokens depend on its prompt, its key and its
settings alone. Prompts are read in rows of one aligned piece each; every prompt token but the last is, and the last is the first
input of decoding. Decoding goes by groups of a fixed number of slots.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lightningrl.model.cache import KVCache, copy_blocks, extend
from lightningrl.model.config import ModelConfig
from lightningrl.model.decoder import logits as logits_of
from lightningrl.model.params import Params
from lightningrl.sampler.choose import MAX_ALTERNATIVES, choose, likeliest, uniforms
from lightningrl.table import Array


@dataclasses.dataclass(frozen=True)
class TurnShape:
    """What a turn is compiled for."""

    slots: int
    group: int  # slots decoded together; a divisor of `slots`
    steps: int  # tokens decoded in a turn, at most
    chunk: int  # tokens of a piece, and of a block of the pool
    rows: int  # pieces read together
    pieces: int  # pieces read in a turn, at most; a multiple of `rows`
    loads: int  # blocks taken from the pool in a turn, at most
    length: int  # cache positions that decoding looks at


@struct.dataclass
class Plan:
    """What a turn is to do. Loads are as in `copy_blocks`, in the order they are made; it reaches the program as one array."""

    counts: Array  # int32 [4]: loads before reading, runs of `rows` pieces, loads after reading, groups
    before: Array  # int32 [loads, 4]
    after: Array  # int32 [loads, 4], of blocks that this turn writes
    pieces: Array  # int32 [pieces, 3 + chunk]: slot (≥ slots: an empty row), tokens before it, block to write, tokens
    groups: Array  # int32 [slots / group], the groups to decode
    integers: Array  # int32 [8, slots], see `SlotState`
    floats: Array  # int32 [2, slots], the bits of its floats

    @classmethod
    def of(cls, flat: Array, shape: TurnShape) -> Plan:
        """The parts of what `flat` gives."""
        parts, at = {}, 0
        for name, size in _sizes(shape).items():
            parts[name] = flat[at : at + math.prod(size)].reshape(size)
            at += math.prod(size)
        return cls(**parts)

    @classmethod
    def empty(cls, shape: TurnShape) -> Plan:
        """With nothing to do."""
        return cls(**{name: np.zeros(size, np.int32) for name, size in _sizes(shape).items()})

    def flat(self) -> np.ndarray:
        """One array of it all."""
        return np.concatenate([np.ravel(getattr(self, field.name)) for field in dataclasses.fields(self)])


def _sizes(shape: TurnShape) -> dict[str, tuple[int, ...]]:
    return {
        "counts": (4,),
        "before": (shape.loads, 4),
        "after": (shape.loads, 4),
        "pieces": (shape.pieces, 3 + shape.chunk),
        "groups": (shape.slots // shape.group,),
        "integers": (8, shape.slots),
        "floats": (2, shape.slots),
    }


@struct.dataclass
class SlotState:
    """What decoding needs to know of each slot."""

    token: Array  # int32 [S], the next input
    position: Array  # int32 [S], where it goes in the cache
    generated: Array  # int32 [S], response tokens so far
    max_tokens: Array  # int32 [S], 0: the slot is idle and writes nothing
    key: Array  # int32 [2, S], the bits of the response's key; token i is drawn with fold_in(key, i)
    top_k: Array  # int32 [S]
    alternatives: Array  # int32 [S], whether likely alternatives are wanted
    temperature: Array  # float32 [S], 0 is greedy
    top_p: Array  # float32 [S]

    @classmethod
    def of(cls, integers: Array, floats: Array) -> SlotState:
        """From int32 [8, S] and float32 [2, S]."""
        return cls(
            token=integers[0],
            position=integers[1],
            generated=integers[2],
            max_tokens=integers[3],
            key=integers[4:6],
            top_k=integers[6],
            alternatives=integers[7],
            temperature=floats[0],
            top_p=floats[1],
        )


@struct.dataclass
class Burst:
    """What a turn decoded. `token` is -1 where a slot was idle."""

    token: jax.Array  # int32 [S, steps]
    logprob: jax.Array  # float32 [S, steps]
    top_id: jax.Array  # int32 [S, steps, A], A = min(MAX_ALTERNATIVES, V)
    top_logprob: jax.Array  # float32 [S, steps, A]


@functools.partial(jax.jit, static_argnames=("config", "shape", "end_tokens"), donate_argnames=("cache", "pool"))
def turn(
    params: Params, cache: KVCache, pool: KVCache, flat: Array, *, config: ModelConfig, shape: TurnShape, end_tokens: tuple[int, ...]
) -> tuple[KVCache, KVCache, jax.Array, tuple[jax.Array, jax.Array]]:
    """Does what the plan says.

    Args:
      cache: of `slots` slots; pool: of any number of slots, `chunk` tokens each, the blocks. Both are donated.
      flat: int32, a plan's `flat()`.

    Returns:
      cache, pool, a burst's token and logprob as int32 [2, slots, steps], and its top_id and top_logprob.
    """
    plan = Plan.of(flat, shape)
    cache = copy_blocks(pool, cache, plan.before, plan.counts[0], shape.chunk)
    cache, pool = read(params, config, cache, pool, plan.pieces, plan.counts[1], shape)
    cache = copy_blocks(pool, cache, plan.after, plan.counts[2], shape.chunk)
    state = SlotState.of(plan.integers, jax.lax.bitcast_convert_type(plan.floats, jnp.float32))
    cache, burst = decode(params, config, cache, state, plan.groups, plan.counts[3], shape, end_tokens)
    both = jnp.stack([burst.token, jax.lax.bitcast_convert_type(burst.logprob, jnp.int32)])
    return cache, pool, both, (burst.top_id, burst.top_logprob)


def read(
    params: Params, config: ModelConfig, cache: KVCache, pool: KVCache, pieces: Array, runs: Array, shape: TurnShape
) -> tuple[KVCache, KVCache]:
    """Reads pieces of prompts into the cache and into blocks of the pool, `rows` at a time."""

    def run(i: jax.Array, carry: tuple[KVCache, KVCache]) -> tuple[KVCache, KVCache]:
        cache, pool = carry
        some = jax.lax.dynamic_slice_in_dim(pieces, i * shape.rows, shape.rows)
        slots, start, blocks, tokens = some[:, 0], some[:, 1], some[:, 2], some[:, 3:]
        cache = extend(params, config, cache, slots, tokens, start)[1]
        copies = jnp.stack([slots, start, blocks, jnp.zeros_like(slots)], axis=1)
        return cache, copy_blocks(cache, pool, copies, jnp.int32(shape.rows), shape.chunk)

    return jax.lax.fori_loop(0, runs, run, (cache, pool))


def decode(
    params: Params,
    config: ModelConfig,
    cache: KVCache,
    state: SlotState,
    groups: Array,
    count: Array,
    shape: TurnShape,
    end_tokens: tuple[int, ...],
) -> tuple[KVCache, Burst]:
    """Decodes the first `count` of `groups`, each in its own part of the cache, taken out once a turn."""
    alternatives = min(MAX_ALTERNATIVES, config.vocab_size)
    whole = Burst(
        token=jnp.full((shape.slots, shape.steps), -1),
        logprob=jnp.zeros((shape.slots, shape.steps)),
        top_id=jnp.zeros((shape.slots, shape.steps, alternatives), jnp.int32),
        top_logprob=jnp.zeros((shape.slots, shape.steps, alternatives)),
    )

    def one(i: jax.Array, carry: tuple[KVCache, Burst]) -> tuple[KVCache, Burst]:
        cache, whole = carry
        first = groups[i] * shape.group

        def part(x: jax.Array, axis: int = 0) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, first, shape.group, axis)

        own = KVCache(keys=[part(x)[..., : shape.length] for x in cache.keys], values=[part(x)[:, :, : shape.length] for x in cache.values])
        s = jax.tree.map(lambda x: part(x, x.ndim - 1), state)
        own, burst = decode_group(params, config, own, s, steps=shape.steps, end_tokens=end_tokens)
        index = jnp.arange(shape.group)
        copies = jnp.stack([index, s.position, first + index, s.position], axis=1)
        cache = copy_blocks(own, cache, copies, jnp.int32(shape.group), min(shape.steps, shape.length))
        return cache, jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, first, 0), whole, burst)

    return jax.lax.fori_loop(0, count, one, (cache, whole))


def decode_group(
    params: Params, config: ModelConfig, cache: KVCache, s: SlotState, *, steps: int, end_tokens: tuple[int, ...]
) -> tuple[KVCache, Burst]:
    """Samples up to `steps` tokens for every active slot; one stops at an end token or after `max_tokens`, and all when none is left."""
    (slots,), length = s.token.shape, cache.values[0].shape[2]
    uniform = uniforms(s.key, s.generated + jnp.arange(steps)[:, None])
    nothing = jax.eval_shape(likeliest, jax.ShapeDtypeStruct((slots, config.vocab_size), jnp.float32), s.temperature)
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nothing)
    top = jax.tree.map(lambda x: jnp.zeros((slots, steps, *x.shape[1:]), x.dtype), nothing)
    burst = Burst(jnp.full((slots, steps), -1), jnp.zeros((slots, steps)), top[1], top[0])
    Carry = tuple[jax.Array, jax.Array, jax.Array, KVCache, Burst]
    first: Carry = (jnp.int32(0), jnp.asarray(s.max_tokens > s.generated), jnp.asarray(s.token), cache, burst)

    def goes_on(carry: Carry) -> jax.Array:
        return (carry[0] < steps) & jnp.any(carry[1])

    def step(carry: Carry) -> Carry:
        i, active, token, cache, burst = carry
        at = jnp.where(active, s.position + i, length)  # past the end: the write is dropped
        hidden, cache = extend(params, config, cache, None, token[:, None], at)
        logits = logits_of(params, config, hidden[:, 0])
        token, logprob = choose(logits, uniform[i], s.temperature, s.top_p, s.top_k)
        wanted = jnp.any((s.alternatives > 0) & active)
        top_logprob, top_id = jax.lax.cond(wanted, lambda: likeliest(logits, s.temperature), lambda: empty)
        row = Burst(token=jnp.where(active, token, -1), logprob=logprob, top_id=top_id, top_logprob=top_logprob)
        burst = jax.tree.map(lambda whole, new: whole.at[:, i].set(new), burst, row)
        active = active & ~jnp.any(token[:, None] == jnp.array(end_tokens, jnp.int32), axis=-1) & (s.generated + i + 1 < s.max_tokens)
        return i + 1, active, token, cache, burst

    *_, cache, burst = jax.lax.while_loop(goes_on, step, first)
    return cache, burst
