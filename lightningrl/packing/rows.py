"""Packs transitions into rows of fixed shape, each distinct token once.

The transitions of a batch, sorted, are one token trie (`packing.trie`). It is cut into pieces that fit a row, the pieces are
placed first-fit decreasing into rows, rows into micro-batches of fixed shape. How they are placed changes no loss: an edge
names its node, and a token sees only those above it in its trie (`model.attention.tree_mask`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from flax import struct

from lightningrl.packing.trie import SortedSequences, lay_out, ranges, sort_sequences, split
from lightningrl.table import Array, TokenTable
from lightningrl.types import Transition

MOST_EDGES = 8  # times `RowSettings.edges`: the largest edge table of a micro-batch


@struct.dataclass
class Rows:
    """The tokens of one micro-batch. Padding has `end` 0: nobody sees it."""

    tokens: Array  # int32 [B, T]
    positions: Array  # int32 [B, T], depth in the trie
    end: Array  # int32 [B, T], one past the last token of the token's subtree


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """The few shapes that the step is compiled for: every row length with B or B/2 rows and E = edges, 2 · edges, … MOST_EDGES · edges."""

    lengths: tuple[int, ...] = (256,)  # row lengths, ascending
    tokens: int = 1024  # tokens of a micro-batch, B · T
    edges: int = 256  # edges of a micro-batch, at least; no less than the longest row

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
    computed_tokens: int  # tokens in tries

    @property
    def reuse_ratio(self) -> float:
        return self.row_tokens / max(self.computed_tokens, 1)


def pack(
    transitions: Sequence[Transition],
    index: Sequence[int],
    settings: RowSettings,
    *,
    multiple: int = 1,
    share: bool = True,
) -> PackedBatch:
    """Packs some transitions of a table.

    Args:
      transitions: those to pack; index: the entry of each in the TransitionTable. `multiple`: every B is a multiple of it.
      share: false computes every transition's tokens for itself; the loss is the same, but for rounding.

    Raises:
      ValueError: a transition is longer than the longest row, or none was given.
    """
    if not transitions:
        raise ValueError("there is no transition to train on: every rollout failed, or none of its calls is trainable")
    sequences = sort_sequences([np.concatenate([t.prompt_ids, t.response_ids]) for t in transitions], share=share)
    longest, capacity = int(sequences.length.max()), settings.lengths[-1]
    if longest > capacity:
        raise ValueError(f"a call of {longest} tokens does not fit a row of {capacity}: raise the row length or lower the context")
    responses = np.array([len(transitions[i].response_ids) for i in sequences.index], np.int64)
    most_edges = _edges(settings, multiple, int(responses.sum()), int(sequences.added.sum()))
    pieces = [
        _Piece(np.arange(a, b), int(sequences.added[a:b].sum() + sequences.shared[a]), int(responses[a:b].sum()))
        for a, b in split(sequences, responses, tokens=capacity, most_edges=most_edges)
    ]
    rows: list[Rows] = []
    edges: list[dict[str, np.ndarray]] = []
    computed = 0
    for length, group in _by_length(pieces, settings.lengths):
        count = settings.rows(length, multiple)
        for batch in _first_fit_decreasing(group, length, count, most_edges):
            # The last micro-batch may be nearly empty: half of it is left out where half is enough.
            half = count // 2
            used = half if half and half % multiple == 0 and not any(batch[half:]) else count
            made, members, nodes = _lay_out(batch[:used], sequences, length, used)
            chosen = sequences.index[members].tolist()
            rows.append(made)
            computed += int(np.count_nonzero(made.end))
            edges.append(_edge_table([transitions[i] for i in chosen], [index[i] for i in chosen], nodes, most_edges))
    return PackedBatch(
        rows=tuple(rows),
        edges=TokenTable(**{name: np.stack([e[name] for e in edges]) for name in edges[0]}),
        row_tokens=int(sequences.length.sum()),
        computed_tokens=computed,
    )


@dataclasses.dataclass(frozen=True)
class _Piece:
    members: np.ndarray  # int64, places in the sorted sequences, ascending
    tokens: int
    edges: int  # response tokens of all members; a token that several of them hold counts for each


def _edges(settings: RowSettings, multiple: int, edges: int, tokens: int) -> int:
    """E: the smallest table that does not have a micro-batch run out of edges before it runs out of tokens, with a tenth to spare.

    Where `multiple` asks for more rows than the settings, a micro-batch holds more tokens, and gets as many times the edges.
    """
    most = max(settings.rows(length, multiple) * length for length in settings.lengths)
    times = max(1, -(-most // settings.tokens))
    wanted = min(edges, 1.1 * edges * times * settings.tokens / tokens)
    least = times * settings.edges
    size = least
    while size < wanted and size < MOST_EDGES * least:
        size *= 2
    return size


def _by_length(pieces: list[_Piece], lengths: tuple[int, ...]) -> list[tuple[int, list[_Piece]]]:
    groups: list[list[_Piece]] = [[] for _ in lengths]
    for piece in pieces:
        groups[next(i for i, length in enumerate(lengths) if piece.tokens <= length)].append(piece)
    return [(length, group) for length, group in zip(lengths, groups, strict=True) if group]


def _first_fit_decreasing(pieces: list[_Piece], length: int, rows: int, edges: int) -> list[list[list[_Piece]]]:
    """Micro-batches of rows of pieces, none over its tokens or edges."""
    placed: list[list[_Piece]] = []  # of every row
    room = np.zeros(0, np.int64)  # of every row, its tokens left
    edges_left = np.zeros(0, np.int64)  # of every micro-batch
    for piece in sorted(pieces, key=lambda p: -p.tokens):  # stable: ties keep their order
        fits = (room >= piece.tokens) & (np.repeat(edges_left, rows) >= piece.edges)
        if not fits.any():
            placed += [[] for _ in range(rows)]
            room, edges_left = np.append(room, np.full(rows, length)), np.append(edges_left, edges)
            fits = np.append(fits, np.ones(rows, bool))
        row = int(np.argmax(fits))
        placed[row].append(piece)
        room[row] -= piece.tokens
        edges_left[row // rows] -= piece.edges
    return [placed[i : i + rows] for i in range(0, len(placed), rows)]


def _lay_out(batch: list[list[_Piece]], sequences: SortedSequences, length: int, rows: int) -> tuple[Rows, np.ndarray, list[np.ndarray]]:
    """The rows, and of every sequence in them its place in the sorted list and its tokens' places in the rows, end to end."""
    tokens, positions, end = (np.zeros((rows, length), np.int32) for _ in range(3))
    all_members, all_nodes = [], []
    for r, row in enumerate(batch):
        if row:
            members = np.sort(np.concatenate([piece.members for piece in row]))  # side by side, pieces of one trie share again
            made = lay_out(sequences, members)
            span = slice(0, len(made.tokens))
            tokens[r, span], positions[r, span], end[r, span] = made.tokens, made.positions, made.end
            all_members.append(members)
            all_nodes += [nodes + r * length for nodes in made.nodes]
    return Rows(tokens=tokens, positions=positions, end=end), np.concatenate(all_members), all_nodes


def _edge_table(transitions: list[Transition], index: list[int], nodes: list[np.ndarray], size: int) -> dict[str, np.ndarray]:
    """The response tokens of some transitions, one after the other, padded to `size`. A token's node is the one before it."""
    counts = np.array([len(t.response_ids) for t in transitions], np.int64)

    def column(values: np.ndarray, dtype: type, padding: float = 0) -> np.ndarray:
        return np.concatenate([values.astype(dtype), np.full(size - len(values), padding, dtype)])

    def joined(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(arrays) if arrays else np.zeros(0)

    return {
        "transition": column(np.repeat(index, counts), np.int32),
        "k": column(ranges(counts), np.int32),
        "node": column(joined([n[len(t.prompt_ids) - 1 : len(n) - 1] for n, t in zip(nodes, transitions, strict=True)]), np.int32),
        "token": column(joined([t.response_ids for t in transitions]), np.int32),
        # A greedy call is scored as what it was drawn from, at temperature 1.
        "temperature": column(np.repeat([t.temperature if t.temperature > 0 else 1.0 for t in transitions], counts), np.float32, 1),
        "old_logp": np.zeros(size, np.float32),
        "behaviour_logp": column(joined([t.logprobs for t in transitions]), np.float32),
        "ref_logp": np.zeros(size, np.float32),
        "mask": column(np.ones(int(counts.sum())), bool),
    }
