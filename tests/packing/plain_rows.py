"""Random batches of rollouts, and what training computes on them where nothing is shared: an oracle of its own.

Every call is a row under a causal mask, and each of its tokens weighs what its aggregation says, counted in Python.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from lightningrl.model import decoder
from lightningrl.model.attention import attend
from lightningrl.model.config import ModelConfig
from lightningrl.table import TokenTable
from lightningrl.train import Scores
from lightningrl.types import Rollout, Task, Transition
from tests.conversations import call

LONGEST, CALLS, RESPONSE = 10, 12, 3  # tokens of a call, calls of a batch and tokens of a response, at most
EDGES = CALLS * RESPONSE
CONFIG = ModelConfig(8, 8, 2, 2, 1, 4, 12, LONGEST, qk_norm=True, qkv_bias=True, value_head=True)

SOME = st.lists(st.integers(0, 5), min_size=1, max_size=RESPONSE)


@st.composite
def batches(draw: st.DrawFn) -> list[Rollout]:
    """Rollouts of one or two tasks that begin alike, go on, branch off, and repeat their own calls and each other's."""
    prompts = draw(st.lists(SOME, min_size=1, max_size=2))
    made: list[Rollout] = []
    room = CALLS
    while room and (len(made) < 3 or draw(st.integers(0, 5))):
        task = draw(st.integers(0, len(prompts) - 1))
        if made and draw(st.integers(0, 4)) == 0:
            calls = list(made[-1].transitions[:room])
        else:
            calls = draw(conversations(prompts[task], min(room, 4)))
        made.append(rollout(f"r{len(made)}", f"g{task}", calls))
        room -= len(calls)
    return made


@st.composite
def conversations(draw: st.DrawFn, ids: list[int], most: int) -> list[Transition]:
    """Calls that go on from each other, some of them made twice."""
    calls: list[Transition] = []
    while len(calls) < most and len(ids) + RESPONSE <= LONGEST and (not calls or draw(st.integers(0, 3))):
        asked = dataclasses.replace(call(ids, draw(SOME), len(calls)), temperature=draw(st.sampled_from([1.0, 0.5])))
        calls.append(asked)
        if len(calls) < most and draw(st.integers(0, 3)) == 0:
            calls.append(dataclasses.replace(asked, turn=len(calls)))
        ids = [*ids, *asked.response_ids.tolist(), *draw(SOME)]
    return calls


def rollout(name: str, group: str, calls: Sequence[Transition]) -> Rollout:
    return Rollout(name, Task(group, {}), group, 0, 0, tuple(calls), {"reward": 0.0})


def plain_rows(calls: Sequence[Transition]) -> tuple[np.ndarray, TokenTable]:
    """A row of LONGEST tokens and EDGES edges for every call, `node` being the column."""
    tokens = np.zeros((CALLS, LONGEST), np.int32)
    columns = {field.name: np.zeros((CALLS, EDGES), np.float32) for field in dataclasses.fields(TokenTable)}
    columns |= {name: np.zeros((CALLS, EDGES), np.int32) for name in ("transition", "k", "node", "token")}
    edges = TokenTable(**columns | {"mask": np.zeros((CALLS, EDGES), bool), "temperature": np.ones((CALLS, EDGES), np.float32)})
    for i, asked in enumerate(calls):
        before, after = len(asked.prompt_ids), len(asked.prompt_ids) + len(asked.response_ids)
        tokens[i, :after] = [*asked.prompt_ids, *asked.response_ids]
        for k in range(after - before):
            edges.transition[i, k], edges.k[i, k], edges.node[i, k] = i, k, before + k - 1
            edges.token[i, k], edges.temperature[i, k], edges.mask[i, k] = asked.response_ids[k], asked.temperature, True
    return tokens, edges


def plain_scores(params: Any, tokens: Any, edges: TokenTable) -> Scores:
    """What the policy says of the edges of `plain_rows`."""
    sees = jnp.tril(jnp.ones((1, LONGEST, LONGEST), bool))
    places = jnp.broadcast_to(jnp.arange(LONGEST), tokens.shape)
    hidden = decoder.forward(params, CONFIG, tokens, places, places, attention=lambda q, k, v, _: attend(q, k, v, sees))
    read = jnp.take_along_axis(hidden, edges.node[..., None], axis=1)
    logp = jax.nn.log_softmax(decoder.logits(params, CONFIG, read) / edges.temperature[..., None])
    p = jnp.exp(logp)
    chosen = jnp.take_along_axis(logp, edges.token[..., None], axis=-1)[..., 0]
    return Scores(logp=chosen, entropy=-jnp.sum(p * logp, -1), value=read @ params["value_head"], sum_pi2=jnp.sum(p**2, -1))


def plain_weights(rollouts: Sequence[Rollout], mask: np.ndarray) -> dict[str, np.ndarray]:
    """What each edge of `plain_rows` weighs in the objective, by aggregation: [CALLS, EDGES].

    Args:
      mask: bool [CALLS, EDGES], the edges that are aggregated: all of a call, or the first. A unit's size counts all.
    """
    units = [(f"{r.id} {t.turn}", r.id, r.group, len(t.response_ids)) for r in rollouts for t in r.transitions]
    sizes: Counter[str] = Counter()
    for *names, length in units:
        sizes.update(dict.fromkeys(names, length))
    ones, of_calls, of_rollouts, of_groups = np.zeros((4, CALLS, EDGES))
    for i, (*names, _) in enumerate(units):
        ones[i], of_calls[i], of_rollouts[i], of_groups[i] = (mask[i] / size for size in (1, *(sizes[name] for name in names)))
    return {
        "token_mean": ones / ones.sum(),
        "sequence_mean": of_calls / of_calls.sum(),
        "rollout_mean": of_rollouts / of_rollouts.sum(),
        "group_mean": of_groups / of_groups.sum(),
        "sequence_sum": ones / of_calls.sum(),
        "sequence_sum{'length': 7.0}": ones / (7 * of_calls.sum()),
    }
