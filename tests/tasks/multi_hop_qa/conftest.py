"""Data that the tests of multi-hop question answering share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightningrl.tasks.multi_hop_qa.chains import generate_questions
from lightningrl.tasks.multi_hop_qa.questions import Question
from lightningrl.tasks.multi_hop_qa.retrieval import open_corpus
from lightningrl.tasks.multi_hop_qa.worlds import build_worlds
from tests.tasks.conftest import data_folder


@pytest.fixture(scope="session")
def multihop_dir() -> Path:
    """MuSiQue, 2Wiki and HotpotQA."""
    return data_folder("multihop", "musique/corpus.jsonl")


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    """36 questions, twelve about each of three worlds."""
    folder = tmp_path_factory.mktemp("worlds")
    return [
        question
        for i, (world, corpus) in enumerate(build_worlds(folder, seed=0, count=3))
        for question in generate_questions(world, corpus, open_corpus(corpus), np.random.default_rng(i), 12)
    ]
