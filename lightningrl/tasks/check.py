"""What the tasks' `--check` commands have in common: a report as JSON, or one sentence about what is missing or broken."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightningrl.errors import UserError


def parser_of(task: str, purpose: str, layout: str, splits: Sequence[str]) -> argparse.ArgumentParser:
    """Takes `--check DIR` and `--split`, one of the splits or "all", the default."""
    parser = argparse.ArgumentParser(prog=f"python -m lightningrl.tasks.{task}", description=purpose.split("\n")[0])
    parser.add_argument("--check", metavar="DIR", type=Path, required=True, help=layout)
    parser.add_argument("--split", choices=[*splits, "all"], default="all", help="default: all files")
    return parser


def splits_of(chosen: str, splits: Sequence[str]) -> list[str]:
    return list(splits) if chosen == "all" else [chosen]


def print_report(report: Callable[[], Mapping[str, Any]]) -> int:
    """Prints what `report` returns, or the sentence of its UserError on stderr. Returns the exit status."""
    try:
        found = report()
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found, indent=2))
    return 0
