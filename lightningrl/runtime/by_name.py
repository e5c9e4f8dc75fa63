"""Functions as JSON, by the names under which another process finds them: `{"function": "package.module:name", …}`."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable
from typing import Any

from lightningrl.runtime.agents import load_function


def named(function: Callable[..., Any]) -> dict[str, Any]:
    """A function of a module, or a `functools.partial` of one whose arguments are such functions or JSON.

    Raises:
        ValueError: for any other: a lambda, a method, an object that can be called, a function of the script that runs.
    """
    if isinstance(function, functools.partial):
        arguments = [_named_value(value) for value in function.args]
        return named(function.func) | {"arguments": arguments, "keywords": {k: _named_value(v) for k, v in function.keywords.items()}}
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not module or not name or module == "__main__" or not _is_at(module, name, function):
        raise ValueError(f"{function!r} is not a function of a module that can be imported")
    return {"function": f"{module}:{name}"}


def found(description: dict[str, Any]) -> Callable[..., Any]:
    """The function that `named` described. Raises UserError where it is not."""
    function = load_function(description["function"])
    if "keywords" not in description:
        return function
    arguments = [_found_value(value) for value in description["arguments"]]
    return functools.partial(function, *arguments, **{k: _found_value(v) for k, v in description["keywords"].items()})


def _is_at(module: str, name: str, function: Callable[..., Any]) -> bool:
    try:
        return operator.attrgetter(name)(sys.modules[module]) is function
    except (KeyError, AttributeError):
        return False


def _named_value(value: Any) -> dict[str, Any]:
    return named(value) if callable(value) else {"value": value}


def _found_value(description: dict[str, Any]) -> Any:
    return description["value"] if "value" in description else found(description)
