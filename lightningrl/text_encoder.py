"""Vectors of texts from a local encoder checkpoint of `transformers`, for dense retrieval."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightningrl.errors import UserError
from lightningrl.tasks.multi_hop_qa.passages import Passage
from lightningrl.tasks.multi_hop_qa.retrieval import Dense

Pooling = Literal["first", "mean"]


class TextEncoder:
    """texts -> float32 [N, d], with any encoder checkpoint that `transformers` loads (BGE, E5, Contriever, …).

    Args:
        folder: the checkpoint, a local directory; nothing is downloaded.
        pooling: of the last layer's vectors: the first token's ("first", as BGE), or the mean over a text's tokens ("mean", as E5).
        normalize: to unit length, so that inner products are cosines.
        prefix: what the checkpoint wants before every text, such as E5's "query: ".
        max_tokens: longer texts are cut.

    Raises `UserError` where the folder is missing or holds no such checkpoint, and without torch.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        pooling: Pooling = "first",
        normalize: bool = True,
        prefix: str = "",
        max_tokens: int = 512,
        batch: int = 32,
    ) -> None:
        _check_folder(folder)
        try:
            import torch
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise UserError("an encoder checkpoint runs in torch, which is not installed: pip install torch") from error
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model: Any = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder}: this is not an encoder checkpoint that transformers can load ({error})") from error
        self._torch = torch
        self.pooling, self.normalize, self.prefix, self.max_tokens, self.batch = pooling, normalize, prefix, max_tokens, batch

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [N, d]; a text's vector does not depend on the others but for rounding."""
        parts = [self._encode([self.prefix + text for text in texts[i : i + self.batch]]) for i in range(0, len(texts), self.batch)]
        return np.concatenate(parts) if parts else np.zeros((0, self._model.config.hidden_size), np.float32)

    def _encode(self, texts: list[str]) -> np.ndarray:
        given = self._tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        with self._torch.inference_mode():
            states = self._model(**given).last_hidden_state
        if self.pooling == "first":
            vectors = states[:, 0]
        else:
            mask = given["attention_mask"][:, :, None].to(states.dtype)
            vectors = (states * mask).sum(1) / mask.sum(1)
        if self.normalize:
            vectors = self._torch.nn.functional.normalize(vectors, dim=-1)
        return vectors.numpy()


@dataclasses.dataclass(frozen=True)
class DenseRetrieval:
    """For `retrieval.open_corpus`: dense retrieval with an encoder checkpoint, which a process loads once for all corpora.

    Vectors are kept under a hash of the passages, of these settings and of the checkpoint's files by size and time.

    Raises `UserError` where the folder is missing.
    """

    folder: str  # the checkpoint, a local directory
    pooling: Pooling = "first"
    query_prefix: str = ""  # what the checkpoint wants before a query, such as E5's "query: "
    passage_prefix: str = ""

    def __post_init__(self) -> None:
        _check_folder(self.folder)  # now, since agents load it only when they search

    def __call__(self, passages: Sequence[Passage], cache: Path | None) -> Dense:
        encode, encode_query = (_encoder(self.folder, self.pooling, prefix) for prefix in (self.passage_prefix, self.query_prefix))
        files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in Path(self.folder).iterdir())
        name = repr([str(Path(self.folder).resolve()), files, self.pooling, self.passage_prefix])
        return Dense(passages, encode, encode_query=encode_query, cache=cache, name=name)


def _check_folder(folder: str | Path) -> None:
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: there is no such folder; give a local encoder checkpoint")


@functools.lru_cache(maxsize=2)  # of queries and of passages
def _encoder(folder: str, pooling: Pooling, prefix: str) -> TextEncoder:
    return TextEncoder(folder, pooling=pooling, prefix=prefix)
