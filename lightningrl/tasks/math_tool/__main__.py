"""Is the data whole? `python -m lightningrl.tasks.math_tool --check DIR` runs every gold chain in it.

Prints one JSON object: `questions`; `gold_score`, the share of the gold chains whose calls, run by the real calculator, end
in the answer; `gold_chains`, how many there are; `seconds`; and `failed`. Without a gold chain are `empty_chains`,
`chains_to_another_number`, whose last recorded value is not the answer, and `rounded_answers`: there the recorded value is
the answer, but only a rounding of what its expression is worth, less than a hundredth away.
"""

from __future__ import annotations

import collections
import sys
import time
from pathlib import Path
from typing import Literal

from lightningrl.tasks.check import parser_of, print_report, splits_of
from lightningrl.tasks.math_tool.calculator import calculate
from lightningrl.tasks.math_tool.data import FILES, ends_in_answer, load_problems
from lightningrl.tasks.math_tool.metric import CALC_X_TOLERANCE, numeric_match
from lightningrl.tasks.math_tool.problems import Problem

Verdict = Literal["empty", "another number", "rounded", "passed", "failed"]


def verdict(problem: Problem) -> Verdict:
    """What comes of the chain when the calculator runs its calls."""
    if not problem.chain:
        return "empty"
    if not ends_in_answer(problem):
        return "another number"
    results = [calculate(expression) for expression, _ in problem.chain]
    if any(result.startswith("error") for result in results):
        return "failed"
    if numeric_match(results[-1], problem.answer):
        return "passed"
    return "rounded" if numeric_match(results[-1], problem.answer, relative_tolerance=CALC_X_TOLERANCE) else "failed"


def check(data_dir: Path, splits: list[str]) -> dict[str, object]:
    """Runs the gold chains of the splits. Raises `UserError` for what is missing or broken."""
    start = time.monotonic()
    problems = [problem for split in splits for problem in load_problems(data_dir, split, with_mistakes=False)]
    verdicts = [verdict(problem) for problem in problems]
    count = collections.Counter(verdicts)
    gold = count["passed"] + count["failed"]
    return {
        "questions": len(problems),
        "gold_score": count["passed"] / gold if gold else 0.0,
        "gold_chains": gold,
        "empty_chains": count["empty"],
        "chains_to_another_number": count["another number"],
        "rounded_answers": count["rounded"],
        "seconds": round(time.monotonic() - start, 3),
        "failed": [problem.id for problem, found in zip(problems, verdicts, strict=True) if found == "failed"],
    }


def main() -> int:
    parser = parser_of("math_tool", __doc__ or "", f"a folder with {', '.join(FILES.values())}", list(FILES))
    args = parser.parse_args()
    return print_report(lambda: check(args.check, splits_of(args.split, list(FILES))))


if __name__ == "__main__":
    sys.exit(main())
