"""bench_train without torch: our own two ways on the recorded calls, and what it makes of a peer's answers."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))
import bench_train


class Peer:
    """Answers as scripts/peers/train_peer.py does."""

    peak_bytes = 1 << 20

    def __init__(self, python: pathlib.Path, way: str, hidden: int, batch: pathlib.Path) -> None:
        self.ready: dict[str, Any] = {"way": way, "setting": "rows of 4", "tried": {"4": 1.0}, "loss": 0.0, "gradient_norm": 1.0}

    def seconds(self) -> float:
        return 1e9

    def close(self) -> None:
        self.ready = {}


@pytest.mark.slow
def test_the_recorded_update_and_its_goals(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(bench_train, "SHAPES", {16: (1, 2, 1)})
    monkeypatch.setattr(bench_train, "REPEATS", 1)
    monkeypatch.setattr(bench_train, "Peer", Peer)
    rollouts = bench_train.recorded()
    assert len(rollouts) == 64 and len({r.group for r in rollouts}) == 8
    result = bench_train.measure(16, rollouts, tmp_path / "python", bench_train.peers_batch(rollouts, tmp_path))
    # Of so narrow a model the head, which nothing shares, is much of the work.
    assert result["reuse_ratio"] > 2 and result["trie"]["flops"] < 0.6 * result["rows"]["flops"]
    assert result["trl"]["setting"] == "rows of 4" and result["torch"]["peak_bytes_beyond_libraries"] == 1 << 20
    goals = bench_train.goals_of({128: result, 512: result, 1024: result}, peak=1e12)
    assert [goal["met"] for goal in goals[1:4]] == [True, True, True] and len(goals) == 5
