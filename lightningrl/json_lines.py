"""Files of JSON objects, one a line: what is wrong with one is said with the number of its line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightningrl.errors import UserError


def json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of every line that is not blank.

    Raises:
        UserError: a file that cannot be read, or a line that is not a JSON object.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")  # a text may hold other separators of lines
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            fields = json.loads(text) if text else None
        except (ValueError, RecursionError) as error:
            reason = f"it is not UTF-8 ({error.reason})" if isinstance(error, UnicodeDecodeError) else str(error)
            raise UserError(f"{path}, line {number}: not valid JSON, {reason}; write one JSON object per line") from error
        if not text:
            continue
        if not isinstance(fields, dict):
            raise UserError(f"{path}, line {number}: this should be a JSON object, not a {type(fields).__name__}")
        yield number, fields


def text_field(fields: dict[str, Any], name: str, path: str | Path, number: int) -> str:
    """The text under a name in the object of a line. Raises UserError where there is none."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise UserError(f"{path}, line {number}: there is no text field {name!r}")
    return value
