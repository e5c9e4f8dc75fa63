"""The tokens of every rollout as plain lists, for oracles of functions over tokens."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from lightningrl.table import Evidence, TokenTable, TransitionTable
from tests.batches import poison


@dataclasses.dataclass
class Token:
    """One token with a loss; its reward is what was paid after it and before the rollout's next token."""

    edge: int
    rollout: int
    group: int
    transition: int
    turn: int
    k: int
    reward: float


def token_sequences(table: TransitionTable, tokens: TokenTable) -> dict[int, list[Token]]:
    """The tokens of each rollout in order, found without any of the library's functions."""
    entries = [n for n in range(len(table.valid)) if table.valid[n]]
    sequences: dict[int, list[Token]] = {}
    for rollout in sorted({int(table.rollout[n]) for n in entries}):
        sequence: list[Token] = []
        mine = sorted((n for n in entries if table.rollout[n] == rollout), key=lambda n: table.turn[n])
        for n in mine:
            edges = [e for e in range(len(tokens.mask)) if tokens.mask[e] and tokens.transition[e] == n]
            for e in sorted(edges, key=lambda e: tokens.k[e]):
                sequence.append(Token(e, rollout, int(table.group[n]), n, int(table.turn[n]), int(tokens.k[e]), 0.0))
            if sequence:
                sequence[-1].reward += float(table.reward[n]) + (float(table.outcome[n, 0]) if n == mine[-1] else 0.0)
        sequences[rollout] = sequence
    return sequences


def shuffled(tokens: TokenTable, seed: int = 1) -> tuple[TokenTable, np.ndarray]:
    """The same edges in another order, and for each where it stood."""
    order = np.random.default_rng(seed).permutation(len(tokens.mask))
    return jax.tree.map(lambda x: np.asarray(x)[order], tokens), order


def token_evidence(tokens: TokenTable, seed: int = 3) -> Evidence:
    """Every field of evidence that is one number a token; anything without a loss too, so that reading it shows."""
    rng = np.random.default_rng(seed)
    shape = np.shape(tokens.mask)
    draw = lambda low, high: rng.uniform(low, high, shape).astype(np.float32)  # noqa: E731
    chance = np.exp(tokens.old_logp)
    return Evidence(
        token_value=draw(-1, 1),
        prm_logp=draw(-3, -0.1),
        prm_ref_logp=draw(-3, -0.1),
        sum_pi2=(chance**2 + draw(0, 1) * (1 - chance) ** 2).astype(np.float32),
    )


def poison_tokens(tokens: TokenTable, evidence: Evidence) -> tuple[TokenTable, Evidence]:
    """NaN in every number of a token without a loss."""
    return poison(tokens, tokens.mask), poison(evidence, tokens.mask)
