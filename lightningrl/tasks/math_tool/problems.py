"""Word problems with gold chains of calculator calls and plausible wrong ones, and their split into training and held-out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from lightningrl.errors import UserError
from lightningrl.tasks.math_tool.chains import Chain, Step, mistakes, solved
from lightningrl.tasks.math_tool.metric import numeric_match
from lightningrl.tasks.math_tool.stories import KINDS, Story, tell
from lightningrl.tasks.splits import held_out

MAX_VALUE = 300  # of a gold chain: every number of the problems is a word that a small policy has to learn
MAX_WRONG_CHARS = 6  # of a value in a wrong chain, for the same reason
_FEWEST_MISTAKES = 2
_DRAWS = 4000  # of a kind, before it is taken to have no more problems


@dataclasses.dataclass(frozen=True)
class Problem:
    """One word problem."""

    id: str
    question: str
    answer: str
    chain: Chain  # the gold calls, (expression, value) each
    kind: str  # events of its story, such as "packs+loss"; of real data the data set
    wrong: tuple[tuple[str, Chain], ...] = ()  # (kind of mistake, calls), none of which ends in the answer


def generate_problems(seed: int, count: int, *, kinds: Sequence[str] = KINDS) -> list[Problem]:
    """`count` different problems of 1 to 5 steps, the kinds in equal shares.

    Every value of a gold chain is an integer from 1 to `MAX_VALUE`, every problem has at least two mistakes that change
    its answer, and no two have the same text. The same arguments give the same problems.
    Raises `UserError` for a count below 1, and where the stories have not so many problems.
    """
    if count < 1:
        raise UserError(f"{count} problems cannot be made: ask for at least 1")
    rngs = [np.random.default_rng([seed, i]) for i in range(len(kinds))]
    texts: set[str] = set()
    problems: list[Problem] = []
    while len(problems) < count:
        for kind, rng in list(zip(kinds, rngs, strict=True))[: count - len(problems)]:
            problem = _next_problem(kind, rng, texts)
            texts.add(problem.question)
            problems.append(problem)
    return problems


def problem_of(story: Story, kind: str) -> Problem | None:
    """The story as a problem, or None if its values or its mistakes will not do."""
    chain = solved(story.steps)
    if not all(value.isdecimal() and 1 <= int(value) <= MAX_VALUE for _, value in chain):
        return None
    wrong = wrong_chains(story.steps, chain[-1][1])
    if len(wrong) < _FEWEST_MISTAKES:
        return None
    return Problem(f"math-{_digest(story.text)}", story.text, chain[-1][1], chain, kind, wrong)


def wrong_chains(steps: Sequence[Step], answer: str) -> tuple[tuple[str, Chain], ...]:
    """The mistakes about these steps that end in another number, all of their values short; no two the same calls."""
    wrong: dict[Chain, str] = {}
    for kind, mistaken in mistakes(steps):
        chain = solved(mistaken)
        plausible = all(len(value) <= MAX_WRONG_CHARS and not value.startswith("error") for _, value in chain)
        if plausible and not numeric_match(chain[-1][1], answer):
            wrong.setdefault(chain, kind)
    return tuple((kind, chain) for chain, kind in wrong.items())


def split_problems(problems: Sequence[Problem], heldout_count: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(train, held-out): no held-out problem's text and no held-out chain is trained on.

    Of each kind the same share is held out. Problems with the calls of a held-out one, in other words, go to neither
    side. Raises `UserError` if nothing would be left to train on.
    """
    heldout = held_out(problems, heldout_count, seed)
    texts = {problem.question.lower() for problem in heldout}
    chains = {problem.chain for problem in heldout if problem.chain}
    train = [p for p in problems if p.question.lower() not in texts and p.chain not in chains]
    if len(heldout) < heldout_count or not train:
        raise UserError(f"{len(problems)} problems are too few to hold out {heldout_count} and train on others: hold out fewer")
    return train, heldout


def _next_problem(kind: str, rng: np.random.Generator, texts: set[str]) -> Problem:
    for _ in range(_DRAWS):
        problem = problem_of(tell(kind, rng), kind)
        if problem is not None and problem.question not in texts:
            return problem
    raise UserError(f"there are no more problems of the kind {kind}: ask for fewer, or for more kinds")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
