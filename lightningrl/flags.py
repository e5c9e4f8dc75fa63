"""A frozen dataclass of settings as plain command-line flags, and an entry point that talks to people.

@dataclasses.dataclass(frozen=True)
class Config:
    lr: float = dataclasses.field(default=1e-3, metadata={"help": "learning rate"})
    train_roles: tuple[str, ...] = ()

flags.define_flags(Config)                      # --lr=0.001 --train_roles=writer,rewriter
def main(): config = flags.config_from_flags(Config)
if __name__ == "__main__": flags.run_app(main)
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from absl import app, flags, logging

from lightningrl.errors import UserError

ConfigT = TypeVar("ConfigT")

# Flags belong to the module that calls define_flags, so that --help of a program shows them.
flags.disclaim_key_flags()


class _OrNone(flags.ArgumentParser):
    """Parses `none` as None and everything else as `inner` does."""

    def __init__(self, inner: flags.ArgumentParser):
        self.inner = inner
        self.syntactic_help = "or none"

    def parse(self, argument: Any) -> Any:
        return None if argument == "none" else self.inner.parse(argument)

    def flag_type(self) -> str:
        return f"{self.inner.flag_type()} or none"


_PARSERS: dict[Any, Callable[[], flags.ArgumentParser]] = {
    str: flags.ArgumentParser,
    int: flags.IntegerParser,
    float: flags.FloatParser,
    bool: flags.BooleanParser,
    tuple[str, ...]: flags.ListParser,
}


def define_flags(config: type, flag_values: flags.FlagValues = flags.FLAGS, *, defaults: Mapping[str, Any] | None = None) -> None:
    """Defines one flag per field of the dataclass `config`, with the field's default and its `metadata["help"]`.

    Args:
        defaults: other ones, by field.

    Fields are str, int, float, bool (`--x` and `--nox`), tuple[str, ...] (comma-separated), `Literal` strings (one of
    them), or any of these or None (`--x=none`).

    Raises:
        TypeError: a field of another type, one without a default, or a default of no field.
    """
    hints = typing.get_type_hints(config)
    defaults = defaults or {}
    if unknown := sorted(defaults.keys() - {field.name for field in dataclasses.fields(config)}):
        raise TypeError(f"{config.__name__} has no field {unknown[0]}")
    for field in dataclasses.fields(config):
        default = defaults.get(field.name, field.default)
        if default is dataclasses.MISSING:
            raise TypeError(f"{config.__name__}.{field.name} needs a plain default to be a flag")
        parser = _parser(f"{config.__name__}.{field.name}", hints[field.name])
        text = field.metadata.get("help", "")
        if isinstance(parser, flags.BooleanParser):
            flags.DEFINE_boolean(field.name, default, text, flag_values)
            continue
        serializer: flags.ArgumentSerializer = flags.ArgumentSerializer()
        if isinstance(parser, flags.ListParser) or isinstance(getattr(parser, "inner", None), flags.ListParser):
            serializer = flags.CsvListSerializer(",")
            default = list(default) if default is not None else None
        flags.DEFINE(parser, field.name, default, text, flag_values, serializer)


def config_from_flags(config: type[ConfigT], flag_values: flags.FlagValues = flags.FLAGS) -> ConfigT:
    """The dataclass with every field as the command line says, its default where it says nothing."""
    values = {field.name: flag_values[field.name].value for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def run_app(main: Callable[[], object]) -> None:
    """Parses the flags of `sys.argv`, calls `main()` and exits: with 0, or 1 after an error that a person can put right.

    UserError and OSError print one sentence on stderr; any other exception is a defect and keeps its traceback. Ctrl-C
    prints one line and exits with 130, an unknown or unreadable flag is explained by absl. Arguments that are no flags
    are refused.
    """

    def guarded(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            if len(argv) > 1:
                raise UserError(f"{argv[1]!r} is no flag; settings are given as --name=value, see --help")
            main()
        except (UserError, OSError) as error:
            sys.stdout.flush()
            print(f"error: {_sentence(error)}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            sys.exit(130)

    if {"--help", "-help"} & set(sys.argv[1:]):
        # absl exits with 1 here; asking for help is no error.
        app.usage(shorthelp=True, writeto_stdout=True)
        sys.exit(0)
    app.run(guarded)


def _parser(name: str, hint: Any) -> flags.ArgumentParser:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [option for option in typing.get_args(hint) if option is not type(None)]
        if len(inner) == 1:
            return _OrNone(_parser(name, inner[0]))
    if typing.get_origin(hint) is typing.Literal:
        return flags.EnumParser(list(typing.get_args(hint)))
    if hint not in _PARSERS:
        raise TypeError(f"{name} cannot be a flag: its type {hint} is none of str, int, float, bool, tuple[str, ...]")
    return _PARSERS[hint]()


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename is not None else error.strerror
    return str(error)
