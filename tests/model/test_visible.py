"""Blocks of keys that are skipped, against the whole mask."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightningrl.model.attention import tree_mask
from lightningrl.model.visible import block_lists, subtree_end, visible_blocks
from tests.model.tries import random_end


@pytest.mark.slow
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), block=st.sampled_from([1, 4, 8, 24]))
def test_a_block_is_visible_if_one_of_its_tokens_is_seen(seed: int, block: int) -> None:
    end = random_end(np.random.default_rng(seed), 24)[None]
    mask, n = np.asarray(tree_mask(end))[0], 24 // block
    expected = mask.reshape(n, block, n, block).any(axis=(1, 3))
    np.testing.assert_array_equal(visible_blocks(end, block)[0], expected)


def test_two_chains_skip_what_lies_between_them() -> None:
    """Eight blocks of four tokens: a chain of 16, one of 12, then padding. Of 36 blocks on and below the diagonal 10 + 6 + 1 remain."""
    end = np.repeat(np.array([16, 28, 0], np.int32), [16, 12, 4])
    visible = np.asarray(visible_blocks(end, 4))
    assert visible.sum() == 10 + 6 + 1
    assert not visible[4:, :4].any() and not visible[7, :7].any()


def test_lists_name_the_visible_blocks_in_order() -> None:
    visible = np.random.default_rng(0).random((3, 5, 5)) < 0.5
    order, count = (np.asarray(x) for x in block_lists(visible))
    for b, n in np.ndindex(3, 5):
        assert order[b, n, : count[b, n]].tolist() == np.flatnonzero(visible[b, n]).tolist()
        assert sorted(order[b, n]) == list(range(5))


def test_padding_ends_after_itself() -> None:
    np.testing.assert_array_equal(subtree_end(np.array([3, 3, 3, 0, 0], np.int32)), [3, 3, 3, 4, 5])


def test_blocks_that_do_not_divide_a_row_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 10 tokens cannot be cut into blocks of 4"):
        visible_blocks(np.zeros(10, np.int32), 4)
