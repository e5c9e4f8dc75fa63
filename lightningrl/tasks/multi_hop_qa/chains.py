"""Questions about a fictional world: chains of two to four of its facts, with the mistakes that somebody might make."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lightningrl.errors import UserError
from lightningrl.tasks.multi_hop_qa.questions import Attempt, Question
from lightningrl.tasks.multi_hop_qa.retrieval import Retriever
from lightningrl.tasks.multi_hop_qa.worlds import Fact, Relation, World, relations_of

HOPS = (2, 3, 4)
RESULTS = 2  # passages that a search in a fictional world returns
_DRAWS = 50  # of a question, before a world is taken to be exhausted


def generate_questions(
    world: World, corpus: Path, retriever: Retriever, rng: np.random.Generator, count: int, *, hops: Sequence[int] = HOPS
) -> list[Question]:
    """`count` different questions about a world, of each number of hops in turn.

    "Who is the mayor of the birthplace of Mira?" No relation and no entity comes twice in a chain. Every gold search finds its
    passage first, and every question has at least two mistakes. All chance comes from `rng`.

    Raises `UserError` if the world has no room for so many.
    """
    numbers = {passage.title: i for i, passage in enumerate(retriever.passages)}
    questions: dict[str, Question] = {}
    for i in range(count):
        for _ in range(_DRAWS):
            chain = _chain(world, hops[i % len(hops)], rng)
            if chain is None or (question := _question(chain, world, corpus)).question in questions:
                continue
            if len(question.wrong) >= 2 and all(retriever.ranked(fact.title, 1) == [numbers[fact.title]] for fact in chain):
                questions[question.question] = question
                break
        else:
            raise UserError(f"world {world.name} has room for {len(questions)} questions, not for {count}: make larger worlds, or more")
    return list(questions.values())


def search_for(relation: Relation, entity: str) -> str:
    return f"{relation.name} of {entity}"


def _chain(world: World, hops: int, rng: np.random.Generator) -> list[Fact] | None:
    entity = str(rng.choice(list(world.sorts)))
    chain: list[Fact] = []
    for _ in range(hops):
        used = {fact.relation for fact in chain}
        open_ones = [relation for relation in relations_of(world.sorts[entity]) if relation not in used]
        if not open_ones:
            return None
        fact = world.fact(entity, open_ones[rng.integers(len(open_ones))].name)
        assert fact is not None
        chain.append(fact)
        entity = fact.object
    met = [chain[0].subject, *(fact.object for fact in chain)]
    return chain if len(set(met)) == len(met) else None


def _question(chain: list[Fact], world: World, corpus: Path) -> Question:
    relations = [fact.relation for fact in chain]
    who = "Who" if relations[-1].object == "person" else "What"
    text = f"{who} is the {' of the '.join(relation.name for relation in reversed(relations))} of {chain[0].subject}?"
    gold = Attempt("gold", tuple(fact.title for fact in chain), chain[-1].object)
    wrong: dict[str, Attempt] = {}
    for attempt in _mistakes(chain, world):
        if attempt.answer != gold.answer and (attempt.searches, attempt.answer) not in {(a.searches, a.answer) for a in wrong.values()}:
            wrong.setdefault(attempt.kind, attempt)
    titles = [fact.title for fact in world.facts]
    return Question(
        id=f"{world.name}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}",
        corpus=str(corpus),
        question=text,
        answer=gold.answer,
        kind=f"{len(chain)} hops to {relations[-1].name}",
        hops=len(chain),
        support=gold.searches,
        passages=tuple(f"{world.name}-{titles.index(fact.title):03d}" for fact in chain),
        gold=gold,
        wrong=tuple(wrong.values()),
    )


def _mistakes(chain: list[Fact], world: World) -> Iterator[Attempt]:
    relations = [fact.relation for fact in chain]
    searches = tuple(fact.title for fact in chain)
    yield Attempt("stops_early", searches[:-1], chain[-2].object)

    last = chain[-1]
    alike = [r for r in relations_of(last.relation.subject) if r.object == last.relation.object and r != last.relation]
    yield _from(chain[:-1], last.subject, alike[:1], "wrong_relation", world)

    # The entity that a passage names beside the right one, of the last passage that names one and leads on.
    for at in range(len(chain) - 1, 0, -1):
        other = chain[at - 1].former
        if other and world.fact(other, relations[at].name):
            yield _from(chain[:at], other, relations[at:], "wrong_entity", world)
            break

    if chain[-1].former:
        yield Attempt("other_in_passage", searches, chain[-1].former)


def _from(done: list[Fact], entity: str, relations: Sequence[Relation], kind: str, world: World) -> Attempt:
    """Goes on from an entity along relations, as the world has it."""
    searches = [fact.title for fact in done]
    for relation in relations:
        fact = world.fact(entity, relation.name)
        assert fact is not None
        searches.append(fact.title)
        entity = fact.object
    return Attempt(kind, tuple(searches), entity)


def split_questions(train: Sequence[Question], heldout: Sequence[Question]) -> list[Question]:
    """Those of `train` whose text is not that of a held-out question, although that is about another world."""
    texts = {question.question for question in heldout}
    return [question for question in train if question.question not in texts]
