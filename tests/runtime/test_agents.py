from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lightningrl.errors import UserError
from lightningrl.runtime import load_function, load_tasks
from lightningrl.types import Task

MODULES = {
    "good_agent.py": """
import functools
NUMBER = 3
class Box:
    @staticmethod
    def run(): return 'boxed'
def run(): return 'ran'
""",
    "no_functions.py": "NUMBER = 3\n",
    "broken_agent.py": "VALUE = 1\nVALUE.missing\n",
    "needs_a_module.py": "import a_module_nobody_has\n",
    "exits_at_import.py": "import sys\nsys.exit(2)\n",
    "bad_syntax.py": "def run(:\n",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("name", "gives"), [("good_agent:run", "ran"), ("good_agent:Box.run", "boxed")])
def test_a_function_by_name(name: str, gives: str) -> None:
    assert load_function(name)() == gives


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("good_agent", "'good_agent' does not name a function: write package.module:function"),
        ("good_agent:", "'good_agent:' does not name a function: write package.module:function"),
        (":run", "':run' does not name a function: write package.module:function"),
        ("", "'' does not name a function: write package.module:function"),
        ("missing_agent:run", "there is no module missing_agent (asked for as 'missing_agent:run'): install it, or run from"),
        ("missing.agent:run", "there is no module missing (asked for as 'missing.agent:run'): "),
        ("good_agent.inner:run", "there is no module good_agent.inner (asked for as 'good_agent.inner:run'): "),
        ("good_agent:walk", "module good_agent has no 'walk' (asked for as 'good_agent:walk'): it has Box, run"),
        ("good_agent:Box.walk", "module good_agent has no 'Box.walk' (asked for as 'good_agent:Box.walk'): it has Box, run"),
        ("no_functions:run", "module no_functions has no 'run' (asked for as 'no_functions:run'): it defines no function"),
        ("good_agent:NUMBER", "good_agent:NUMBER is a int, not a function: name something that can be called"),
        ("needs_a_module:run", "cannot import needs_a_module: it needs the module a_module_nobody_has, which is not installed"),
        ("broken_agent:run", "cannot import broken_agent: AttributeError: 'int' object has no attribute 'missing' ("),
        ("exits_at_import:run", "cannot import exits_at_import: SystemExit: 2 ("),
        ("bad_syntax:run", "cannot import bad_syntax: SyntaxError: invalid syntax"),
    ],
)
def test_what_is_wrong_with_a_name_is_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        load_function(name)
    assert str(refused.value).startswith(sentence)
    assert "\n" not in str(refused.value)


def test_the_line_of_an_import_that_fails_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"({folder / 'broken_agent.py'}, line 2)")):
        load_function("broken_agent:run")


def write(folder: Path, *lines: object) -> Path:
    path = folder / "tasks.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_tasks(folder: Path) -> None:
    first = {"id": "a", "question": "é?", "target": [1]}
    path = write(folder, first, "", {"question": "2"}, {"id": 7}, "  ", {"id": None, "x": 1}, "")
    assert load_tasks(path) == [
        Task("a", {"question": "é?"}, [1]),
        Task("line-3", {"question": "2"}),
        Task("7", {}),
        Task("line-6", {"x": 1}),
    ]


def test_tasks_with_a_byte_order_mark_and_windows_line_ends(folder: Path) -> None:
    path = folder / "tasks.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "a"}\r\n{"id": "b"}\r\n')
    assert [task.id for task in load_tasks(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"id": 1}\n{"id": \n', ", line 2: not valid JSON, Expecting value: "),
        (b'{"id": 1}\n\n{"id": 2} extra\n', ", line 3: not valid JSON, Extra data: "),
        (b'{"id": 1}\n[1, 2]\n', ", line 2: this should be a JSON object, not a list"),
        (b"null\n", ", line 1: this should be a JSON object, not a NoneType"),
        (b'{"id": 1}\n\n{"id": "1"}\n', ", line 3: the id '1' is that of line 1 too; give each task its own"),
        (b'{"id": "line-2"}\n{}\n', ", line 2: the id 'line-2' is that of line 1 too; give each task its own"),
        (b'{"id": 1}\n{"x": "\xff"}\n', ", line 2: not valid JSON, it is not UTF-8 (invalid start byte)"),
        (b"", " holds no tasks: write one JSON object per line"),
        (b"\n \n", " holds no tasks: write one JSON object per line"),
    ],
)
def test_what_is_wrong_with_a_tasks_file_is_one_sentence_with_the_line(folder: Path, content: bytes, sentence: str) -> None:
    path = folder / "tasks.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_tasks(path)
    assert str(refused.value).startswith(f"{path}{sentence}")
    assert "\n" not in str(refused.value)


def test_no_such_tasks_file(folder: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*nothing\.jsonl: No such file or directory"):
        load_tasks(folder / "nothing.jsonl")
