"""The trie of any set of sequences is the one that a dictionary of prefixes gives, however it is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightningrl.packing.trie import SortedSequences, lay_out, ranges, sort_sequences, split

# Few ids and short sequences, so that equal ones, prefixes and branches all occur.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=14)


def arrays(sequences: list[list[int]]) -> list[np.ndarray]:
    return [np.array(ids, np.int32) for ids in sequences]


def prefixes(sequences: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(ids[: n + 1]) for ids in sequences for n in range(len(ids))}


def row(made: SortedSequences, i: int) -> list[int]:
    return made.tokens[made.start[i] : made.start[i] + made.length[i]].tolist()


@given(SEQUENCES)
def test_sorting_keeps_every_sequence_and_finds_what_neighbours_share(sequences: list[list[int]]) -> None:
    made = sort_sequences(arrays(sequences))
    rows = [row(made, i) for i in range(len(sequences))]
    assert rows == sorted(sequences)
    assert [sequences[i] for i in made.index] == rows
    for i in range(1, len(rows)):
        a, b = rows[i - 1], rows[i]
        assert made.shared[i] == next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert made.shared[0] == 0
    assert made.added.sum() == len(prefixes(sequences))


def test_ids_are_ordered_as_numbers_and_not_by_their_bytes_alone() -> None:
    made = sort_sequences(arrays([[256], [1, 0], [1], [70_000], [255]]))
    assert [row(made, i) for i in range(5)] == [[1], [1, 0], [255], [256], [70_000]]


def test_plain_rows_share_nothing() -> None:
    made = sort_sequences(arrays([[1, 2], [1, 2], [1]]), share=False)
    assert made.shared.tolist() == [0, 0, 0]


@given(SEQUENCES, st.data())
def test_the_layout_of_any_members_is_their_trie_depth_first(sequences: list[list[int]], data: st.DataObject) -> None:
    made = sort_sequences(arrays(sequences))
    chosen = data.draw(st.lists(st.integers(0, len(sequences) - 1), min_size=1, unique=True).map(sorted))
    layout = lay_out(made, np.array(chosen))
    rows = [row(made, i) for i in chosen]

    order = sorted(prefixes(rows))  # of prefixes, lexicographic order is depth first
    assert layout.tokens.tolist() == [p[-1] for p in order]
    assert layout.positions.tolist() == [len(p) - 1 for p in order]
    subtree = [sum(q[: len(p)] == p for q in order) for p in order]
    assert layout.end.tolist() == [i + size for i, size in enumerate(subtree)]
    for ids, nodes in zip(rows, layout.nodes, strict=True):
        assert [order[n] for n in nodes] == [tuple(ids[: n + 1]) for n in range(len(ids))]


@given(SEQUENCES, st.integers(8, 24), st.integers(8, 16), st.randoms(use_true_random=False))
def test_pieces_are_the_whole_list_and_each_fits(sequences: list[list[int]], tokens: int, most_edges: int, random: object) -> None:
    made = sort_sequences(arrays(sequences))
    edges = np.array([random.randint(0, len(ids)) for ids in sequences], np.int64)  # type: ignore[attr-defined]
    pieces = list(split(made, edges, tokens=tokens, most_edges=most_edges))
    assert [first for first, _ in pieces] == [0, *(end for _, end in pieces[:-1])]
    assert pieces[-1][1] == len(sequences)
    for first, end in pieces:
        assert 0 < len(prefixes([row(made, i) for i in range(first, end)])) <= tokens
        assert edges[first:end].sum() <= most_edges


def test_what_fits_is_not_cut_and_what_does_not_is_cut_where_least_is_shared() -> None:
    # Two prompts of four tokens with three answers each; a piece of eight tokens holds one prompt and its answers.
    made = sort_sequences(arrays([[p, 1, 1, 1, a] for p in (1, 2) for a in (1, 2, 3)]))
    none = np.zeros(6, np.int64)
    assert list(split(made, none, tokens=14, most_edges=1)) == [(0, 6)]
    assert list(split(made, none, tokens=13, most_edges=1)) == [(0, 3), (3, 6)]
    assert list(split(made, none, tokens=6, most_edges=1)) == [(0, 2), (2, 3), (3, 5), (5, 6)]


def test_a_call_and_those_that_go_on_from_it_stay_together() -> None:
    made = sort_sequences(arrays([[1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 9]]))
    assert list(split(made, np.zeros(4, np.int64), tokens=4, most_edges=1)) == [(0, 3), (3, 4)]


@pytest.mark.parametrize("counts", [[], [0], [3, 0, 2]])
def test_ranges(counts: list[int]) -> None:
    assert ranges(np.array(counts, np.int64)).tolist() == [k for c in counts for k in range(c)]
