"""The index of prefixes against a model that remembers whole prefixes and searches them all."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lightningrl.sampler.prefix_cache import Node, PrefixCache

CHUNK = 3


@dataclasses.dataclass
class Brute:
    """Blocks by the prefix that each ends; found by looking at every one of them."""

    blocks: int
    held: dict[tuple[int, ...], list[int]] = dataclasses.field(default_factory=dict)  # prefix: [block, last use, turn]
    clock: int = 0
    turn: int = 0

    def find(self, before: tuple[int, ...], piece: tuple[int, ...]) -> tuple[int, ...] | None:
        wanted = before + piece
        return next((p for p in sorted(self.held) if p[: len(wanted)] == wanted and len(p) - len(before) <= CHUNK), None)

    def insert(self, before: tuple[int, ...], piece: tuple[int, ...]) -> int | None:
        whole = before + piece
        known = next((p for p in self.held if len(before) < len(p) < len(whole) and whole[: len(p)] == p), None)
        if known is not None:
            block = self.held.pop(known)[0]
        else:
            taken = {entry[0] for entry in self.held.values()}
            block = next((b for b in range(self.blocks) if b not in taken), None)  # type: ignore[assignment]
            if block is None:
                block = self._give_up(before)
        if block is not None:
            self.held[whole] = [block, self.clock, self.turn]
        return block

    def _give_up(self, before: tuple[int, ...]) -> int | None:
        last = [p for p in self.held if not any(q != p and q[: len(p)] == p for q in self.held)]
        can = [p for p in last if self.held[p][2] != self.turn and p != before]
        return self.held.pop(min(can, key=lambda p: self.held[p][1]))[0] if can else None

    def touch(self, prefix: tuple[int, ...]) -> None:
        for end in range(len(prefix), 0, -1):
            if prefix[:end] in self.held:
                self.clock += 1
                self.held[prefix[:end]][1] = self.clock


def read(cache: PrefixCache, brute: Brute, prompt: list[int]) -> list[tuple[int, ...]]:
    """Goes down a prompt in both, inserting what is missing; returns the prefixes that were found."""
    node: Node | None = cache.root
    before: tuple[int, ...] = ()
    found_all: list[tuple[int, ...]] = []
    for at in range(0, len(prompt), CHUNK):
        piece = tuple(prompt[at : at + CHUNK])
        assert node is not None
        expected = brute.find(before, piece)
        found = cache.find(node, np.array(piece, np.int32))
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            brute.held[expected][2] = brute.turn
            assert found.block == brute.held[expected][0]
            found_all.append(expected)
            node, before = found, expected
            continue
        brute.clock += 1
        block = brute.insert(before, piece)
        node = cache.insert(node, np.array(piece, np.int32))
        assert (node is None) == (block is None)
        if node is None:
            return found_all
        relabel(brute, before + piece, node.block)
        before = before + piece
    if node is not None:
        cache.touch(node)
        brute.touch(before)
    return found_all


def relabel(brute: Brute, prefix: tuple[int, ...], block: int) -> None:
    """Which free block is taken is of no matter, so long as it is nobody else's."""
    others = [entry[0] for key, entry in brute.held.items() if key != prefix]
    assert block not in others
    brute.held[prefix][0] = block


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=10)


@given(st.integers(1, 8), st.lists(st.lists(prompts, min_size=1, max_size=3), max_size=14))
def test_finds_what_a_search_of_all_prefixes_finds(blocks, turns):
    cache, brute = PrefixCache(blocks, CHUNK), Brute(blocks)
    for turn in turns:
        cache.next_turn()
        brute.turn += 1
        for prompt in turn:
            read(cache, brute, prompt)
            assert len(cache) == len(brute.held) <= blocks


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=12))
def test_with_room_for_all_whatever_was_read_is_known(prompts):
    cache = PrefixCache(1000, CHUNK)
    for prompt in prompts:
        insert_all(cache, prompt)
    cache.next_turn()
    for prompt in prompts:
        for end in range(1, len(prompt) + 1):
            assert walk(cache, prompt[:end]) == end


def insert_all(cache: PrefixCache, prompt: list[int]) -> None:
    node: Node | None = cache.root
    for at in range(0, len(prompt), CHUNK):
        assert node is not None
        piece = np.array(prompt[at : at + CHUNK], np.int32)
        node = cache.find(node, piece) or cache.insert(node, piece)
    assert node is not None
    cache.touch(node)


def walk(cache: PrefixCache, prompt: list[int]) -> int:
    """How many tokens of a prompt are known."""
    node, at = cache.root, 0
    while at < len(prompt):
        found = cache.find(node, np.array(prompt[at : at + CHUNK], np.int32))
        if found is None:
            return at
        node, at = found, min(at + CHUNK, len(prompt))
    return at


def test_a_block_that_was_partly_filled_is_filled_up():
    cache = PrefixCache(4, CHUNK)
    short = cache.insert(cache.root, np.array([5], np.int32))
    longer = cache.insert(cache.root, np.array([5, 6], np.int32))
    assert short is not None and longer is short and len(cache) == 1
    assert cache.find(cache.root, np.array([5], np.int32)) is short


def test_the_least_recently_used_end_is_given_up_first():
    cache = PrefixCache(3, CHUNK)
    for prompt in ([1, 1, 1, 2], [3]):
        cache.next_turn()
        insert_all(cache, prompt)
    cache.next_turn()
    insert_all(cache, [4])
    assert [walk(cache, p) for p in ([1, 1, 1, 2], [3], [4])] == [3, 1, 1]  # not the block that another comes after
    cache.next_turn()
    insert_all(cache, [3])
    cache.next_turn()
    insert_all(cache, [5])
    assert [walk(cache, p) for p in ([1, 1, 1], [3], [4], [5])] == [0, 1, 1, 1]


def test_nothing_of_this_turn_is_given_up_in_it():
    cache = PrefixCache(2, CHUNK)
    cache.next_turn()
    assert [cache.insert(cache.root, np.array([i], np.int32)) is None for i in range(3)] == [False, False, True]
    cache.next_turn()
    assert cache.insert(cache.root, np.array([3], np.int32)) is not None


def test_nodes_from_before_clear_know_nothing():
    cache = PrefixCache(4, CHUNK)
    root = cache.root
    node = cache.insert(root, np.array([1, 2, 3], np.int32))
    assert node is not None
    cache.clear()
    assert cache.find(root, np.array([1, 2, 3], np.int32)) is None
    assert cache.insert(root, np.array([9], np.int32)) is None
    assert cache.insert(node, np.array([9], np.int32)) is None
    cache.touch(node)
    assert len(cache) == 0


def test_a_node_that_was_given_up_takes_no_children():
    cache = PrefixCache(1, CHUNK)
    node = cache.insert(cache.root, np.array([1, 2, 3], np.int32))
    assert node is not None
    cache.next_turn()
    assert cache.insert(cache.root, np.array([4], np.int32)) is not None
    assert cache.insert(node, np.array([5], np.int32)) is None


def test_without_blocks_nothing_is_kept():
    cache = PrefixCache(0, CHUNK)
    assert cache.insert(cache.root, np.array([1], np.int32)) is None
