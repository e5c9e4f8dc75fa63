"""The data's own layout: what is loaded, what golds score, what is said of broken files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightningrl.errors import UserError
from lightningrl.tasks.math_tool.__main__ import check
from lightningrl.tasks.math_tool.data import FILES, ends_in_answer, load_problems
from lightningrl.tasks.math_tool.metric import numeric_match


def test_all_golds_score_one(calc_dir: Path) -> None:
    report = check(calc_dir, list(FILES))
    assert (report["questions"], report["gold_score"], report["failed"]) == (9693 + 668 + 300, 1.0, [])
    # 26 MAWPS answers are roundings, such as 0.833333 for 0.166667 + 0.166667 + 0.5.
    assert (report["empty_chains"], report["chains_to_another_number"], report["rounded_answers"]) == (96 + 6, 377 + 50, 26)
    assert report["gold_chains"] == 10661 - 102 - 427 - 26


def test_real_chains_leave_room_for_mistakes(calc_dir: Path) -> None:
    problems = load_problems(calc_dir, "eval_gsm8k")
    assert sum(bool(p.wrong) for p in problems) > len(problems) / 2
    assert not any(numeric_match(chain[-1][1], p.answer) for p in problems for _, chain in p.wrong)


def test_a_folder_is_loaded(tiny: Path) -> None:
    first, empty, other, rounded, line = load_problems(tiny, "train")
    assert (first.id, first.answer, first.chain, first.kind) == ("two steps", "72", (("48/2", "24"), ("48+24", "72")), "gsm8k")
    assert dict(first.wrong)["operation_2"] == (("48/2", "24"), ("48-24", "24"))
    assert (empty.chain, empty.wrong, other.wrong) == ((), (), ())
    assert "\u2028" in line.question
    assert [ends_in_answer(p) for p in (first, empty, other, rounded, line)] == [True, False, False, True, True]
    assert load_problems(tiny, "train", with_mistakes=False)[0].wrong == ()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "line 2: this should be a JSON object"),
        ('{"id": "a", "question": "?"}', "line 2: there is no text field 'answer'"),
        ('{"id": "a", "question": "?", "answer": 5}', "line 2: there is no text field 'answer'"),
        ('{"id": "a", "question": "?", "answer": "many"}', "line 2: the answer 'many' is not a number"),
        ('{"id": "a", "question": "?", "answer": "5"}', "line 2: the chain should be a list"),
        ('{"id": "a", "question": "?", "answer": "5", "chain": [["5"]]}', "line 2: the chain should be a list"),
        ('{"id": "a", "question": "?", "answer": "5", "chain": [["2+3", 5]]}', "line 2: the chain should be a list"),
    ],
)
def test_a_broken_line_is_named(tiny: Path, line: str, message: str) -> None:
    path = tiny / "eval_svamp.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        load_problems(tiny, "eval_svamp")
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_said(tiny: Path) -> None:
    with pytest.raises(UserError, match="no split 'dev'"):
        load_problems(tiny, "dev")
    (tiny / "eval_gsm8k.jsonl").write_text("\n")
    with pytest.raises(UserError, match="there are no records in it"):
        load_problems(tiny, "eval_gsm8k")
    (tiny / "eval_gsm8k.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        load_problems(tiny, "eval_gsm8k")
    (tiny / "eval_gsm8k.jsonl").unlink()
    with pytest.raises(UserError, match="there is no such file"):
        load_problems(tiny, "eval_gsm8k")


def run_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lightningrl.tasks.math_tool", "--check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])


def test_the_check_command(tiny: Path) -> None:
    done = run_check(str(tiny))
    report = json.loads(done.stdout)
    assert report.pop("seconds") >= 0
    assert (done.returncode, report) == (
        0,
        {
            "questions": 7,
            "gold_score": 0.75,
            "gold_chains": 4,
            "empty_chains": 1,
            "chains_to_another_number": 1,
            "rounded_answers": 1,
            "failed": ["wrong"],
        },
    )
    assert json.loads(run_check(str(tiny), "--split", "eval_svamp").stdout)["gold_score"] == 1.0


def test_the_check_command_on_a_wrong_folder(tmp_path: Path) -> None:
    done = run_check(str(tmp_path))
    assert done.returncode == 1 and "there is no such file" in done.stderr and "Traceback" not in done.stderr
