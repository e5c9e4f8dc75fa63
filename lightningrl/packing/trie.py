"""Token tries as sorted lists: in lexicographic order, transitions that share a prefix stand side by side.

A set of token sequences in that order, with the number of tokens that each shares with the one before it, *is* its trie in
depth-first order: the i-th sequence adds the tokens after those it shares. Every function here is NumPy on such lists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class SortedSequences:
    """Token sequences in lexicographic order; one comes before those that go on from it."""

    tokens: np.ndarray  # int32 [Σ length], one after the other in this order
    start: np.ndarray  # int64 [N], where each begins in `tokens`
    length: np.ndarray  # int64 [N]
    shared: np.ndarray  # int64 [N], tokens shared with the one before; the first shares 0
    index: np.ndarray  # int64 [N], its place in the list that was sorted

    @property
    def added(self) -> np.ndarray:
        """Tokens of the trie that each adds, int64 [N]; their sum is the trie's size."""
        return self.length - self.shared


def sort_sequences(sequences: list[np.ndarray], *, share: bool = True) -> SortedSequences:
    """Sorts token sequences and finds what neighbours share.

    Args:
      sequences: int32 [length] each, ids ≥ 0, none empty. Equal ones keep their order.
      share: false gives every sequence a trie of its own, as plain rows have it.
    """
    # Big-endian bytes of ids ≥ 0 compare as the ids do, and comparing bytes is the quickest sort there is for them.
    keys = [ids.astype(">u4").tobytes() for ids in sequences]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    tokens = np.frombuffer(b"".join(keys[i] for i in order), ">u4").astype(np.int32)
    length = np.array([len(sequences[i]) for i in order], np.int64)
    start = np.cumsum(length) - length
    shared = _shared_with_the_one_before(tokens, start, length) if share else np.zeros_like(length)
    return SortedSequences(tokens, start, length, shared, np.array(order, np.int64))


def _shared_with_the_one_before(tokens: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    shared = np.zeros_like(length)
    if len(length) < 2:
        return shared
    both = np.minimum(length[1:], length[:-1])
    depth = ranges(both)
    differs = tokens[np.repeat(start[1:], both) + depth] != tokens[np.repeat(start[:-1], both) + depth]
    # The first difference of each pair; a pair without one shares all that the shorter holds.
    shared[1:] = np.minimum.reduceat(np.where(differs, depth, np.repeat(both, both)), np.cumsum(both) - both)
    return shared


def ranges(counts: np.ndarray) -> np.ndarray:
    """0 … c-1 for every count c, one after the other: int64 [Σ counts]."""
    return np.arange(counts.sum(), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)


def split(sequences: SortedSequences, edges: np.ndarray, *, tokens: int, most_edges: int) -> Iterator[tuple[int, int]]:
    """Cuts a list into pieces whose tries hold at most `tokens` tokens and `most_edges` edges; each piece repeats the path above it.

    A piece that is too large is cut where neighbours share least, so that what is repeated is short; small pieces on either
    side of a cut stay together while they fit.

    Args:
      edges: int64 [N], the edges of each sequence, at most `most_edges`.
      tokens: at least the longest sequence.

    Yields:
      (first, end) of every piece, in order; together they are the whole list.
    """
    # A sequence that the next one goes on from costs nothing beside it: such a run is one unit, unless it has too many edges.
    goes_on = np.append(sequences.shared[1:] == sequences.length[:-1], False)
    bounds, total = [0], 0
    for i, count in enumerate(edges.tolist()):
        if i and (not goes_on[i - 1] or total + count > most_edges):
            bounds.append(i)
            total = 0
        total += count
    units = np.array([*bounds, len(edges)])
    before_edges = np.concatenate([[0], np.cumsum(edges)])
    before_added = np.concatenate([[0], np.cumsum(sequences.added)])
    repeated = sequences.shared[units[:-1]]  # what a unit shares with the one before, and repeats where a piece begins with it

    def fits(first: int, end: int) -> bool:
        a, b = units[first], units[end]
        return bool(before_added[b] - before_added[a] + repeated[first] <= tokens and before_edges[b] - before_edges[a] <= most_edges)

    todo = [(0, len(units) - 1)] if len(edges) else []
    while todo:
        first, end = todo.pop()
        if end - first == 1 or fits(first, end):
            yield int(units[first]), int(units[end])
            continue
        inner = repeated[first + 1 : end]
        cuts = [first, *(first + 1 + np.flatnonzero(inner == inner.min())).tolist(), end]
        parts, at = [], 0
        while at < len(cuts) - 1:
            to = at + 1
            while to < len(cuts) - 1 and fits(cuts[at], cuts[to + 1]):
                to += 1
            parts.append((cuts[at], cuts[to]))
            at = to
        todo.extend(reversed(parts))


@dataclasses.dataclass(frozen=True)
class Layout:
    """The trie of some sequences as a stretch of a row. T is its number of tokens."""

    tokens: np.ndarray  # int32 [T], depth first
    positions: np.ndarray  # int32 [T], depth
    end: np.ndarray  # int32 [T], one past the last token of the token's subtree
    nodes: list[np.ndarray]  # per sequence int64 [length]: where its tokens lie


def lay_out(sequences: SortedSequences, members: np.ndarray) -> Layout:
    """The trie of some of the sequences, depth first.

    Args:
      members: int64 [M], ascending places in `sequences`.
    """
    shared = np.zeros(len(members), np.int64)
    for m in range(1, len(members)):
        before, here = members[m - 1], members[m]
        # What two of a sorted list share is the least that neighbours between them share.
        shared[m] = sequences.shared[here] if here == before + 1 else sequences.shared[before + 1 : here + 1].min()
    length = sequences.length[members]
    added = length - shared
    first = np.cumsum(added) - added
    depth = ranges(added) + np.repeat(shared, added)
    tokens = sequences.tokens[np.repeat(sequences.start[members], added) + depth]

    size, deepest = int(added.sum()), int(length.max(initial=0))
    end, nodes = np.empty(size, np.int32), []
    path = np.zeros(deepest, np.int64)
    spans = list(zip(shared.tolist(), length.tolist(), first.tolist(), added.tolist(), strict=True))
    for low, high, at, count in spans:
        path[low:high] = np.arange(at, at + count)
        nodes.append(path[:high].copy())
    # A token's subtree ends where the next sequence begins that shares no more than the tokens above it.
    next_branch = np.full(deepest, size, np.int32)
    for low, high, at, count in reversed(spans):
        end[at : at + count] = next_branch[low:high]
        next_branch[low:] = at
    return Layout(tokens, depth.astype(np.int32), end, nodes)
