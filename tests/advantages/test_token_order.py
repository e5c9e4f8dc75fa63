"""The order of edges against Python's sort, with gaps and without."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl.advantages.token_order import in_order
from lightningrl.segments import next_in_segment
from tests.advantages.token_sequences import shuffled, token_sequences
from tests.batches import make_rollout, make_table, make_tokens

EDGES = 12
TABLE = make_table(make_rollout("a", 1.0, [0.5, 0.0]), make_rollout("a", 0.0, [0.25]), make_rollout("b", 0.5, [0.0]), size=6)
BLANK = make_tokens(TABLE, EDGES)
ORDER = jax.jit(in_order)
EACH = jax.jit(jax.vmap(in_order, in_axes=(None, 0)))


def tokens_of(edges):
    """(transition, k, mask) of each edge."""
    transition, k, mask = zip(*edges, strict=True)
    return dataclasses.replace(BLANK, transition=np.array(transition, np.int32), k=np.array(k, np.int32), mask=np.array(mask))


def without_gaps(seed: int = 0, counts=(3, 0, 2, 4)):
    """Every k once; the rest is padding, and an edge whose k is far outside but wants no loss."""
    edges = [(n, k, True) for n, count in enumerate(counts) for k in range(count)] + [(3, 99, False), (0, 0, False), (0, 0, False)]
    return shuffled(tokens_of(edges), seed)[0]


@st.composite
def drawn_tokens(draw):
    """Gaps, the same k twice, k below 0 and edges without a loss anywhere; half the time no gaps, shuffled."""
    if draw(st.booleans()):
        counts = draw(st.lists(st.integers(0, 3), min_size=4, max_size=4))
        edges = [(n, k, True) for n, count in enumerate(counts) for k in range(count)]
        filling = st.tuples(st.integers(0, 3), st.integers(0, 3), st.just(False))
        edges += [draw(filling) for _ in range(EDGES - len(edges))]
        return tokens_of(draw(st.permutations(edges)))
    edge = st.tuples(st.integers(0, 3), st.integers(-1, 3), st.booleans())
    return tokens_of(draw(st.lists(edge, min_size=EDGES, max_size=EDGES)))


def check(edges, tokens):
    used = sorted(np.flatnonzero(tokens.mask).tolist(), key=lambda e: (tokens.transition[e], tokens.k[e], e))
    filling = EDGES - len(used)
    mine = [int(tokens.transition[e]) for e in used]
    assert edges.order.dtype == jnp.int32 and edges.order.tolist() == used + [EDGES] * filling
    assert edges.transition.tolist() == mine + [0] * filling
    assert edges.rollout.tolist() == [TABLE.rollout[n] for n in mine] + [0] * filling
    assert edges.mask.tolist() == [True] * len(used) + [False] * filling
    assert edges.first.tolist() == [n not in mine[:i] for i, n in enumerate(mine)] + [False] * filling
    assert edges.last.tolist() == [n not in mine[i + 1 :] for i, n in enumerate(mine)] + [False] * filling
    paid = {t.edge: t.reward for sequence in token_sequences(TABLE, tokens).values() for t in sequence}
    assert edges.reward.tolist() == [paid[e] for e in used] + [0.0] * filling


@settings(max_examples=60, deadline=None)
@given(tokens=drawn_tokens())
def test_is_that_of_a_sort(tokens):
    check(ORDER(TABLE, tokens), tokens)


@settings(max_examples=15, deadline=None)
@given(one=drawn_tokens(), other=drawn_tokens())
def test_vmap_over_batches_with_gaps_and_without(one, other):
    both = EACH(TABLE, jax.tree.map(lambda *x: np.stack(x), one, other))
    for i, tokens in enumerate((one, other)):
        check(jax.tree.map(lambda x, i=i: x[i], both), tokens)


@pytest.mark.slow
def test_nothing_is_sorted_unless_there_are_gaps(monkeypatch):
    """Without jit only the branch that is taken runs."""

    def fail(*_):
        raise AssertionError("sorted")

    monkeypatch.setattr(jnp, "lexsort", fail)
    with jax.disable_jit():
        check(in_order(TABLE, without_gaps()), without_gaps())
        for edges in ([(0, 0, True), (0, 2, True)], [(0, 0, True), (0, 0, True)], [(0, 1, True), (1, -1, True)]):
            with pytest.raises(AssertionError, match="sorted"):
                in_order(TABLE, tokens_of(edges))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(tokens=drawn_tokens())
def test_following_is_that_of_a_scan(tokens):
    edges = ORDER(TABLE, tokens)
    x = np.arange(1, EDGES + 1, dtype=np.float32)
    for ids in (edges.rollout, edges.transition):
        assert edges.following(x, ids).tolist() == next_in_segment(x, ids, edges.mask).tolist()


def test_micro_batches_are_flattened_and_put_back():
    tokens = without_gaps()
    cut = jax.tree.map(lambda x: x.reshape(3, 4), tokens)
    edges = ORDER(TABLE, cut)
    check(edges, tokens)
    k = edges.take(cut.k.astype(np.float32))
    assert k.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 0, 0]
    assert edges.put(k, cut).tolist() == np.where(cut.mask, cut.k, 0).tolist()


@pytest.mark.parametrize("size", [0, 1])
def test_no_edges(size):
    tokens = jax.tree.map(lambda x: x[:size], tokens_of([(0, 0, False)] * EDGES))
    edges = ORDER(TABLE, tokens)
    assert edges.order.tolist() == [size] * size and not edges.last.any() and not edges.reward.any()
