"""Collects what a library answered and writes it, with the settings of every case, to one file."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import numpy as np


class Recorder:
    """Cases by name, such as `loss/vanilla`; each holds named arrays and the settings it was run with."""

    def __init__(self, *packages: str):
        self.arrays: dict[str, np.ndarray] = {}
        self.cases: dict[str, dict[str, Any]] = {}
        self.versions = {package: metadata.version(package).split("+")[0] for package in packages}

    def add(self, case: str, settings: Mapping[str, Any] | None = None, **arrays: Any) -> None:
        if case in self.cases:
            raise ValueError(f"The case {case!r} is recorded twice.")
        self.cases[case] = dict(settings or {})
        for name, array in arrays.items():
            array = np.asarray(array)
            if array.dtype == np.float64:
                array = array.astype(np.float32)
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"{name} of {case!r} is not finite.")
            self.arrays[f"{case}/{name}"] = array

    def write(self, path: pathlib.Path) -> None:
        meta = {"versions": self.versions, "cases": self.cases}
        np.savez_compressed(path, meta=np.array(json.dumps(meta, sort_keys=True)), **{key: self.arrays[key] for key in sorted(self.arrays)})


def demand(covered: set[str], offered: set[str], what: str) -> None:
    """Ends the recording where the library has something that no case runs, or no longer has what one does."""
    if covered != offered:
        missing, gone = sorted(offered - covered), sorted(covered - offered)
        sys.exit(f"{what}: no case runs {missing or 'nothing'}; cases run {gone or 'nothing'}, which the library does not have.")
