"""Passages of a corpus, and the file that holds one: a JSON object a line, `{"pid": …, "title": …, "text": …}`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from lightningrl.errors import UserError
from lightningrl.json_lines import json_lines, text_field


@dataclasses.dataclass(frozen=True)
class Passage:
    pid: str  # unique within its corpus
    title: str
    text: str


def load_passages(path: str | Path) -> list[Passage]:
    """The passages of a corpus file, in its order. Raises `UserError` for a file that is missing or empty, and for a broken line."""
    passages: list[Passage] = []
    lines: dict[str, int] = {}
    for number, record in json_lines(path):
        passage = Passage(*(text_field(record, name, path, number) for name in ("pid", "title", "text")))
        if passage.pid in lines:
            raise UserError(f"{path}, line {number}: the pid {passage.pid!r} is that of line {lines[passage.pid]} too")
        lines[passage.pid] = number
        passages.append(passage)
    if not passages:
        raise UserError(f"{path} holds no passages: write one JSON object with pid, title and text per line")
    return passages


def save_passages(path: Path, passages: Sequence[Passage]) -> None:
    path.write_text("".join(json.dumps(dataclasses.asdict(passage), ensure_ascii=False) + "\n" for passage in passages), "utf-8")
