"""BM25 against its formula in a plain loop, dense retrieval against plain products, ties, caches, and what is shown."""

from __future__ import annotations

import collections
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from bm25s.stopwords import STOPWORDS_EN

from lightningrl.errors import UserError
from lightningrl.tasks.multi_hop_qa import retrieval
from lightningrl.tasks.multi_hop_qa.passages import Passage, load_passages, save_passages
from lightningrl.tasks.multi_hop_qa.retrieval import Bm25, Dense, as_text, best, open_corpus, search_as_text, shown

WORDS = "the a river runs by old mill Ann Bob's mill-pond x 1984 ÉCOLE and of water, water. Straße".split()


def corpus(seed: int, count: int) -> list[Passage]:
    rng = np.random.default_rng(seed)
    return [
        Passage(f"p{i}", " ".join(rng.choice(WORDS, rng.integers(0, 3))), " ".join(rng.choice(WORDS, rng.integers(0, 12))))
        for i in range(count)
    ]


def words_of(text: str) -> list[str]:
    return [word for word in re.findall(r"\b\w\w+\b", text.lower()) if word not in STOPWORDS_EN]


def plain_bm25(query: str, passages: Sequence[Passage], k1: float = 1.5, b: float = 0.75) -> list[float]:
    documents = [words_of(f"{passage.title} {passage.text}") for passage in passages]
    average = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        counts, score = collections.Counter(document), 0.0
        for word in words_of(query):
            holding = sum(word in other for other in documents)
            if holding and counts[word]:
                idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
                score += idf * counts[word] / (k1 * (1 - b + b * len(document) / average) + counts[word])
        scores.append(score)
    return scores


QUERIES = ["old mill by the river", "Ann water water", "the of and", "", "unknown words", "ÉCOLE straße 1984", "x", "Bob's mill-pond"]


@pytest.mark.parametrize("seed", range(3))
def test_ranks_are_those_of_a_plain_loop(seed: int) -> None:
    passages = corpus(seed, 60)
    retriever = Bm25(passages)
    for query in QUERIES:
        scores = plain_bm25(query, passages)
        np.testing.assert_allclose(retriever.scores(query), scores, rtol=3e-6, atol=1e-7)  # float32 against float64
        ranked = retriever.ranked(query, len(passages))
        assert sorted(ranked) == list(range(len(passages)))
        for earlier, later in zip(ranked, ranked[1:], strict=False):
            gap = scores[earlier] - scores[later]
            assert gap > -1e-6 and (abs(gap) > 1e-6 or earlier < later or retriever.scores(query)[earlier] > retriever.scores(query)[later])
        assert retriever.ranked(query, 7) == ranked[:7]


def test_equals_come_in_the_order_of_the_corpus() -> None:
    passages = [Passage(str(i), "same", "water") for i in range(30)]
    assert Bm25(passages).ranked("water", 5) == Bm25(passages).ranked("nothing", 5) == [0, 1, 2, 3, 4]


def test_best_is_a_stable_sort() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 50):
        scores = rng.integers(0, 4, count).astype(np.float32)
        expected = sorted(range(count), key=lambda i: (-scores[i], i))
        for k in (0, 1, 3, count, count + 5):
            assert best(scores, k) == expected[:k]


def test_a_corpus_of_stop_words_can_be_searched() -> None:
    assert Bm25([Passage("a", "The", "of the"), Passage("b", "", "")]).ranked("the river", 2) == [0, 1]
    with pytest.raises(ValueError, match="no passages"):
        Bm25([])


def test_an_index_is_kept_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passages = corpus(0, 40)
    first = Bm25(passages, cache=tmp_path)
    (kept,) = tmp_path.iterdir()
    monkeypatch.setattr("bm25s.BM25.index", lambda *_, **__: pytest.fail("the index is built again"))
    again = Bm25(passages, cache=tmp_path)
    for query in QUERIES:
        np.testing.assert_array_equal(again.scores(query), first.scores(query))
    monkeypatch.undo()
    changed = [*passages[:-1], Passage("p39", "Ann", "Ann")]
    np.testing.assert_array_equal(Bm25(changed, cache=tmp_path).scores("Ann"), Bm25(changed).scores("Ann"))
    assert len(list(tmp_path.iterdir())) == 2 and kept.is_dir()


def test_an_index_that_another_process_keeps_meanwhile_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passages, asked, is_dir = corpus(0, 40), [], Path.is_dir

    def kept_after_being_asked_for(path: Path) -> bool:
        found = is_dir(path)
        if path.parent == tmp_path and not asked:
            asked.append(path)
            Bm25(passages, cache=tmp_path)
        return found

    monkeypatch.setattr(Path, "is_dir", kept_after_being_asked_for)
    retriever = Bm25(passages, cache=tmp_path)
    assert list(tmp_path.iterdir()) == asked
    for query in QUERIES:
        np.testing.assert_array_equal(retriever.scores(query), Bm25(passages).scores(query))


def letters(texts: Sequence[str]) -> np.ndarray:
    """How often a text has each letter."""
    return np.array([[text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts], np.float32)


def test_dense_ranks_are_those_of_plain_products() -> None:
    passages = corpus(1, 30)
    retriever = Dense(passages, letters, batch=7)
    for query in QUERIES:
        (vector,) = letters([query])
        products = [sum(float(x) * float(y) for x, y in zip(letters([f"{p.title}\n{p.text}"])[0], vector, strict=True)) for p in passages]
        assert retriever.ranked(query, 30) == sorted(range(30), key=lambda i: (-products[i], i))


def test_queries_may_have_an_encoder_of_their_own(tmp_path: Path) -> None:
    passages = corpus(1, 30)
    asked: list[str] = []

    def reversed_letters(texts: Sequence[str]) -> np.ndarray:
        asked.extend(texts)
        return -letters(texts)

    retriever = Dense(passages, letters, encode_query=reversed_letters)
    np.testing.assert_array_equal(retriever.scores("mill"), -Dense(passages, letters).scores("mill"))
    assert asked == ["mill"]


def test_vectors_are_kept_by_content_and_encoder(tmp_path: Path) -> None:
    passages = corpus(2, 10)
    first = Dense(passages, letters, cache=tmp_path, name="letters")

    def never(texts: Sequence[str]) -> np.ndarray:
        raise AssertionError("encoded again")

    np.testing.assert_array_equal(Dense(passages, never, cache=tmp_path, name="letters").vectors, first.vectors)
    with pytest.raises(AssertionError, match="encoded again"):
        Dense(passages, never, cache=tmp_path, name="another encoder")
    with pytest.raises(ValueError, match="one vector per text"):
        Dense(passages, lambda texts: np.zeros((1, 3)))


def test_a_passage_is_shown_on_one_line() -> None:
    assert shown(Passage("a", "The\nMill ", "It is  old.\n\nIt runs.")) == "The Mill: It is old. It runs."
    assert shown(Passage("a", "Mill", "abc def ghi"), max_chars=9) == "Mill: abc def ..."
    assert shown(Passage("a", "Mill", "abc def ghi"), max_chars=11) == "Mill: abc def ghi"
    assert as_text([Passage("a", "A", "x"), Passage("b", "B", "y")]) == "A: x\nB: y"


def test_the_tool_reads_a_corpus_file(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    save_passages(path, [Passage("a", "Mill", "by the river"), Passage("b", "Ann", "owns the mill"), Passage("c", "Sea", "salty")])
    assert search_as_text(str(path), "who owns the mill?", 2) == "Ann: owns the mill\nMill: by the river"
    assert open_corpus(path) is open_corpus(str(path))
    save_passages(path, [Passage("a", "New", "another corpus altogether")])
    assert search_as_text(str(path), "mill") == "New: another corpus altogether"


def test_a_large_corpus_is_kept_on_disk_a_small_one_is_not(tmp_path: Path) -> None:
    for name, count in (("small", 5), ("large", retrieval._LARGE)):
        save_passages(tmp_path / f"{name}.jsonl", [Passage(str(i), f"title {i}", "text") for i in range(count)])
        open_corpus(tmp_path / f"{name}.jsonl", cache=tmp_path / name)
    assert (tmp_path / "large").is_dir() and not (tmp_path / "small").exists()


def test_what_is_wrong_with_a_corpus_is_said_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"

    def broken(text: str | bytes, message: str) -> None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=message) as caught:
            load_passages(path)
        assert "\n" not in str(caught.value)

    good = json.dumps({"pid": "a", "title": "t", "text": "x"})
    broken(f"{good}\n\n{{", "line 3: not valid JSON")
    broken(f"{good}\n[]", "line 2: this should be a JSON object, not a list")
    broken(f"{good}\n{json.dumps({'pid': 'b', 'title': 't'})}", "line 2: there is no text field 'text'")
    broken(f"{good}\n{good}", "line 2: the pid 'a' is that of line 1 too")
    broken(good.encode() + b"\n\xff", "line 2: not valid JSON")
    broken("\n", "holds no passages")
    with pytest.raises(UserError, match="cannot read"):
        open_corpus(tmp_path / "none.jsonl")
