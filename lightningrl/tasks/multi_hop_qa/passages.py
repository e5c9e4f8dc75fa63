"""Passages of a corpus, and the file that holds one: a JSON object a line, `{"pid": …, "title": …, "text": …}`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightningrl.errors import UserError


@dataclasses.dataclass(frozen=True)
class Passage:
    pid: str  # unique within its corpus
    title: str
    text: str


def load_passages(path: str | Path) -> list[Passage]:
    """The passages of a corpus file, in its order. Raises `UserError` for a file that is missing or empty, and for a broken line."""
    passages: list[Passage] = []
    lines: dict[str, int] = {}
    for number, record in records(path):
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


def records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of every line that is not blank. Raises `UserError` with the number of a line that is not a JSON object."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error}); is the download whole?") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: this should be a JSON object, not a {type(record).__name__}")
        yield number, record


def text_field(record: dict[str, Any], name: str, path: str | Path, number: int) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise UserError(f"{path}, line {number}: there is no text field {name!r}")
    return value
