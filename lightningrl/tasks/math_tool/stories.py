"""Small stories about things that somebody has: openings, events and questions, several wordings of each.

A story is an opening, events that each change what somebody has by one or two calculations, and a question. The words are
few, because a small policy has to learn them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from lightningrl.tasks.math_tool.chains import Operand, Step

NAMES = ("Ada", "Ben", "Eva", "Finn", "Ida", "Leo", "Mia", "Noah", "Ruth", "Tom", "Uma", "Zoe")
THINGS = ("apples", "balls", "books", "cards", "coins", "cups", "eggs", "pens", "plums", "shells", "stamps", "toys")
HOLDERS = ("bags", "boxes", "jars")

_LESS = (2, 30)  # what is gained or lost
_TIMES = (2, 6)


@dataclasses.dataclass(frozen=True)
class Event:
    """What happens, in `{…}` the story's words: n who has the things, m another one, t things, h and g holders, a, b … numbers.

    `steps` are what is calculated with those numbers; `-1` is what was there before, `-2` the first step of the event itself.
    """

    wordings: tuple[str, ...]
    numbers: tuple[tuple[int, int], ...]  # each one's range
    steps: tuple[Step, ...]
    question: tuple[str, ...] = ("How many {t} does {n} have now?", "How many {t} has {n} now?")
    passes: bool = False  # the story goes on about m


_BEFORE, _FIRST = -1, -2

OPENINGS: Mapping[str, Event] = {
    "have": Event(("{n} has {a} {t}.", "There are {a} {t} that {n} owns."), ((10, 60),), ()),
    "packs": Event(
        ("{n} has {a} {h} with {b} {t} in each.", "{n} buys {a} {h} of {b} {t}.", "In each of {a} {h} {n} keeps {b} {t}."),
        ((2, 9), (3, 20)),
        (Step("a", "*", "b"),),
    ),
    "colours": Event(
        ("{n} has {a} red and {b} blue {t}.", "{n} finds {a} old {t} and {b} new {t}."), ((5, 40), (5, 40)), (Step("a", "+", "b"),)
    ),
    "two_packs": Event(
        ("{n} has {a} {h} of {b} {t} and {c} {g} of {d} {t}.", "{n} buys {a} {h} with {b} {t} each and {c} {g} with {d} {t} each."),
        ((2, 6), (3, 15), (2, 6), (3, 15)),
        (Step("a", "*", "b"), Step("c", "*", "d"), Step(0, "+", 1)),
    ),
}

EVENTS: Mapping[str, Event] = {
    "gain": Event(("{n} gets {a} more.", "{n} buys {a} more {t}.", "Then {n} finds {a} {t}."), (_LESS,), (Step(_BEFORE, "+", "a"),)),
    "loss": Event(
        ("{n} gives {a} {t} away.", "{n} loses {a} of them.", "Then {n} sells {a} {t}."),
        (_LESS,),
        (Step(_BEFORE, "-", "a"),),
        ("How many {t} does {n} have left?", "How many {t} are left?"),
    ),
    "more": Event(("{m} has {a} {t} more than {n}.", "{m} has {a} more than that."), (_LESS,), (Step(_BEFORE, "+", "a"),), passes=True),
    "fewer": Event(("{m} has {a} {t} fewer than {n}.", "{m} has {a} fewer than that."), (_LESS,), (Step(_BEFORE, "-", "a"),), passes=True),
    "times": Event(
        ("{m} has {a} times as many {t} as {n}.", "{m} has {a} times that number."), (_TIMES,), (Step(_BEFORE, "*", "a"),), passes=True
    ),
    "together": Event(
        ("{m} has {a} times as many {t} as {n}.", "{m} has {a} times that number."),
        (_TIMES,),
        (Step(_BEFORE, "*", "a"), Step(_BEFORE, "+", _FIRST)),
        ("How many {t} do they have together?", "How many {t} do {n} and {m} have in all?"),
    ),
    "piles": Event(
        ("{n} makes {a} equal piles and keeps one.", "{n} splits them into {a} equal parts and keeps one part."),
        (_TIMES,),
        (Step(_BEFORE, "/", "a"),),
    ),
    "share": Event(
        ("{n} shares them equally among {a} friends.", "{n} gives them to {a} friends, each the same number."),
        (_TIMES,),
        (Step(_BEFORE, "/", "a"),),
        ("How many {t} does each friend get?", "How many {t} are there for each friend?"),
    ),
    "fill": Event(
        ("{n} puts {a} {t} into each of some {g}.", "{n} fills {g} with {a} {t} each."),
        ((3, 9),),
        (Step(_BEFORE, "/", "a"),),
        ("How many {g} does {n} need?", "How many {g} are full?"),
    ),
    "left_over": Event(
        ("{n} makes rows of {a}.", "{n} packs them in sets of {a}."),
        ((3, 9),),
        (Step(_BEFORE, "%", "a"),),
        ("How many {t} are left over?", "How many {t} do not fit?"),
    ),
    "sell": Event(
        ("{n} sells each for {a} dollars.", "Then {n} sells them for {a} dollars each."),
        ((2, 9),),
        (Step(_BEFORE, "*", "a"),),
        ("How many dollars does {n} get?", "How much money does {n} make?"),
    ),
    "spend": Event(
        ("{n} spends {a} dollars of it.", "{n} pays {a} dollars for a bus."),
        (_LESS,),
        (Step(_BEFORE, "-", "a"),),
        ("How many dollars does {n} have left?", "How many dollars are left?"),
    ),
}

_KINDS = """
    have+gain have+loss packs have+share have+fewer have+times have+left_over
    have+loss+gain packs+loss packs+share colours+sell have+together colours+left_over have+times+gain packs+sell
    packs+gain+fill have+loss+times+gain two_packs colours+piles+sell
    two_packs+loss packs+more+together
    packs+gain+piles+sell+spend
"""  # of 1 step, then of 2, 3, 4 and 5: fewer of the long ones, which a new policy is hardly ever right on
KINDS: tuple[str, ...] = tuple(_KINDS.split())


@dataclasses.dataclass(frozen=True)
class Story:
    text: str
    steps: tuple[Step, ...]


def tell(kind: str, rng: np.random.Generator) -> Story:
    """A story of this kind: the names of an opening and its events, with + between. All its numbers are different.

    Nothing is said about values on the way: a division may leave a remainder. Raises `LookupError` for a kind whose events
    there are not.
    """
    opening, *others = kind.split("+")
    events = [OPENINGS[opening], *(EVENTS[name] for name in others)]
    n, m, *names = (NAMES[i] for i in rng.permutation(len(NAMES)))
    h, g = (HOLDERS[i] for i in rng.permutation(len(HOLDERS))[:2])
    words = {"n": n, "m": m, "t": THINGS[int(rng.integers(len(THINGS)))], "h": h, "g": g}
    used: set[int] = set()
    sentences: list[str] = []
    steps: list[Step] = []
    before: Operand = 0
    for event in events:
        numbers = {letter: str(_draw(span, used, rng)) for letter, span in zip("abcd", event.numbers, strict=False)}
        sentences.append(_one_of(event.wordings, rng).format(**words, **numbers))
        first = len(steps)
        operands: dict[Operand, Operand] = {_BEFORE: before, _FIRST: first}
        operands.update(numbers)
        operands.update((i, first + i) for i in range(len(event.steps)))
        steps += [Step(operands[step.left], step.operator, operands[step.right]) for step in event.steps]
        before = len(steps) - 1 if steps else numbers["a"]
        if event.passes:
            words |= {"n": words["m"], "m": names.pop()}
    question = _one_of(events[-1].question, rng).format(**words)
    return Story(" ".join([*sentences, question]), tuple(steps))


def _one_of(wordings: Sequence[str], rng: np.random.Generator) -> str:
    return wordings[int(rng.integers(len(wordings)))]


def _draw(span: tuple[int, int], used: set[int], rng: np.random.Generator) -> int:
    """A number of the range that the story does not have yet."""
    free = [number for number in range(span[0], span[1] + 1) if number not in used]
    number = free[int(rng.integers(len(free)))]
    used.add(number)
    return number
