"""Is a multi-hop download whole? `python -m lightningrl.tasks.multi_hop_qa --check DIR` runs every gold answer in it.

DIR is a data set with `corpus.jsonl`, or a folder of several. Prints one JSON object: `questions`; `gold_score`, the share of
questions whose gold answer, as an agent would say it, earns 1 under the reward, and each of whose supporting passages is found by a
search for its own title and text; `all_support_in_top_20` by data set and split, the share of questions of which a search for the raw
question finds all supporting passages; `seconds`; and `failed`, the ids of questions whose gold answer does not score.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightningrl.tasks.check import parser_of, print_report, splits_of
from lightningrl.tasks.multi_hop_qa.data import SPLITS, data_sets, load_questions
from lightningrl.tasks.multi_hop_qa.metric import reward
from lightningrl.tasks.multi_hop_qa.questions import Question
from lightningrl.tasks.multi_hop_qa.retrieval import Retriever, open_corpus

CACHE = Path.home() / ".cache" / "lightningrl"  # as the training commands have it

TOP = 20


def support_found(question: Question, retriever: Retriever, query: str | None = None) -> bool:
    """Whether a search, for the raw question by default, has all supporting passages among its first `TOP`."""
    found = {retriever.passages[i].pid for i in retriever.ranked(question.question if query is None else query, TOP)}
    return found.issuperset(question.passages)


def unfindable(retriever: Retriever, pids: set[str]) -> set[str]:
    """Those of the passages that a search for their own title and text does not find."""
    lost = set()
    for i, passage in enumerate(retriever.passages):
        if passage.pid in pids and i not in retriever.ranked(f"{passage.title}\n{passage.text}", TOP):
            lost.add(passage.pid)
    return lost


def check(directory: str | Path, splits: Sequence[str] = SPLITS, *, cache: Path | None = None) -> dict[str, Any]:
    """Runs the gold answers of the splits. Raises `UserError` for what is missing or broken."""
    start = time.monotonic()
    count, failed = 0, []
    shares: dict[str, Any] = {}
    for folder in data_sets(directory):
        retriever = open_corpus(folder / "corpus.jsonl", cache=cache)
        by_split = {split: load_questions(folder, split) for split in splits}
        lost = unfindable(retriever, {pid for questions in by_split.values() for q in questions for pid in q.passages})
        for split, questions in by_split.items():
            count += len(questions)
            failed += [q.id for q in questions if reward(f"<answer>{q.answer}</answer>", q.answers) != 1.0 or lost & set(q.passages)]
            share = sum(support_found(q, retriever) for q in questions) / len(questions)
            shares.setdefault(folder.name, {})[split] = round(share, 4)
    return {
        "questions": count,
        "gold_score": 1 - len(failed) / count,
        "all_support_in_top_20": shares,
        "seconds": round(time.monotonic() - start, 3),
        "failed": failed,
    }


def main() -> int:
    parser = parser_of("multi_hop_qa", __doc__ or "", "a data set with corpus.jsonl, or a folder of several", SPLITS)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of search indexes, by content hash")
    args = parser.parse_args()
    return print_report(lambda: check(args.check, splits_of(args.split, SPLITS), cache=args.cache / "retrieval"))


if __name__ == "__main__":
    sys.exit(main())
