"""`python -m MODULE` in a process of its own that need not import JAX anew: forked from one that has, before any thread was started."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import runpy
import signal
import sys
import tempfile
from collections.abc import Sequence

PRELOAD = ["lightningrl.fit", "transformers.tokenization_utils_tokenizers", "orbax.checkpoint", "matplotlib.pyplot"]


class Forked:
    """What a test needs of `subprocess.Popen`."""

    def __init__(self, module: str, arguments: Sequence[str], cwd: pathlib.Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._errors = tempfile.TemporaryDirectory()
        self._path = pathlib.Path(self._errors.name) / "stderr"
        self._process = context.Process(target=_main, args=(module, list(arguments), str(cwd), str(self._path)))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> str:
        """What it wrote to stderr, once it has ended."""
        self._process.join(timeout)
        assert self.returncode is not None, f"still running after {timeout} s"
        errors = self._path.read_text() if self._path.exists() else ""
        self._errors.cleanup()
        return errors


def _main(module: str, arguments: list[str], cwd: str, errors: str) -> None:
    os.chdir(cwd)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT, 0o600), 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.dup2(1, 0)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # the copy that was preloaded with what it imports
    runpy.run_module(module, run_name="__main__", alter_sys=True)
