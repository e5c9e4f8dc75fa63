"""GSM8K (arXiv 2110.14168), SVAMP (2103.07191) and MAWPS with calculator chains, one JSON record a line.

A record has `id`, `source`, `question`, `answer` and `chain`, the gold calls as [expression, value] pairs. Chains come from
the data sets' own annotations: some are empty, and some end in another number than the answer.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lightningrl.errors import UserError
from lightningrl.json_lines import json_lines, text_field
from lightningrl.tasks.math_tool.chains import Chain, steps_of
from lightningrl.tasks.math_tool.metric import numeric_match, read_number
from lightningrl.tasks.math_tool.problems import Problem, wrong_chains

FILES = {"train": "train.jsonl", "eval_gsm8k": "eval_gsm8k.jsonl", "eval_svamp": "eval_svamp.jsonl"}


def load_problems(data_dir: str | Path, split: str, *, with_mistakes: bool = True) -> list[Problem]:
    """The problems of a split, in the order of its file.

    Where every call of a chain that ends in the answer has two operands, the mistakes about it come with the problem,
    unless `with_mistakes` is false.
    Raises `UserError`, with the number of the line, for what is missing or broken.
    """
    if split not in FILES:
        raise UserError(f"there is no split {split!r}: choose from {', '.join(FILES)}")
    path = Path(data_dir) / FILES[split]
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; the folder should have {', '.join(FILES.values())}")
    problems = [_problem(record, path, number, with_mistakes) for number, record in json_lines(path)]
    if not problems:
        raise UserError(f"{path}: there are no records in it")
    return problems


def ends_in_answer(problem: Problem) -> bool:
    """Whether the recorded chain's last value is the answer."""
    return bool(problem.chain) and numeric_match(problem.chain[-1][1], problem.answer)


def _problem(record: dict[str, Any], path: Path, number: int, with_mistakes: bool) -> Problem:
    id, question, answer = (text_field(record, name, path, number) for name in ("id", "question", "answer"))
    place = f"{path}, line {number}"
    if read_number(answer) is None:
        raise UserError(f"{place}: the answer {answer!r} is not a number")
    problem = Problem(id, question, answer, _chain(record.get("chain"), place), kind=str(record.get("source", "")))
    steps = steps_of(problem.chain) if with_mistakes and ends_in_answer(problem) else None
    return problem if steps is None else dataclasses.replace(problem, wrong=wrong_chains(steps, problem.answer))


def _chain(value: Any, place: str) -> Chain:
    def is_call(call: Any) -> bool:
        return isinstance(call, list) and len(call) == 2 and all(isinstance(text, str) for text in call)

    if not isinstance(value, list) or not all(map(is_call, value)):
        raise UserError(f"{place}: the chain should be a list of [expression, value] pairs of texts")
    return tuple((expression, result) for expression, result in value)
