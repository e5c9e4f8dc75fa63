"""Which prompt prefixes have been read already: the host's index of the blocks that hold their keys and values.

A radix tree. An edge is a piece of a prompt, at most `chunk` tokens from a multiple of `chunk` on; its node is a block of the
pool that `steps.prefill` wrote. A token's keys and values depend on the tokens up to it alone, so a block also serves a prompt
that ends within it. Only prefill writes blocks: decoding gives the same token other last bits.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import OrderedDict

import numpy as np


@dataclasses.dataclass(eq=False)
class Node:
    """A block and the pieces that follow it. No piece of one node begins another."""

    parent: Node | None
    piece: bytes  # big-endian, so that pieces sort as their tokens do
    block: int  # -1: the root, or no longer in the tree
    used: int  # the turn it was last asked for
    order: list[bytes] = dataclasses.field(default_factory=list)  # of the children's pieces, rising
    children: dict[bytes, Node] = dataclasses.field(default_factory=dict)


class PrefixCache:
    """An index of `blocks` blocks, with the least recently used given up first.

    A turn is what happens between two calls of `next_turn`; what a turn has found or inserted is not given up in it, so that no
    block is written for two prefixes at once.
    """

    def __init__(self, blocks: int, chunk: int) -> None:
        self.blocks, self.chunk = blocks, chunk
        self.clear()

    def clear(self) -> None:
        """Forgets everything. Nodes handed out before are of no tree any more: they find and insert nothing."""
        self._turn = 0
        self.root = Node(None, b"", -1, 0)
        self._free = list(range(self.blocks))[::-1]
        self._by_use: OrderedDict[int, Node] = OrderedDict()  # by block, least recently used first

    def __len__(self) -> int:
        return len(self._by_use)

    def next_turn(self) -> None:
        self._turn += 1

    def find(self, node: Node, piece: np.ndarray) -> Node | None:
        """The block after `node` that holds `piece`, at most `chunk` tokens, perhaps with others after them."""
        wanted = _key(piece)
        at = bisect.bisect_left(node.order, wanted)
        if not self._in_tree(node) or at == len(node.order) or not node.order[at].startswith(wanted):
            return None
        child = node.children[node.order[at]]
        child.used = self._turn
        return child

    def insert(self, node: Node, piece: np.ndarray) -> Node | None:
        """A block after `node` for a piece that `find` doesn't know; the caller fills it. None if there is no block to be had."""
        if not self._in_tree(node):
            return None
        wanted = _key(piece)
        at = bisect.bisect_left(node.order, wanted)
        if at and wanted.startswith(node.order[at - 1]):  # the same block, as far as it was known: it is filled up
            child = node.children.pop(node.order[at - 1])
            child.piece = node.order[at - 1] = wanted
        else:
            block = self._take_block(node)
            if block is None:
                return None
            child = self._by_use[block] = Node(node, wanted, block, self._turn)
            node.order.insert(bisect.bisect_left(node.order, wanted), wanted)
        child.used = self._turn
        node.children[wanted] = child
        return child

    def touch(self, node: Node) -> None:
        """Everything up to `node` has just been used."""
        while self._in_tree(node) and node.parent is not None:  # from the end, so that what is given up has nothing after it
            self._by_use.move_to_end(node.block)
            node = node.parent

    def _in_tree(self, node: Node) -> bool:
        return node is self.root or (node.block >= 0 and self._by_use.get(node.block) is node)

    def _take_block(self, keep: Node) -> int | None:
        if self._free:
            return self._free.pop()
        for node in self._by_use.values():
            if not node.children and node.used != self._turn and node is not keep:
                assert node.parent is not None
                del self._by_use[node.block], node.parent.children[node.piece]
                del node.parent.order[bisect.bisect_left(node.parent.order, node.piece)]
                block, node.block = node.block, -1
                return block
        return None


def _key(piece: np.ndarray) -> bytes:
    return piece.astype(">u4").tobytes()
