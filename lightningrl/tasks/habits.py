"""How an imperfect demonstrator chooses: right some of the time on every kind of question, else a habit of that kind."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Choice = TypeVar("Choice")


def right_share(kind: str, between: tuple[float, float], seed: int) -> float:
    """How often questions of a kind are done right, from the range: on some kinds more often than any mistake, on others not."""
    low, high = between
    return low + (high - low) * int.from_bytes(_digest(f"{seed}/{kind}"), "big") / 2**64


def fondness(kind: str, mistake: str, seed: int) -> bytes:
    """Sorts the mistakes about a kind of question, the dearest to the demonstrator first."""
    return _digest(f"{seed}/{kind}/{mistake}")


def choose(gold: Choice, mistakes: Sequence[Choice], right: float, favourite: float, rng: np.random.Generator) -> Choice:
    """The gold choice with probability `right`; else the first mistake with `favourite`, and the others share what is left."""
    if rng.random() < right:
        return gold
    if rng.random() < favourite or len(mistakes) == 1:
        return mistakes[0]
    return mistakes[1 + int(rng.integers(len(mistakes) - 1))]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
