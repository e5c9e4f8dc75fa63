"""Data that the tests of multi-hop question answering share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from lightningrl.tasks.multi_hop_qa.chains import generate_questions
from lightningrl.tasks.multi_hop_qa.questions import Question
from lightningrl.tasks.multi_hop_qa.retrieval import open_corpus
from lightningrl.tasks.multi_hop_qa.worlds import build_worlds


@pytest.fixture(scope="session")
def multihop_dir() -> Path:
    """MuSiQue, 2Wiki and HotpotQA, kept outside the project: $LIGHTNINGRL_DATA/multihop or ../shared/data/multihop."""
    root = Path(os.environ.get("LIGHTNINGRL_DATA") or Path(__file__).parents[4] / "shared" / "data")
    if not (root / "multihop" / "musique" / "corpus.jsonl").is_file():
        pytest.skip(f"multi-hop data is not at {root / 'multihop'}; set LIGHTNINGRL_DATA to the folder that has multihop/")
    return root / "multihop"


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    """36 questions, twelve about each of three worlds."""
    folder = tmp_path_factory.mktemp("worlds")
    return [
        question
        for i, (world, corpus) in enumerate(build_worlds(folder, seed=0, count=3))
        for question in generate_questions(world, corpus, open_corpus(corpus), np.random.default_rng(i), 12)
    ]
