"""bench_growth on little: its exponents, its rollouts, and what it writes."""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))
import bench_growth


def test_exponents_are_those_of_power_laws() -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    assert bench_growth.exponent(x, [3 * v**1.5 for v in x]) == pytest.approx(1.5)
    assert bench_growth.exponent(x, [7.0] * 4) == pytest.approx(0.0, abs=1e-12)


def test_rollouts_repeat_what_was_said_and_groups_share_their_prompt() -> None:
    rollouts = bench_growth.rollouts_of(bench_growth.Size(tasks=2, turns=3, group=4))
    assert len(rollouts) == 8 and {len(r.transitions) for r in rollouts} == {3}
    for r in rollouts:
        first, second = r.transitions[:2]
        assert (second.prompt_ids[: len(first.prompt_ids)] == first.prompt_ids).all()
        assert (first.prompt_ids == [q for q in rollouts if q.group == r.group][0].transitions[0].prompt_ids).all()
    batch = bench_growth.packed(rollouts)
    calls = bench_growth.PROMPT + 3 * bench_growth.RESPONSE + 2 * bench_growth.RESULT
    assert batch.computed_tokens <= 8 * calls and batch.reuse_ratio > 2


@pytest.mark.slow
def test_it_writes_what_it_measured(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_growth, "AXES", {"tasks": (1, 2), "turns": (1, 2), "group": (1, 2)})
    monkeypatch.setattr(bench_growth, "REPEATS", {"pack": 1, "update": 1})
    monkeypatch.setattr(sys, "argv", ["bench_growth.py", "--json", str(tmp_path / "out.json")])
    bench_growth.main()
    said = json.loads((tmp_path / "out.json").read_text())
    assert set(said["exponents"]) == {"tasks", "turns", "group"} and len(said["goals"]) == 3
    tokens = [row["useful_tokens"] for row in said["results"]["tasks"]]
    assert np.isclose(tokens[1], 2 * tokens[0]) and said["compiled"] >= 1
