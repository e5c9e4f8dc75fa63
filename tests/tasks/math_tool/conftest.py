"""Data that the tests of the math task share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tasks.conftest import data_folder


@pytest.fixture(scope="session")
def calc_dir() -> Path:
    """GSM8K, SVAMP and MAWPS with chains."""
    return data_folder("calc", "train.jsonl")


def record(id: str, answer: str, chain: list[list[str]], **more: Any) -> dict[str, Any]:
    return {"id": id, "source": "gsm8k", "question": f"What is {id}?", "answer": answer, "chain": chain, **more}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder in the data's layout: gold chains, an empty one, one to another number, a rounded and a wrong one."""
    train = [
        record("two steps", "72", [["48/2", "24"], ["48+24", "72"]]),
        record("empty", "5", []),
        record("another number", "300", [["25*.01*1000", "250"]]),
        record("rounded", "0.25", [["(2.99 / 12)", "0.25"]]),
        record("a line\u2028of its own", "990", [["720+270", "990.00"]]),
    ]
    files = {
        "train": train,
        "eval_gsm8k": [record("wrong", "9", [["2*4", "9"]])],
        "eval_svamp": [record("one step", "5", [["( 7.0 - 2.0 )", "5"]], source="svamp")],
    }
    for name, records in files.items():
        text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path
