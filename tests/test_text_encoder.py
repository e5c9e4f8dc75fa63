"""Vectors of a tiny random encoder checkpoint that transformers writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from lightningrl.errors import UserError
from lightningrl.tasks.multi_hop_qa.passages import Passage
from lightningrl.tasks.multi_hop_qa.retrieval import Dense
from lightningrl.text_encoder import TextEncoder

TEXTS = ["the old mill", "a river", "", "mill river sea old the a " * 40, "sea"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"the old mill a river sea query :".split()]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64
    )
    BertModel(config).save_pretrained(folder)
    return folder


def states_of(folder: Path, text: str) -> np.ndarray:
    """The last layer's vectors of one text, alone, cut to 64 tokens."""
    ids = BertTokenizerFast.from_pretrained(folder)(text)["input_ids"]
    ids = [*ids[:63], ids[-1]] if len(ids) > 64 else ids
    with torch.inference_mode():
        return BertModel.from_pretrained(folder).eval()(torch.tensor([ids])).last_hidden_state[0].numpy()


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_are_the_models_own_whatever_the_batch(checkpoint: Path, pooling: Any, normalize: bool) -> None:
    vectors = TextEncoder(checkpoint, pooling=pooling, normalize=normalize, max_tokens=64, batch=2)(TEXTS)
    assert vectors.shape == (5, 16) and vectors.dtype == np.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        states = states_of(checkpoint, text).astype(np.float64)
        expected = states[0] if pooling == "first" else states.mean(0)
        expected = expected / np.linalg.norm(expected) if normalize else expected
        np.testing.assert_allclose(vector, expected, rtol=0, atol=2e-6)  # float32, padded or not


def test_a_prefix_is_put_before_every_text(checkpoint: Path) -> None:
    prefixed = TextEncoder(checkpoint, prefix="query : ", max_tokens=64)(["sea"])
    np.testing.assert_array_equal(prefixed, TextEncoder(checkpoint, max_tokens=64)(["query : sea"]))
    assert np.abs(prefixed - TextEncoder(checkpoint, max_tokens=64)(["sea"])).max() > 1e-3


def test_no_texts_no_vectors(checkpoint: Path) -> None:
    assert TextEncoder(checkpoint)([]).shape == (0, 16)


def test_a_passage_is_found_by_its_own_words(checkpoint: Path) -> None:
    passages = [Passage("a", "the", "old mill"), Passage("b", "sea", "sea"), Passage("c", "river", "a river")]
    retriever = Dense(passages, TextEncoder(checkpoint, pooling="mean", max_tokens=64))
    for i, passage in enumerate(passages):
        assert retriever.ranked(f"{passage.title}\n{passage.text}", 1) == [i]


def test_what_cannot_be_an_encoder_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        TextEncoder(tmp_path / "none")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such model"}))
    with pytest.raises(UserError, match="not an encoder checkpoint"):
        TextEncoder(tmp_path)
