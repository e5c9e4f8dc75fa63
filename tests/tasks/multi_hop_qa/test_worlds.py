"""Fictional worlds and the questions about them."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lightningrl.errors import UserError
from lightningrl.tasks.multi_hop_qa.chains import RESULTS, generate_questions, split_questions
from lightningrl.tasks.multi_hop_qa.passages import load_passages
from lightningrl.tasks.multi_hop_qa.questions import Question
from lightningrl.tasks.multi_hop_qa.retrieval import Bm25, open_corpus
from lightningrl.tasks.multi_hop_qa.worlds import NAMES, RELATIONS, build_worlds, make_world


def test_every_entity_has_every_fact_of_its_sort() -> None:
    world = make_world("w", np.random.default_rng(0))
    assert collections.Counter(world.sorts.values()) == {"person": 16, "town": 10, "firm": 10}
    assert len(world.facts) == 16 * 6 + 10 * 2 + 10 * 4
    for entity, sort in world.sorts.items():
        assert entity in NAMES[sort]
        for relation in RELATIONS:
            fact = world.fact(entity, relation.name)
            assert (fact is not None) == (relation.subject == sort)
            if fact is not None:
                others = {fact.object} | ({fact.former} if fact.former else set())
                assert entity not in others and len(others) == 1 + bool(fact.former)
                assert {world.sorts[other] for other in others} == {relation.object}
    changing = [fact.former is not None for fact in world.facts if fact.relation.changes]
    assert 0.1 < np.mean(changing) < 0.5  # a share of 0.3 of 100
    assert not any(fact.former for fact in world.facts if not fact.relation.changes)


def test_a_passage_says_its_fact() -> None:
    world = make_world("w", np.random.default_rng(0))
    for fact, passage in zip(world.facts, world.passages(), strict=True):
        assert passage.title == f"{fact.relation.name} of {fact.subject}"
        before = f"After {fact.former}, " if fact.former else ""
        assert passage.text == f"{before}{fact.subject} {fact.relation.phrase} {fact.object}."


def test_worlds_have_limits() -> None:
    for counts in ({"people": 2}, {"towns": 17}, {"firms": 0}):
        with pytest.raises(ValueError, match="a world can have 3 to"):
            make_world("w", np.random.default_rng(0), **counts)


def test_no_name_is_a_word_of_passages_and_no_two_sorts_share_one() -> None:
    names = [name for sort in NAMES.values() for name in sort]
    words = {word for relation in RELATIONS for word in f"{relation.name} {relation.phrase}".split()}
    assert len(set(map(str.lower, names))) == len(names) and not set(map(str.lower, names)) & words


def test_the_same_seed_gives_the_same_worlds_and_another_one_others(tmp_path: Path) -> None:
    built = [
        build_worlds(tmp_path / str(i), seed, 2, unseen=unseen)
        for i, (seed, unseen) in enumerate([(0, False)] * 2 + [(1, False), (0, True)])
    ]
    first, again, other, unseen = ([world.facts for world, _ in worlds] for worlds in built)
    assert first == again and first[0] != first[1] and not {first[0], first[1]} & {*other, *unseen}
    assert [path.read_bytes() for _, path in built[0]] == [path.read_bytes() for _, path in built[1]]
    world, path = built[0][0]
    assert load_passages(path) == world.passages()


def test_gold_searches_find_the_gold_passages(questions: list[Question]) -> None:
    for question in questions:
        retriever = open_corpus(question.corpus)
        assert question.gold is not None and len(question.gold.searches) == question.hops == len(question.passages)
        for query, title, pid in zip(question.gold.searches, question.support, question.passages, strict=True):
            found = [retriever.passages[i] for i in retriever.ranked(query, RESULTS)]
            assert (found[0].title, found[0].pid) == (title, pid)


def test_the_answer_is_read_off_the_gold_passages_in_turn(questions: list[Question]) -> None:
    for question in questions:
        assert question.gold is not None
        texts = {passage.title: passage.text for passage in open_corpus(question.corpus).passages}
        relations = [query.split(" of ")[0] for query in question.gold.searches]
        first = question.gold.searches[0].split(" of ")[1]
        assert question.question.split(" is ")[1] == f"the {' of the '.join(reversed(relations))} of {first}?"
        for query, later in zip(question.gold.searches, [*question.gold.searches[1:], f"answer of {question.answer}"], strict=True):
            assert texts[query].rstrip(".").split()[-1] == later.split(" of ")[1]
        assert len(set(relations)) == len(relations)
        assert question.question.startswith("Who" if question.answer in NAMES["person"] else "What")


def test_mistakes_are_plausible_and_wrong(questions: list[Question]) -> None:
    kinds: collections.Counter[str] = collections.Counter()
    for question in questions:
        assert question.gold is not None and len(question.wrong) >= 2
        assert len({attempt.kind for attempt in question.wrong}) == len(question.wrong)
        titles = {passage.title for passage in open_corpus(question.corpus).passages}
        for attempt in question.wrong:
            kinds[attempt.kind] += 1
            assert attempt.answer != question.answer and set(attempt.searches) <= titles
            gold = question.gold.searches
            match attempt.kind:
                case "stops_early":
                    assert attempt.searches == gold[:-1]
                case "wrong_relation":
                    assert attempt.searches[:-1] == gold[:-1]
                    assert attempt.searches[-1].split(" of ")[1] == gold[-1].split(" of ")[1] and attempt.searches != gold
                case "wrong_entity":
                    differs = [a.split(" of ")[0] == b.split(" of ")[0] for a, b in zip(attempt.searches, gold, strict=True)]
                    assert all(differs) and attempt.searches != gold
                case "other_in_passage":
                    assert attempt.searches == gold
    assert set(kinds) == {"stops_early", "wrong_relation", "wrong_entity", "other_in_passage"} and min(kinds.values()) >= 3


def test_questions_are_the_same_again_and_in_equal_shares(tmp_path: Path) -> None:
    ((world, corpus),) = build_worlds(tmp_path, 0, 1)
    made = [generate_questions(world, corpus, open_corpus(corpus), np.random.default_rng(5), 30) for _ in range(2)]
    assert made[0] == made[1] != generate_questions(world, corpus, open_corpus(corpus), np.random.default_rng(6), 30)
    assert collections.Counter(question.hops for question in made[0]) == {2: 10, 3: 10, 4: 10}
    assert len({question.question for question in made[0]}) == len({question.id for question in made[0]}) == 30


def test_a_world_without_room_says_so(tmp_path: Path) -> None:
    world = make_world("tiny", np.random.default_rng(0), people=3, towns=3, firms=3)
    with pytest.raises(UserError, match="has room for"):
        generate_questions(world, tmp_path, Bm25(world.passages()), np.random.default_rng(0), 5000, hops=(2,))


def test_splits_share_no_question(questions: list[Question]) -> None:
    asked_again = dataclasses.replace(questions[3], id="other world", answer="Mira")
    train = split_questions([*questions[:10], asked_again], questions[3:6])
    assert [question.id for question in train] == [q.id for i, q in enumerate(questions[:10]) if not 3 <= i < 6]
