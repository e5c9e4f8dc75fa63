"""Writes the tables of docs/scaling.md from `lightningrl.scaling`; the prose around them stays.

python scripts/make_scaling.py            # writes the tables
python scripts/make_scaling.py --check    # fails if they are not what the formulas say
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from lightningrl.scaling import (
    H200,
    MODELS,
    V5P,
    Chip,
    Workload,
    best_mesh,
    compute_seconds,
    decode_seconds,
    gradient_bytes,
    link_seconds,
    passing_bytes,
    sampler_bytes,
    state_bytes,
    total_bytes,
)

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- tables: python scripts/make_scaling.py -->", "<!-- end of tables -->"
DEVICES = (1, 2, 4, 8, 16, 32, 64)
COLUMNS = (
    "devices",
    "data × fsdp × tensor",
    "state",
    "gradients",
    "micro-batch",
    "sampler",
    "together, GB",
    "computing",
    "links",
    "together, s",
    "decoding, ms",
)


def tables() -> str:
    parts = []
    for chip in (H200, V5P):
        for name in MODELS:
            parts += [f"### {name} on {chip.name}", table(name, chip)]
    return "\n\n".join(parts)


def table(name: str, chip: Chip) -> str:
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(row(name, chip, devices) for devices in DEVICES)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def row(name: str, chip: Chip, devices: int) -> Sequence[str]:
    model, work = MODELS[name], Workload()
    mesh = best_mesh(devices, model, work, chip)
    if mesh is None:
        return [str(devices), "does not fit", *[""] * (len(COLUMNS) - 2)]
    held = (state_bytes(model, mesh), gradient_bytes(model, mesh), passing_bytes(model, mesh, work), sampler_bytes(model, mesh, work))
    gigabytes = [f"{value / 1e9:.1f}" for value in (*held, total_bytes(model, mesh, work))]
    computing, links = compute_seconds(model, mesh, work, chip), link_seconds(model, mesh, work, chip)
    seconds = [f"{value:.2f}" for value in (computing, links, computing + links)]
    decoding = f"{1000 * decode_seconds(model, mesh, work, chip):.1f}"
    return [str(devices), f"{mesh.data} × {mesh.fsdp} × {mesh.tensor}", *gigabytes, *seconds, decoding]


def with_tables(text: str) -> str:
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the tables are stale")
    parser.add_argument("--page", type=pathlib.Path, default=PAGE, help="where they are")
    given = parser.parse_args(arguments)
    text = given.page.read_text(encoding="utf-8")
    if with_tables(text) == text:
        return 0
    if given.check:
        print(f"the tables of {given.page} are not what the formulas say: run python scripts/make_scaling.py", file=sys.stderr)
        return 1
    given.page.write_text(with_tables(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
