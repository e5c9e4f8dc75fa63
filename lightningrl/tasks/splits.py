"""Which questions are held out: of every kind the same share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np


class Kinded(Protocol):
    @property
    def kind(self) -> str: ...


Q = TypeVar("Q", bound=Kinded)


def held_out(questions: Sequence[Q], count: int, seed: int) -> list[Q]:
    """`count` of the questions, or all if they are fewer: of each kind about the same share, in seeded order."""
    by_kind: dict[str, list[Q]] = {}
    for i in np.random.default_rng([seed, 0x5B117]).permutation(len(questions)):
        by_kind.setdefault(questions[i].kind, []).append(questions[i])
    # By how far into its kind a question stands: cut anywhere, the list has taken about the same share of every kind.
    ranked = sorted(
        (((rank + 0.5) / len(members), kind, question) for kind, members in by_kind.items() for rank, question in enumerate(members)),
        key=lambda entry: entry[:2],
    )
    return [question for _, _, question in ranked[:count]]
