"""The notebooks: each is run from top to bottom in a copy of its folder, and must print what is kept in it."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator

import matplotlib.image
import nbformat
import numpy as np
import pytest

from scripts.run_notebooks import FOLDER, execute

NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))
SAME_PICTURE = 1e-3  # mean difference over pixels and channels, of 1
RESULTS = ("experiments/results/credit_lab", "experiments/results/r1")  # what 03 reads, and 04 to 06
AGAIN = "run scripts/run_notebooks.py and look at what changed"

each_notebook = pytest.mark.parametrize("name", NAMES)


def kept(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / name, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """What a reader sees below the cell, as (kind, text); of a picture only that it is there."""
    pieces = []
    for output in cell.outputs:
        if output.output_type == "stream":
            pieces.append((output.name, output.text))
        elif "image/png" in output.get("data", {}):
            pieces.append(("picture", ""))
        else:
            pieces.append((output.output_type, output.get("data", {}).get("text/plain", "")))
    return pieces


def pictures(notebook: nbformat.NotebookNode) -> Iterator[np.ndarray]:
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                yield matplotlib.image.imread(io.BytesIO(base64.b64decode(output.data["image/png"])), format="png")


def test_the_notebooks_are_there():
    assert [name.split("_")[0] for name in NAMES] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.slow
@each_notebook
def test_prints_what_is_kept(name, tmp_path):
    """On a copy, since opening a store touches its folder."""
    for folder in ("notebooks", *RESULTS):
        shutil.copytree(FOLDER.parent / folder, tmp_path / folder, ignore=shutil.ignore_patterns("runs"))
    fresh = execute(tmp_path / "notebooks" / name)
    for number, (old, new) in enumerate(zip(code_cells(kept(name)), code_cells(fresh), strict=True), start=1):
        assert shown(new) == shown(old), f"code cell {number} of {name} prints something else than what is kept in it: {AGAIN}"
    for number, (before, after) in enumerate(zip(pictures(kept(name)), pictures(fresh), strict=True), start=1):
        # Another colour in one cell of a map is ten times this; the edges of letters, drawn by another version, are less.
        same = before.shape == after.shape and np.abs(before - after).mean() < SAME_PICTURE
        assert same, f"picture {number} of {name} is not the one that is kept in it: {AGAIN}"


@each_notebook
def test_keeps_the_outputs_of_one_run(name):
    cells = code_cells(kept(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    printing = [cell for cell in cells if "\nprint(" in f"\n{cell.source}" or "\n    print(" in cell.source]
    assert printing and all(any(kind == "stdout" for kind, _ in shown(cell)) for cell in printing)


@each_notebook
def test_keeps_its_pictures(name):
    images = list(pictures(kept(name)))
    assert images
    for image in images:
        assert min(image.shape[:2]) > 100 and image[..., :3].std() > 0.01  # not blank


@each_notebook
def test_keeps_no_noise_and_nothing_of_a_machine(name):
    """No warnings, no paths, no time of day, no versions: what changes when outputs are kept anew is outputs."""
    notebook = kept(name)
    for cell in code_cells(notebook):
        for kind, text in shown(cell):
            assert kind in ("stdout", "picture", "execute_result"), f"{name} shows {kind}: {text}"
            assert not any(place in text for place in ("/home/", "/root/", "/tmp/", "/Users/", "site-packages")), text
    assert set(notebook.metadata) == {"kernelspec", "language_info"} and dict(notebook.metadata.language_info) == {"name": "python"}
    assert not any(cell.metadata for cell in notebook.cells)
