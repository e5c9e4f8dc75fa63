"""Writes the tables of docs/scaling.md from `lightningrl.scaling`; the prose around them stays.

python scripts/make_scaling.py            # writes the tables
python scripts/make_scaling.py --check    # fails if they are not what the formulas say
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from lightningrl.model.config import ModelConfig
from lightningrl.scaling import (
    H200,
    MODELS,
    QWEN_1_5B,
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
    start_bytes,
    state_bytes,
    total_bytes,
)

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- tables: python scripts/make_scaling.py -->", "<!-- end of tables -->"
DEVICES = (1, 2, 4, 8, 16, 32, 64)
COLUMNS = (
    "devices",
    "data × fsdp × tensor",
    "start",
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


# experiments/configs/paper_*.py, at the most that their limits allow: every rollout one conversation of the whole context, that ends in the
# longest answer
PAPER = {
    "text-to-SQL, word problems": Workload(tokens=128 * 6144, edges=128 * 2048, row=6144, slots=128, context=6144),
    "question answering": Workload(tokens=64 * 10_240, edges=64 * 2048, row=10_240, slots=64, context=10_240),
}
PAPER_MODELS = {"Llama 3.2 3B": MODELS["3B"], "Qwen2.5 1.5B": QWEN_1_5B}
PAPER_DEVICES = (1, 2, 4, 8)


def tables() -> str:
    parts = []
    for chip in (H200, V5P):
        for name, model in MODELS.items():
            parts += [f"### {name} on {chip.name}", table(model, Workload(), chip, DEVICES)]
    for name, work in PAPER.items():
        for of, model in PAPER_MODELS.items():
            parts += [f"### The paper's {name}: {of} on {H200.name}", table(model, work, H200, PAPER_DEVICES)]
    return "\n\n".join(parts)


def table(model: ModelConfig, work: Workload, chip: Chip, devices: Sequence[int]) -> str:
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(row(model, work, chip, number) for number in devices)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def row(model: ModelConfig, work: Workload, chip: Chip, devices: int) -> Sequence[str]:
    mesh = best_mesh(devices, model, work, chip)
    if mesh is None:
        return [str(devices), "does not fit", *[""] * (len(COLUMNS) - 2)]
    of_model = (part(model, mesh) for part in (start_bytes, state_bytes, gradient_bytes))
    of_work = (part(model, mesh, work) for part in (passing_bytes, sampler_bytes, total_bytes))
    gigabytes = [f"{value / 1e9:.1f}" for value in (*of_model, *of_work)]
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
