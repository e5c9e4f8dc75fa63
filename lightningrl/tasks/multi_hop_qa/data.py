"""MuSiQue, 2WikiMultihopQA and HotpotQA: folders with `corpus.jsonl`, `train.jsonl` and `eval.jsonl`, given by path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightningrl.errors import UserError
from lightningrl.json_lines import json_lines, text_field
from lightningrl.tasks.multi_hop_qa.passages import load_passages
from lightningrl.tasks.multi_hop_qa.questions import Question

DATA_SETS = ("musique", "2wiki", "hotpotqa")
SPLITS = ("train", "eval")


def data_sets(directory: str | Path) -> list[Path]:
    """The folders of the data sets in `directory`, or the directory itself if it is one.

    Raises `UserError` where there is none.
    """
    root = Path(directory)
    found = [path for path in (root, *(root / name for name in DATA_SETS)) if (path / "corpus.jsonl").is_file()]
    if not found:
        raise UserError(f"{root}: there is no corpus.jsonl here, nor in {', '.join(DATA_SETS)} below; give the folder of multi-hop data")
    return found


def load_questions(folder: str | Path, split: str) -> list[Question]:
    """The questions of a split ("train" or "eval"), in the order of its file.

    `support` are the titles of the supporting passages, which must be in the corpus.

    Raises `UserError` for an unknown split, for a file that is missing, and for a broken line, with its number.
    """
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r} here: use one of {', '.join(SPLITS)}")
    path, corpus = Path(folder) / f"{split}.jsonl", Path(folder) / "corpus.jsonl"
    titles = {passage.pid: passage.title for passage in load_passages(corpus)}
    questions = []
    for number, record in json_lines(path):
        support = _texts(record, "support", path, number)
        for pid in support:
            if pid not in titles:
                raise UserError(f"{path}, line {number}: the supporting passage {pid} is not in {corpus.name}")
        hops = record.get("hops")
        if not isinstance(hops, int):
            raise UserError(f"{path}, line {number}: there is no number 'hops'")
        questions.append(
            Question(
                id=f"{path.parent.name}-{text_field(record, 'id', path, number)}",
                corpus=str(corpus),
                question=text_field(record, "question", path, number),
                answer=text_field(record, "answer", path, number),
                aliases=_texts(record, "aliases", path, number),
                kind=text_field(record, "type", path, number),
                hops=hops,
                support=tuple(titles[pid] for pid in support),
                passages=support,
            )
        )
    if not questions:
        raise UserError(f"{path} holds no questions")
    return questions


def _texts(record: dict[str, Any], name: str, path: Path, number: int) -> tuple[str, ...]:
    value = record.get(name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{path}, line {number}: there is no list of texts {name!r}")
    return tuple(value)
