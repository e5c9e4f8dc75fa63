"""What goes wrong through no fault of the program."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Something a person can put right: a missing file, an unknown name, a checkpoint of another config.

    Its text is one sentence that says what is wrong, where, and what would be right. Commands print it without a
    traceback and exit with status 1 (`lightningrl.flags.run_app`).
    """


@contextlib.contextmanager
def settings_of_a_person() -> Iterator[None]:
    """Makes a ValueError, about settings that came from outside unchanged, a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
