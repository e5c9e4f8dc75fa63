"""Records what verl, TRL and rlax answer on seeded inputs, for tests/golden to compare ours with.

python scripts/make_goldens.py            # makes an environment for each library, runs it, writes tests/golden/*.npz
python scripts/make_goldens.py --check    # runs them again and fails if a value is not the recorded one

Each library runs as it is published, in a virtual environment of its own with the versions of scripts/goldens/*.txt, which is made
once (about 5 minutes and 2 GB for verl and TRL). What is run, and on what, is in scripts/goldens/; a recording ends with an error where
an estimator or a loss that the library offers is run by no case. Inputs are drawn by NumPy from one seed, so a second recording gives
the same file; on another processor sums may round otherwise, for which --check allows what the tests allow.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import venv

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORDERS = ROOT / "scripts" / "goldens"
GOLDENS = ROOT / "tests" / "golden"
ENVIRONMENTS = {"verl": "verl.txt", "trl": "verl.txt", "rlax": "rlax.txt"}  # a recorder's, by its file
RTOL, ATOL = 1e-5, 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help=f"which of {', '.join(ENVIRONMENTS)}; all by default")
    parser.add_argument("--check", action="store_true", help="write nothing, and compare with what is recorded")
    parser.add_argument("--environments", type=pathlib.Path, default=ROOT / "build" / "goldens", help="where they are kept")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.libraries) - set(ENVIRONMENTS))
    if unknown:
        parser.error(f"there is no recorder for {', '.join(unknown)}: choose from {', '.join(ENVIRONMENTS)}")

    differences: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        for library in arguments.libraries or ENVIRONMENTS:
            python = environment(arguments.environments.resolve(), ENVIRONMENTS[library])
            new = record(python, library, pathlib.Path(directory))
            if arguments.check:
                differences += compare(new, GOLDENS / new.name)
            else:
                (GOLDENS / new.name).write_bytes(new.read_bytes())
                print(f"wrote {(GOLDENS / new.name).relative_to(ROOT)}, {new.stat().st_size // 1024} KiB")
    if differences:
        sys.exit("\n".join(differences))


def environment(directory: pathlib.Path, requirements: str) -> pathlib.Path:
    """The interpreter of a virtual environment with these requirements, made if it is not there."""
    pins, place = RECORDERS / requirements, directory / pathlib.Path(requirements).stem
    python, stamp = place / "bin" / "python", place / "installed"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != pins.read_text(encoding="utf-8"):
        print(f"making the environment of {pins.relative_to(ROOT)} in {place}", flush=True)
        venv.create(place, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement", pins], check=True)
        stamp.write_text(pins.read_text(encoding="utf-8"), encoding="utf-8")
    return python


def record(python: pathlib.Path, library: str, directory: pathlib.Path) -> pathlib.Path:
    """Runs a recorder, on the CPU and with one thread, as sums over several are not always in one order."""
    settings = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run([python, RECORDERS / f"record_{library}.py", directory], check=True, env={**os.environ, **settings})
    return directory / f"{library}.npz"


def compare(new: pathlib.Path, old: pathlib.Path) -> list[str]:
    """One line for every difference."""
    if not old.exists():
        return [f"{old.name}: nothing is recorded"]
    with np.load(new) as now, np.load(old) as before:
        differences = [f"{old.name}: {name} is in one recording only" for name in sorted(set(now.files) ^ set(before.files))]
        same = 0
        for name in sorted(set(now.files) & set(before.files)):
            same += np.array_equal(now[name], before[name])
            if now[name].dtype.kind != "f" or now[name].shape != before[name].shape:
                differences += [] if np.array_equal(now[name], before[name]) else [f"{old.name}: {name} differs"]
            elif not np.allclose(now[name], before[name], rtol=RTOL, atol=ATOL):
                differences.append(f"{old.name}: {name} differs by up to {np.abs(now[name] - before[name]).max():.3g}")
        print(f"{old.name}: {same} of {len(before.files)} arrays are the same, bit for bit; {len(differences)} differences", flush=True)
    return differences


if __name__ == "__main__":
    main()
