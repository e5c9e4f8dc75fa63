"""The slots on the host: who sits where, and the plan of a turn."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lightningrl.sampler.prefix_cache import PrefixCache
from lightningrl.sampler.request import Request
from lightningrl.sampler.steps import Plan, SlotState, TurnShape


class Slots:
    """Requests in their slots, with the state that decoding needs of them."""

    def __init__(self, count: int, usable: int) -> None:
        self.requests: list[Request | None] = [None] * usable
        self.integers, self.floats = np.zeros((8, count), np.int32), np.ones((2, count), np.float32)
        self.state = SlotState.of(self.integers, self.floats)  # views

    def taken(self) -> Iterator[tuple[int, Request]]:
        return ((slot, r) for slot, r in enumerate(self.requests) if r is not None)

    def free(self) -> list[int]:
        return [slot for slot, r in enumerate(self.requests) if r is None]

    def in_use(self) -> int:
        return sum(r is not None for r in self.requests)

    def activate(self) -> list[tuple[int, Request]]:
        """Lets the slots decode whose prompts have been read; returns all that decode."""
        st, active = self.state, []
        for slot, request in self.taken():
            if not request.active and request.read == request.to_read:
                p, request.active = request.params, True
                st.token[slot], st.position[slot], st.generated[slot] = request.prompt[-1], request.to_read, 0
                st.max_tokens[slot], st.top_k[slot], st.alternatives[slot] = p.max_tokens, p.top_k, p.top_logprobs > 0
                st.key[:, slot] = np.array(request.key, np.uint32).view(np.int32)
                st.temperature[slot], st.top_p[slot] = p.temperature, p.top_p
            if request.active:
                active.append((slot, request))
        return active

    def advance(self, slot: int, tokens: np.ndarray) -> None:
        """Notes what a slot has decoded."""
        st = self.state
        st.token[slot] = tokens[-1]
        st.position[slot] += len(tokens)
        st.generated[slot] += len(tokens)

    def release(self, slot: int) -> None:
        self.requests[slot] = None
        st = self.state
        st.max_tokens[slot] = st.generated[slot] = st.position[slot] = 0
        # An idle slot's settings must not switch on what only some requests need.
        st.alternatives[slot], st.top_k[slot], st.top_p[slot] = 0, 0, 1.0


def plan_reading(slots: Slots, prefixes: PrefixCache, shape: TurnShape, plan: Plan, scratch: int) -> int:
    """Fills the plan's loads and pieces, as far as they fit; returns how many prompt tokens need not be computed.

    A piece that another prompt reads in this turn is not read twice: it is loaded after, if nothing is to be read behind it, and
    otherwise found in the next turn.

    Args:
      scratch: the block that is written where none is to be kept.
    """
    prefixes.next_turn()
    counts, pieces = np.asarray(plan.counts), np.asarray(plan.pieces)  # views
    counts[0], cached = _take_known(slots, prefixes, np.asarray(plan.before), shape.chunk)
    count = 0
    for slot, request in slots.taken():
        while request.read < request.to_read and count < shape.pieces:
            piece, block = request.piece(shape.chunk), scratch
            if request.node is not None:
                if prefixes.find(request.node, piece) is not None:
                    break
                request.node = prefixes.insert(request.node, piece)
                block = scratch if request.node is None else request.node.block
            pieces[count, :3] = slot, request.read, block
            pieces[count, 3 : 3 + len(piece)] = piece
            request.read += len(piece)
            count += 1
    pieces[count:, 0], pieces[count:, 2] = shape.slots, scratch
    counts[1] = -(-count // shape.rows)
    counts[2], more = _take_known(slots, prefixes, np.asarray(plan.after), shape.chunk)
    for _, request in slots.taken():
        if request.node is not None and not request.active:
            prefixes.touch(request.node)
    return cached + more


def _take_known(slots: Slots, prefixes: PrefixCache, loads: np.ndarray, chunk: int) -> tuple[int, int]:
    """Lists the blocks that go on where the slots are; returns how many, and how many tokens of the prompts they hold."""
    count = cached = 0
    for slot, request in slots.taken():
        while request.node is not None and request.read < request.to_read and count < len(loads):
            piece = request.piece(chunk)
            found = prefixes.find(request.node, piece)
            if found is None:
                break
            loads[count] = found.block, 0, slot, request.read
            request.node, request.read = found, request.read + len(piece)
            count += 1
            cached += len(piece)
    return count, cached
