"""Is a Spider download whole? `python -m lightningrl.tasks.text_to_sql --check DIR` runs every gold answer in it.

Prints one JSON object: `questions`, `databases`, `gold_score` (the share of gold queries that run in the sandbox, give as
many rows as the data set says, and match themselves under the metric), `seconds`, and `failed`, the ids of the others.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from lightningrl.tasks.check import parser_of, print_report, splits_of
from lightningrl.tasks.text_to_sql.metric import GOLD_MAX_ROWS, GOLD_TIME_LIMIT_S, execution_match
from lightningrl.tasks.text_to_sql.questions import Question
from lightningrl.tasks.text_to_sql.spider import FILES, load_spider
from lightningrl.tasks.text_to_sql.sql_tool import run_query


def gold_passes(question: Question) -> bool:
    """Whether the tool runs the gold query to the recorded number of rows, and the metric takes it for right."""
    result = run_query(question.database, question.gold, time_limit_s=GOLD_TIME_LIMIT_S, max_rows=GOLD_MAX_ROWS)
    if result.rows is None or len(result.rows) != question.gold_rows:
        return False
    return execution_match(question.gold, question.gold, question.database, time_limit_s=GOLD_TIME_LIMIT_S)


def check(data_dir: Path, splits: list[str]) -> dict[str, object]:
    """Runs the gold answers of the splits. Raises `UserError` for what is missing."""
    start = time.monotonic()
    questions = [question for split in splits for question in load_spider(data_dir, split, with_empty=True)]  # type: ignore[arg-type]
    failed = [question.id for question in questions if not gold_passes(question)]
    return {
        "questions": len(questions),
        "databases": len({question.database for question in questions}),
        "gold_score": 1 - len(failed) / len(questions),
        "seconds": round(time.monotonic() - start, 3),
        "failed": failed,
    }


def main() -> int:
    parser = parser_of("text_to_sql", __doc__ or "", "a data set in Spider's official layout", list(FILES))
    args = parser.parse_args()
    return print_report(lambda: check(args.check, splits_of(args.split, list(FILES))))


if __name__ == "__main__":
    sys.exit(main())
