"""Made-up batches for bench_credit.py: of rollouts of several calls, and of one call a rollout in the rows that other libraries have."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lightningrl.table import Array, Evidence, TokenTable, TransitionTable, Tree

GROUP, CALLS = 8, 8  # rollouts of a group, calls of a rollout at most


@dataclasses.dataclass(frozen=True)
class Batch:
    table: TransitionTable
    tokens: TokenTable


def make_batch(transitions: int, lengths: np.ndarray, calls: np.ndarray, seed: int) -> Batch:
    """Rollouts of `calls` calls, in groups of eight; two states at each turn of a group, so that rollouts meet.

    Args:
      lengths: int[N], tokens of each response; calls: int[R], calls of each rollout, N in all.
    """
    rng = np.random.default_rng(seed)
    rollout = np.repeat(np.arange(len(calls)), calls)
    turn = np.arange(transitions) - np.repeat(np.cumsum(calls) - calls, calls)
    group, starts = rollout // GROUP, turn == 0
    last = np.append(starts[1:], True)
    state = number((group * CALLS + turn) * 2 + rng.integers(0, 2, transitions))
    anchor = [state]
    for _ in range(2):
        before = np.where(starts, -1, np.roll(anchor[-1], 1))
        anchor.append(number(state * (transitions + 1) + before + 1))
    outcome = rng.integers(0, 2, len(calls)).astype(np.float32)[rollout][:, None]
    i32, every = functools.partial(np.asarray, dtype=np.int32), np.ones(transitions, bool)
    table = TransitionTable(
        rollout=i32(rollout),
        group=i32(group),
        turn=i32(turn),
        role=np.zeros(transitions, np.int32),
        reward=(rng.integers(0, 2, transitions) * np.float32(-0.25)).astype(np.float32),
        outcome=outcome,
        num_tokens=i32(lengths),
        weight=(1.0 / calls[rollout]).astype(np.float32),
        trainable=every,
        valid=every,
        anchor=i32(np.stack(anchor, 1)),
        next_anchor=i32(np.where(last, -1, np.roll(state, -1))),
        action=i32(number(state * 2 + rng.integers(0, 2, transitions))),
        tree=Tree(
            tree=i32(rollout),
            parent=i32(np.where(starts, -1, np.arange(transitions) - 1)),
            path_node=np.arange(transitions, dtype=np.int32),
            path_rollout=i32(rollout),
            path_outcome=outcome,
            path_valid=every,
        ),
    )
    edges = int(lengths.sum())
    logp = -rng.exponential(size=edges).astype(np.float32)
    tokens = TokenTable(
        transition=np.repeat(np.arange(transitions, dtype=np.int32), lengths),
        k=i32(np.arange(edges) - np.repeat(np.cumsum(lengths) - lengths, lengths)),
        node=np.arange(edges, dtype=np.int32),
        token=np.zeros(edges, np.int32),
        temperature=np.ones(edges, np.float32),
        old_logp=logp,
        behaviour_logp=logp,
        ref_logp=logp - np.float32(0.1),
        mask=np.ones(edges, bool),
    )
    return Batch(*jax.tree.map(jnp.asarray, (table, tokens)))


def ragged(transitions: int, longest: int, seed: int) -> Batch:
    """Rollouts of one to eight calls, responses of one token to `longest`."""
    rng = np.random.default_rng([seed, 1])
    calls = rng.integers(1, CALLS + 1, transitions)
    calls = calls[: np.searchsorted(np.cumsum(calls), transitions) + 1]
    calls[-1] -= calls.sum() - transitions
    return make_batch(transitions, rng.integers(1, longest + 1, transitions), calls, seed)


def number(keys: np.ndarray) -> np.ndarray:
    return np.unique(keys, return_inverse=True)[1]


def make_evidence(batch: Batch, needs: Sequence[str], seed: int = 0) -> Evidence:
    """Numbers in (-1, 0) of the shape that the comment on each field says: log-probs, or values as good as any."""
    rng = np.random.default_rng([seed, 2])
    size = {
        "N": batch.table.valid.shape[0],
        "E": batch.tokens.mask.shape[0],
        "R": int(batch.table.rollout[-1]) + 1,
        "2^M": 2**CALLS,
        "2": 2,
    }
    shapes = dict(re.findall(r"^    (\w+): .*?# float32 \[([^\]]+)\]", inspect.getsource(Evidence), re.MULTILINE))
    fields = {need: -rng.random([size[axis] for axis in shapes[need].split(", ")], np.float32) for need in needs}
    return Evidence(**{name: jnp.asarray(-x if name in ("sum_pi2", "attention") else x) for name, x in fields.items()})


def rows(transitions: int, longest: int, masked: bool, seed: int, path: str) -> tuple[Batch, Evidence, np.ndarray]:
    """A batch of one call a rollout, its evidence, and where its edges lie in rows; written to a file in rows."""
    rng = np.random.default_rng([seed, 3])
    lengths = rng.integers(1, longest + 1, transitions) if masked else np.full(transitions, longest)
    batch = make_batch(transitions, lengths, np.ones(transitions, int), seed)
    table = dataclasses.replace(batch.table, reward=jnp.zeros(transitions, jnp.float32))
    mask = np.arange(longest) < lengths[:, None]
    values = rng.normal(size=mask.shape).astype(np.float32)
    greedy = rng.integers(0, 2, transitions).astype(np.float32)
    behaviour = np.asarray(batch.tokens.old_logp) + rng.normal(0, 0.3, int(lengths.sum())).astype(np.float32)
    in_rows = functools.partial(spread_over_rows, mask)
    chosen = np.exp(in_rows(batch.tokens.old_logp))
    sum_pi2 = chosen**2 + (1 - chosen) ** 2 * rng.random(mask.shape, np.float32)  # the rest of a distribution has up to (1 - π)²
    rewards = in_rows(np.asarray(batch.tokens.k) == lengths[batch.tokens.transition] - 1) * np.asarray(table.outcome)
    rho = np.exp(np.asarray(batch.tokens.old_logp) - behaviour)
    np.savez(
        path,
        rewards=rewards.astype(np.float32),
        mask=mask.astype(np.float32),
        values=values * mask,
        logp=in_rows(batch.tokens.old_logp),
        sum_pi2=sum_pi2,
        greedy=greedy,
        rho=in_rows(rho),
        group=np.asarray(table.group),
    )
    evidence = Evidence(token_value=values[mask], sum_pi2=sum_pi2[mask], greedy_reward=greedy)
    tokens = dataclasses.replace(batch.tokens, behaviour_logp=jnp.asarray(behaviour))
    return Batch(table, tokens), jax.tree.map(jnp.asarray, evidence), mask


def spread_over_rows(mask: np.ndarray, x: Array) -> np.ndarray:
    result = np.zeros(mask.shape, np.float32)
    result[mask] = np.asarray(x)
    return result
