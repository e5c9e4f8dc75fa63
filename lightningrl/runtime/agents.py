"""What a user hands in by name: an agent or reward function, and a file of tasks."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightningrl.errors import UserError
from lightningrl.json_lines import json_lines
from lightningrl.types import Task


def load_function(name: str) -> Callable[..., Any]:
    """The function that `package.module:function` names; modules are also found from the current directory.

    Raises:
        UserError: a name without a colon, a module that isn't there or fails to import, an attribute that isn't there or
            can't be called.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise UserError(f"{name!r} does not name a function: write package.module:function")
    module = _import(module_name, name)
    function: Any = module
    for part in attribute.split("."):
        if not hasattr(function, part):
            raise UserError(f"module {module_name} has no {attribute!r} (asked for as {name!r}): {_functions(module)}")
        function = getattr(function, part)
    if not callable(function):
        raise UserError(f"{name} is a {type(function).__name__}, not a function: name something that can be called")
    return function


def _import(module_name: str, name: str) -> Any:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` would; a console script doesn't
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UserError(
                f"there is no module {error.name} (asked for as {name!r}): install it, or run from the folder that holds it"
            ) from error
        raise UserError(f"cannot import {module_name}: it needs the module {error.name}, which is not installed") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may do anything at all, sys.exit included
        raise UserError(f"cannot import {module_name}: {type(error).__name__}: {error}{_where(error)}") from error


def _where(error: BaseException) -> str:
    """The last line of user code that an import got to."""
    trace, frames = error.__traceback__, []
    while trace is not None:
        if "importlib" not in trace.tb_frame.f_code.co_filename:
            frames.append(f" ({trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno})")
        trace = trace.tb_next
    return frames[-1] if len(frames) > 1 else ""


def _functions(module: Any) -> str:
    own = (name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__)
    names = [name for name in own if callable(getattr(module, name))]
    return f"it has {', '.join(names)}" if names else "it defines no function"


def load_tasks(path: str | Path) -> list[Task]:
    """Tasks from a file of JSON objects, one a line; blank lines are skipped.

    "target" is for the reward function only; "id" names the task, by default by its line ("line-12"). All other fields are the
    agent's input.

    Raises:
        UserError: no such file, no tasks in it, or a line that is not a JSON object or repeats an id (with its number).
    """
    path = Path(path)
    tasks: list[Task] = []
    lines: dict[str, int] = {}
    for number, fields in json_lines(path):
        given = fields.pop("id", None)
        id_ = f"line-{number}" if given is None else str(given)
        if id_ in lines:
            raise UserError(f"{path}, line {number}: the id {id_!r} is that of line {lines[id_]} too; give each task its own")
        lines[id_] = number
        target = fields.pop("target", None)
        tasks.append(Task(id_, fields, target))
    if not tasks:
        raise UserError(f"{path} holds no tasks: write one JSON object per line")
    return tasks
