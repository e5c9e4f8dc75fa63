"""The sampler's two compiled programs: `prefill` reads prompts into the cache, `decode` writes responses.

Both have one shape, whoever is in the batch, and no row looks at another: a request's tokens depend on its prompt, its key and
its settings alone. Every prompt token but the last is prefilled, in chunks aligned to multiples of the chunk size; the last
is the first input of decoding.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct

from lightningrl.model.cache import KVCache, extend
from lightningrl.model.config import ModelConfig
from lightningrl.model.decoder import logits as logits_of
from lightningrl.model.params import Params
from lightningrl.sampler.choose import choose, likeliest
from lightningrl.table import Array


@struct.dataclass
class SlotState:
    """What decoding needs to know of each slot. An idle slot has `active` false and writes nothing."""

    token: Array  # int32 [S], the next input
    position: Array  # int32 [S], where it goes in the cache
    generated: Array  # int32 [S], response tokens so far
    max_tokens: Array  # int32 [S]
    active: Array  # bool [S]
    key: Array  # uint32 [S, 2], the response's key; token i is drawn with fold_in(key, i)
    temperature: Array  # float32 [S], 0 is greedy
    top_p: Array  # float32 [S]
    top_k: Array  # int32 [S]
    alternatives: Array  # bool [S], whether likely alternatives are wanted


@struct.dataclass
class Burst:
    """What some decoding steps produced. `token` is -1 where a slot was idle."""

    token: jax.Array  # int32 [steps, S]
    logprob: jax.Array  # float32 [steps, S]
    top_id: jax.Array  # int32 [steps, S, A], A = min(MAX_ALTERNATIVES, V)
    top_logprob: jax.Array  # float32 [steps, S, A]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill(params: Params, cache: KVCache, slots: jax.Array, tokens: jax.Array, start: jax.Array, *, config: ModelConfig) -> KVCache:
    """Reads one aligned chunk of some prompts. slots: int32 [P] (≥ S: an empty row); tokens: int32 [P, C]; start: int32 [P]."""
    return extend(params, config, cache, slots, tokens, start)[1]


@functools.partial(jax.jit, static_argnames=("config", "steps", "end_token"), donate_argnames=("cache", "state"))
def decode(
    params: Params, cache: KVCache, state: SlotState, *, config: ModelConfig, steps: int, end_token: int
) -> tuple[KVCache, SlotState, Burst]:
    """Samples up to `steps` tokens for every active slot; a slot stops at `end_token` or after `max_tokens`."""
    length = cache.keys[0].shape[2]

    def step(carry: tuple[KVCache, SlotState], _: None) -> tuple[tuple[KVCache, SlotState], Burst]:
        cache, s = carry
        at = jnp.where(s.active, s.position, length)  # past the end: the write is dropped
        hidden, cache = extend(params, config, cache, None, s.token[:, None], at)
        logits = logits_of(params, config, hidden[:, 0])
        keys = jax.vmap(lambda key, i: jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), i)))
        token, logprob = choose(logits, keys(s.key, s.generated), s.temperature, s.top_p, s.top_k)
        top_logprob, top_id = jax.lax.cond(
            jnp.any(s.alternatives & s.active),
            lambda: likeliest(logits, s.temperature),
            lambda: jax.tree.map(jnp.zeros_like, jax.eval_shape(likeliest, logits, s.temperature)),
        )
        generated = s.generated + s.active
        goes_on = s.active & (token != end_token) & (generated < s.max_tokens)
        out = Burst(token=jnp.where(s.active, token, -1), logprob=logprob, top_id=top_id, top_logprob=top_logprob)
        after = dataclasses.replace(
            s, token=jnp.where(s.active, token, s.token), position=s.position + s.active, generated=generated, active=goes_on
        )
        return (cache, after), out

    (cache, state), burst = jax.lax.scan(step, (cache, state), length=steps)
    return cache, state, burst
