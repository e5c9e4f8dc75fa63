"""Small fictional worlds: people, towns and firms with invented names, and one short passage for every fact about them.

Names come back from world to world and facts do not: what a passage says has to be read, it cannot be remembered.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightningrl.tasks.multi_hop_qa.passages import Passage, save_passages


@dataclasses.dataclass(frozen=True)
class Relation:
    name: str  # as questions and searches call it
    subject: str  # sort of entity
    object: str
    phrase: str  # as passages say it
    changes: bool = True  # there may have been another object before


# Two from every sort to every other that it leads to, so that the wrong one of the two leads on as plausibly.
RELATIONS = (
    Relation("teacher", "person", "person", "learned from"),
    Relation("rival", "person", "person", "competes with"),
    Relation("birthplace", "person", "town", "was born in", changes=False),
    Relation("home", "person", "town", "lives in"),
    Relation("employer", "person", "firm", "works for"),
    Relation("sponsor", "person", "firm", "is paid by"),
    Relation("founder", "firm", "person", "was founded by", changes=False),
    Relation("director", "firm", "person", "is led by"),
    Relation("seat", "firm", "town", "is based in"),
    Relation("origin", "firm", "town", "started in", changes=False),
    Relation("mayor", "town", "person", "is governed by"),
    Relation("patron", "town", "person", "is named after", changes=False),
)


def _names(starts: str, ends: str) -> tuple[str, ...]:
    return tuple(start + end for start in starts.split() for end in ends.split())


# Made of few syllables, so that a small tokenizer has a token for every name. No name is a word of the passages.
NAMES = {
    "person": _names("Bel Dor Fen Jas Kam Lor Mir Nal", "a el i o"),
    "town": _names("Ald Brin Cor Esk", "by ford ham ton"),
    "firm": _names("Axi Ome Poly Tri", "corp lab med soft"),
}


@dataclasses.dataclass(frozen=True)
class Fact:
    subject: str
    relation: Relation
    object: str
    former: str | None = None  # the passage names it too: what the object used to be

    @property
    def title(self) -> str:
        return f"{self.relation.name} of {self.subject}"

    @property
    def text(self) -> str:
        before = f"After {self.former}, " if self.former else ""
        return f"{before}{self.subject} {self.relation.phrase} {self.object}."


@dataclasses.dataclass(frozen=True)
class World:
    """Every entity has one fact of every relation of its sort."""

    name: str
    facts: tuple[Fact, ...]

    def fact(self, subject: str, relation: str) -> Fact | None:
        """None where there is no such relation of this sort of entity."""
        return self._facts.get((subject, relation))

    @functools.cached_property
    def _facts(self) -> dict[tuple[str, str], Fact]:
        return {(fact.subject, fact.relation.name): fact for fact in self.facts}

    @functools.cached_property
    def sorts(self) -> dict[str, str]:
        """Entity -> its sort."""
        return {fact.subject: fact.relation.subject for fact in self.facts}

    def passages(self) -> list[Passage]:
        """One for each fact, in the order of `facts`."""
        return [Passage(f"{self.name}-{i:03d}", fact.title, fact.text) for i, fact in enumerate(self.facts)]


def make_world(
    name: str, rng: np.random.Generator, *, people: int = 16, towns: int = 10, firms: int = 10, former_share: float = 0.3
) -> World:
    """A world of that many entities (at least 3 of a sort, at most as many as there are names), all chance from `rng`.

    `former_share` of the facts that may change, in [0, 1], name a second entity of the object's sort: what it was before.
    """
    counts = {"person": people, "town": towns, "firm": firms}
    for sort, count in counts.items():
        if not 3 <= count <= len(NAMES[sort]):
            raise ValueError(f"a world can have 3 to {len(NAMES[sort])} entities of sort {sort}, not {count}")
    entities = {sort: [str(name) for name in rng.choice(NAMES[sort], count, replace=False)] for sort, count in counts.items()}
    facts = []
    for sort in entities:
        for subject in entities[sort]:
            for relation in RELATIONS:
                if relation.subject != sort:
                    continue
                others = [entity for entity in entities[relation.object] if entity != subject]
                now, before = rng.choice(others, 2, replace=False)
                changed = rng.random() < former_share and relation.changes
                facts.append(Fact(subject, relation, str(now), str(before) if changed else None))
    order = rng.permutation(len(facts))  # a passage's place says nothing about what it is about
    return World(name, tuple(facts[i] for i in order))


def build_worlds(folder: Path, seed: int, count: int, *, unseen: bool = False) -> list[tuple[World, Path]]:
    """`count` worlds, each with its corpus file in `folder`. The same seed gives the same worlds.

    With `unseen`, others of the same kind, for evaluation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    worlds = []
    for i in range(count):
        name = f"{'unseen' if unseen else 'world'}{i:03d}"
        world = make_world(name, np.random.default_rng([seed, int(unseen), i]))
        path = folder / f"{name}.jsonl"
        save_passages(path, world.passages())
        worlds.append((world, path))
    return worlds


def relations_of(sort: str) -> Sequence[Relation]:
    return [relation for relation in RELATIONS if relation.subject == sort]
