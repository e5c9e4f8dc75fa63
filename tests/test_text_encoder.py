"""Vectors of a tiny random encoder checkpoint that transformers writes."""

from __future__ import annotations

import functools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from lightningrl.errors import UserError
from lightningrl.tasks.multi_hop_qa.passages import Passage, save_passages
from lightningrl.tasks.multi_hop_qa.retrieval import Dense, as_text, open_corpus, search_as_text
from lightningrl.text_encoder import DenseRetrieval, TextEncoder

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


def test_an_agents_searches_may_be_dense(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passages = [Passage("a", "the", "old mill"), Passage("b", "sea", "sea"), Passage("c", "river", "a river")]
    save_passages(tmp_path / "corpus.jsonl", passages)
    make = DenseRetrieval(str(checkpoint), "mean", query_prefix="query : ")
    search = pickle.loads(pickle.dumps(functools.partial(search_as_text, cache=str(tmp_path / "cache"), make=make)))  # to other processes
    encoders = {name: TextEncoder(checkpoint, pooling="mean", prefix=name) for name in ("", "query : ")}
    expected = Dense(passages, encoders[""], encode_query=encoders["query : "])
    for query in ("old mill", "sea", "a river"):
        assert search(str(tmp_path / "corpus.jsonl"), query, 3) == as_text([passages[i] for i in expected.ranked(query, 3)])
    assert open_corpus(tmp_path / "corpus.jsonl") is not open_corpus(tmp_path / "corpus.jsonl", make=make)
    # The vectors are found again where the checkpoint is the same.
    (kept,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr("lightningrl.tasks.multi_hop_qa.retrieval._keep", lambda *_: pytest.fail("encoded again"))
    np.testing.assert_array_equal(make(passages, tmp_path / "cache").vectors, np.load(kept / "vectors.npy"))


def test_what_cannot_be_an_encoder_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        TextEncoder(tmp_path / "none")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such model"}))
    with pytest.raises(UserError, match="not an encoder checkpoint"):
        TextEncoder(tmp_path)
