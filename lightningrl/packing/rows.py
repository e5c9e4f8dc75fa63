"""Packs transitions into rows.

Within a rollout, a transition whose prompt goes on from an earlier one (its ids start with the earlier prompt + response) shares
that one's tokens: together they are a chain, the simplest trie. Chains are placed first-fit decreasing into rows of the
shortest length that holds them, rows into micro-batches of fixed shape. How they are placed changes no loss: an edge
names its node, and nobody sees another chain (`model.attention.tree_mask`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from flax import struct

from lightningrl.table import Array, TokenTable
from lightningrl.types import Transition


@struct.dataclass
class Rows:
    """The tokens of one micro-batch. Padding has `end` 0: nobody sees it."""

    tokens: Array  # int32 [B, T]
    positions: Array  # int32 [B, T], depth in the trie
    end: Array  # int32 [B, T], one past the last token of the token's subtree


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """The few shapes that the step is compiled for."""

    lengths: tuple[int, ...] = (256,)  # row lengths, ascending
    tokens: int = 2048  # tokens of a micro-batch, B · T
    edges: int = 512  # edges of a micro-batch, E; at least the longest row

    def __post_init__(self) -> None:
        if tuple(sorted(set(self.lengths))) != self.lengths:
            raise ValueError(f"row lengths must ascend, but are {self.lengths}")
        if self.edges < self.lengths[-1]:
            raise ValueError(f"edges={self.edges} must be at least the longest row, {self.lengths[-1]}, so that any row fits")

    def rows(self, length: int, multiple: int) -> int:
        """B for rows of this length: a multiple of the devices that share a batch."""
        return max(multiple, self.tokens // length // multiple * multiple)


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Micro-batches in order, and all their edges as one table of [micro-batches, E]."""

    rows: tuple[Rows, ...]
    edges: TokenTable  # every field [micro-batches, E]; old_logp and ref_logp still 0
    row_tokens: int  # tokens had every transition its own row, without padding
    computed_tokens: int  # tokens in chains

    @property
    def reuse_ratio(self) -> float:
        return self.row_tokens / max(self.computed_tokens, 1)


@dataclasses.dataclass
class _Chain:
    ids: np.ndarray  # the longest member's prompt + response
    members: list[int]  # positions in the list of transitions
    edges: int  # response tokens of all members; a token that several of them hold counts for each


def pack(
    transitions: Sequence[Transition],
    index: Sequence[int],
    rollout: Sequence[int],
    settings: RowSettings,
    *,
    multiple: int = 1,
) -> PackedBatch:
    """Packs some transitions of a table.

    Args:
      transitions: those to pack; index: the entry of each in the TransitionTable; rollout: the rollout of each, as
        transitions share tokens only within one. `multiple`: every B is a multiple of it.

    Raises:
      ValueError: a transition is longer than the longest row, or none was given.
    """
    if not transitions:
        raise ValueError("there is no transition to train on: every rollout failed, or none of its calls is trainable")
    chains = _chains(transitions, rollout, settings.edges)
    longest = max(len(c.ids) for c in chains)
    if longest > settings.lengths[-1]:
        raise ValueError(
            f"a call of {longest} tokens does not fit a row of {settings.lengths[-1]}: raise the row length or lower the context"
        )
    rows: list[Rows] = []
    edges: list[dict[str, np.ndarray]] = []
    for length, group in _by_length(chains, settings.lengths):
        for batch in _fill(group, length, settings.rows(length, multiple), settings.edges):
            made, table = _lay_out(batch, transitions, index, length, settings.rows(length, multiple), settings.edges)
            rows.append(made)
            edges.append(table)
    return PackedBatch(
        rows=tuple(rows),
        edges=TokenTable(**{name: np.stack([e[name] for e in edges]) for name in edges[0]}),
        row_tokens=sum(len(t.prompt_ids) + len(t.response_ids) for t in transitions),
        computed_tokens=sum(len(c.ids) for c in chains),
    )


def _chains(transitions: Sequence[Transition], rollout: Sequence[int], edges: int) -> list[_Chain]:
    """Longest first within a rollout, so that a prefix always meets the chain it is part of. None has more than `edges` edges."""
    by_rollout: dict[int, list[int]] = {}
    for i, r in enumerate(rollout):
        by_rollout.setdefault(r, []).append(i)
    chains: list[_Chain] = []
    for members in by_rollout.values():
        mine: list[_Chain] = []
        ids = {i: np.concatenate([transitions[i].prompt_ids, transitions[i].response_ids]) for i in members}
        for i in sorted(members, key=lambda i: (-len(ids[i]), i)):
            cost = len(transitions[i].response_ids)
            host = next((c for c in mine if c.edges + cost <= edges and np.array_equal(c.ids[: len(ids[i])], ids[i])), None)
            if host is None:
                mine.append(_Chain(ids[i], [i], cost))
            else:
                host.members.append(i)
                host.edges += cost
        chains.extend(mine)
    return chains


def _by_length(chains: list[_Chain], lengths: tuple[int, ...]) -> list[tuple[int, list[_Chain]]]:
    groups: list[list[_Chain]] = [[] for _ in lengths]
    for chain in chains:
        groups[next(i for i, length in enumerate(lengths) if len(chain.ids) <= length)].append(chain)
    return [(length, group) for length, group in zip(lengths, groups, strict=True) if group]


def _fill(chains: list[_Chain], length: int, rows: int, edges: int) -> list[list[list[_Chain]]]:
    """First-fit decreasing: micro-batches of rows of chains, none over its tokens or edges."""
    batches: list[list[list[_Chain]]] = []
    room: list[list[int]] = []  # per batch and row
    edges_left: list[int] = []
    for chain in sorted(chains, key=lambda c: -len(c.ids)):  # stable: ties keep their order
        size, cost = len(chain.ids), chain.edges
        for b in range(len(batches) + 1):
            if b == len(batches):
                batches.append([])
                room.append([])
                edges_left.append(edges)
            if cost > edges_left[b]:
                continue
            row = next((r for r, left in enumerate(room[b]) if left >= size), None)
            if row is None and len(batches[b]) < rows:
                row = len(batches[b])
                batches[b].append([])
                room[b].append(length)
            if row is not None:
                batches[b][row].append(chain)
                room[b][row] -= size
                edges_left[b] -= cost
                break
    return batches


def _lay_out(
    batch: list[list[_Chain]], transitions: Sequence[Transition], index: Sequence[int], length: int, rows: int, edges: int
) -> tuple[Rows, dict[str, np.ndarray]]:
    tokens, positions, end = (np.zeros((rows, length), np.int32) for _ in range(3))
    table = {
        "transition": np.zeros(edges, np.int32),
        "k": np.zeros(edges, np.int32),
        "node": np.zeros(edges, np.int32),
        "token": np.zeros(edges, np.int32),
        "temperature": np.ones(edges, np.float32),
        "old_logp": np.zeros(edges, np.float32),
        "behaviour_logp": np.zeros(edges, np.float32),
        "ref_logp": np.zeros(edges, np.float32),
        "mask": np.zeros(edges, bool),
    }
    at = 0
    for r, row in enumerate(batch):
        offset = 0
        for chain in row:
            span = slice(offset, offset + len(chain.ids))
            tokens[r, span], positions[r, span], end[r, span] = chain.ids, np.arange(len(chain.ids)), span.stop
            for i in chain.members:
                t, n = transitions[i], len(transitions[i].response_ids)
                here = slice(at, at + n)
                table["transition"][here] = index[i]
                table["k"][here] = np.arange(n)
                table["node"][here] = r * length + offset + len(t.prompt_ids) - 1 + np.arange(n)
                table["token"][here] = t.response_ids
                table["temperature"][here] = t.temperature if t.temperature > 0 else 1.0
                table["behaviour_logp"][here] = t.logprobs
                table["mask"][here] = True
                at += n
            offset += len(chain.ids)
    return Rows(tokens=tokens, positions=positions, end=end), table
