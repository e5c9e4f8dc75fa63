"""Finds passages: BM25 as the embedded default, and dense retrieval with any encoder behind the same interface."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from lightningrl.tasks.multi_hop_qa.passages import Passage, load_passages

Encoder = Callable[[Sequence[str]], np.ndarray]  # texts -> float32 [N, d]

RESULTS = 3  # passages that a search returns, as in the paper's example
MAX_CHARS = 600  # of a passage's text that an agent is shown
_WORD = re.compile(r"\b\w\w+\b")
_LARGE = 1000  # passages from which on an index is worth keeping on disk
_OPEN_CORPORA = 256  # that a process keeps in memory


class Retriever(Protocol):
    """Ranks the passages of one corpus."""

    passages: Sequence[Passage]

    def ranked(self, query: str, k: int) -> list[int]:
        """Indices of the best `min(k, len(passages))` passages, best first; of equals the earlier passage comes first."""
        ...


class Bm25:
    """BM25 with the defaults of `bm25s` (arXiv 2407.03618): Lucene's form, k₁ = 1.5, b = 0.75, English stop words, no stemming.

    score(q, p) = Σ_{t ∈ q} ln(1 + (N − df(t) + ½) / (df(t) + ½)) · tf(t, p) / (k₁ · (1 − b + b · |p| / avg) + tf(t, p)), in float32,
    where p is a passage's title and text, and a word counts as often as the query has it. The words are runs of two or more
    word characters, in lower case. A query of no known word scores every passage 0, so the first passages are returned.

    Args:
        cache: folder where the index is kept under its content's hash, and found again; None keeps it in memory only.
    """

    def __init__(self, passages: Sequence[Passage], *, cache: Path | None = None) -> None:
        # Here, because bm25s starts JAX's backend on import where JAX is installed, which a run of several processes must do itself.
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it asks for everything, and says so of every index
        if not passages:
            raise ValueError("a corpus of no passages cannot be searched")
        self.passages = passages
        self._stop_words = frozenset(bm25s.stopwords.STOPWORDS_EN)
        contents = [f"{passage.title}\n{passage.text}" for passage in passages]
        place = None if cache is None else cache / f"bm25s-{bm25s.__version__}-{_digest(contents)}"
        kept = place is not None and place.is_dir()  # asked once: another process may keep one at any moment
        self._index: Any = bm25s.BM25.load(place, load_corpus=False) if kept else bm25s.BM25()
        if not kept:
            shown = sys.stderr.isatty() and len(passages) >= _LARGE
            words = bm25s.tokenize(contents, stopwords="en", show_progress=shown)
            if not words.vocab:  # a corpus of stop words alone: every passage gets one word that no query has
                words = bm25s.tokenization.Tokenized([[0] for _ in passages], {"": 0})
            self._index.index(words, show_progress=shown)
            if place is not None:
                _keep(place, lambda partial: self._index.save(partial, show_progress=False))

    def scores(self, query: str) -> np.ndarray:
        """float32 [N], one score per passage."""
        # As bm25s.tokenize has it, whose progress bars take longer than the search, even when they are off.
        words = [word for word in _WORD.findall(query.lower()) if word not in self._stop_words]
        known = self._index.get_tokens_ids(words)
        return self._index.get_scores_from_ids(known) if known else np.zeros(len(self.passages), np.float32)

    def ranked(self, query: str, k: int) -> list[int]:
        return best(self.scores(query), k)


class Dense:
    """Dense retrieval: the passages whose vectors have the largest inner products with the query's, computed exactly.

    Args:
        encode: texts -> float32 [N, d]; a unit-length encoder makes the inner product the cosine.
        encode_query: of queries where they are encoded otherwise than passages; None for `encode`.
        cache, name: the vectors are kept in `cache` under a hash of the contents and `name`, which must tell the encoder from
            others, such as its path and version; without both they are kept in memory only.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        encode: Encoder,
        *,
        encode_query: Encoder | None = None,
        cache: Path | None = None,
        name: str = "",
        batch: int = 64,
    ) -> None:
        if not passages:
            raise ValueError("a corpus of no passages cannot be searched")
        self.passages, self._encode_query = passages, encode_query or encode
        contents = [f"{passage.title}\n{passage.text}" for passage in passages]
        place = cache / f"dense-{_digest([name, *contents])}" if cache is not None and name else None
        if place is not None and place.is_dir():
            self.vectors = np.load(place / "vectors.npy", allow_pickle=False)
            return
        starts = tqdm(range(0, len(contents), batch), desc="encoding passages", disable=not sys.stderr.isatty(), leave=False)
        self.vectors = np.concatenate([np.asarray(encode(contents[i : i + batch]), np.float32) for i in starts])
        if self.vectors.ndim != 2 or len(self.vectors) != len(passages):
            raise ValueError(f"the encoder gave {self.vectors.shape} for {len(passages)} texts: it must give one vector per text")
        if place is not None:
            _keep(place, lambda partial: np.save(partial / "vectors.npy", self.vectors, allow_pickle=False))

    def scores(self, query: str) -> np.ndarray:
        """float32 [N], one inner product per passage."""
        return self.vectors @ np.asarray(self._encode_query([query]), np.float32)[0]

    def ranked(self, query: str, k: int) -> list[int]:
        return best(self.scores(query), k)


def best(scores: np.ndarray, k: int) -> list[int]:
    """Indices of the `min(k, N)` largest of `scores` [N], largest first; of equals the smaller index comes first."""
    k = min(k, len(scores))
    if k < 1:
        return []
    smallest = np.partition(scores, len(scores) - k)[len(scores) - k]
    # All that may be among them, ties at the edge included: where few words match, nearly all are.
    candidates = np.flatnonzero(scores >= smallest)
    return candidates[np.argsort(-scores[candidates], kind="stable")[:k]].tolist()


def shown(passage: Passage, max_chars: int = MAX_CHARS) -> str:
    """A passage as an agent reads it, on one line: `title: text`, the text cut at a word's end."""
    text = " ".join(passage.text.split())
    if len(text) > max_chars:
        text = text[:max_chars].rsplit(" ", 1)[0] + " ..."
    return f"{' '.join(passage.title.split())}: {text}"


def as_text(passages: Sequence[Passage], max_chars: int = MAX_CHARS) -> str:
    """Search results as an agent reads them, one a line."""
    return "\n".join(shown(passage, max_chars) for passage in passages)


MakeRetriever = Callable[[Sequence[Passage], Path | None], Retriever]  # from a corpus, and the folder for what is worth keeping


def bm25(passages: Sequence[Passage], cache: Path | None) -> Bm25:
    """The default; indexes of small corpora are made anew in less time than they are found in."""
    return Bm25(passages, cache=cache if len(passages) >= _LARGE else None)


@dataclasses.dataclass(frozen=True)
class _Opened:
    stamp: tuple[int, int, int]
    retriever: Retriever


_OPENED: collections.OrderedDict[tuple[str, MakeRetriever], _Opened] = collections.OrderedDict()
_LOCK = threading.Lock()


def open_corpus(corpus: str | Path, *, cache: Path | None = None, make: MakeRetriever = bm25) -> Retriever:
    """A retriever over a corpus file; once opened it stays in memory until the file changes. May be called from any thread.

    Args:
        make: `bm25`, or another that equals itself, such as `text_encoder.DenseRetrieval`.

    Raises `UserError` for a file that is missing or broken.
    """
    path = Path(corpus)
    stamp = _stamp(path)
    with _LOCK:
        known = _OPENED.get((str(path), make))
        if known is None or known.stamp != stamp:
            passages = load_passages(path)
            known = _Opened(stamp, make(passages, cache))
            _OPENED[str(path), make] = known
        _OPENED.move_to_end((str(path), make))
        if len(_OPENED) > _OPEN_CORPORA:
            _OPENED.popitem(last=False)
    return known.retriever


def search_as_text(corpus: str, query: str, results: int = RESULTS, cache: str | None = None, make: MakeRetriever = bm25) -> str:
    """The search tool as the agent has it: the best passages of a corpus file, as text."""
    retriever = open_corpus(corpus, cache=None if cache is None else Path(cache), make=make)
    return as_text([retriever.passages[i] for i in retriever.ranked(query, results)])


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return (0, 0, 0)  # load_passages says what is wrong
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino)


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:32]


def _keep(place: Path, write: Callable[[Path], Any]) -> None:
    partial = place.with_name(f"{place.name}.{os.getpid()}")
    partial.mkdir(parents=True, exist_ok=True)
    write(partial)
    try:
        os.replace(partial, place)
    except OSError:  # another process was first, with the same content
        shutil.rmtree(partial)
