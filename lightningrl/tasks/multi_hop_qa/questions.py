"""A question of several hops, and what an agent that has habits may do about it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One way through a question: searches in order, and the answer that is read off what they find."""

    kind: str  # "gold", or the mistake
    searches: tuple[str, ...]
    answer: str


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about one corpus."""

    id: str  # unique over the corpora of a run
    corpus: str  # path of the corpus file
    question: str
    answer: str
    kind: str  # of generated questions hops and last relation, of others their data set's own
    hops: int
    aliases: tuple[str, ...] = ()
    support: tuple[str, ...] = ()  # titles of the supporting passages
    passages: tuple[str, ...] = ()  # pids of the same
    gold: Attempt | None = None  # known of generated questions
    wrong: tuple[Attempt, ...] = ()  # plausible mistakes, none of which comes to the answer

    @property
    def answers(self) -> tuple[str, ...]:
        """Everything that is right."""
        return (self.answer, *self.aliases)
