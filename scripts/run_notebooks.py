"""Runs the notebooks from top to bottom on the CPU and keeps what they print; tests/test_notebooks.py checks that they still do.

python scripts/run_notebooks.py [notebooks/01_from_a_rollout_to_credit.ipynb …]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbclient
import nbformat

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
QUIET = ["--log-level=ERROR"]  # else a kernel warns that its sockets, of loopback, are not encrypted
HANGS = 300  # seconds of a cell after which it is given up


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, run in its folder. Nothing that depends on the machine or its user is in it.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = nbclient.NotebookClient(
        notebook,
        timeout=HANGS,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,  # what is printed comes in pieces that depend on timing
        extra_arguments=QUIET,
        resources={"metadata": {"path": str(path.parent)}},
    )
    with tempfile.TemporaryDirectory() as nobody:
        client.execute(env=kernel_environment(nobody))
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def kernel_environment(ipython: str) -> dict[str, str]:
    """This process's, with the package of this checkout, on the CPU, and without settings that would change what is shown."""
    kept = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # What a notebook computes is small: most of its time goes into compiling, and most of that into optimising.
    flags = "--xla_backend_optimization_level=0"
    # Where ipywidgets is missing tqdm says so, with the path of this machine's environment.
    quiet = {"PYTHONWARNINGS": "ignore::Warning:tqdm.auto"}
    return kept | quiet | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "IPYTHONDIR": ipython, "XLA_FLAGS": flags}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="files; none given: all in notebooks/")
    for path in parser.parse_args(arguments).notebooks or sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(execute(path), path)
        print(path.name)


if __name__ == "__main__":
    main()
