"""What goes wrong through no fault of the program."""


class UserError(Exception):
    """Something a person can put right: a missing file, an unknown name, a checkpoint of another config.

    Its text is one sentence that says what is wrong, where, and what would be right. Commands print it without a
    traceback and exit with status 1 (`lightningrl.flags.run_app`).
    """
