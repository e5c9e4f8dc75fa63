"""What scripts/bench_gpu.py measures: decoders, their batches of longer calls, and how an update of one is made to fit a card."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from bench_train import ROWS, VOCAB  # noqa: E402

from lightningrl.model.config import ModelConfig  # noqa: E402
from lightningrl.model.decoder import Remat  # noqa: E402
from lightningrl.model.lora import LoraSettings  # noqa: E402
from lightningrl.model.params import count_params  # noqa: E402
from lightningrl.packing.rows import RowSettings  # noqa: E402
from lightningrl.scaling import MODELS, Mesh, Workload, passing_bytes, update_bytes  # noqa: E402
from lightningrl.types import Rollout, Transition  # noqa: E402

ONE = Mesh(1, 1, 1)
SLOTS = (1, 8, 64)  # decoded together
SHARE = 0.9  # of the memory that an update may take by the formulas


@dataclasses.dataclass(frozen=True)
class Work:
    """What is measured of a size."""

    model: ModelConfig
    times: int = 16  # tokens that every recorded one becomes
    rows: RowSettings = RowSettings((4096,), 8192, 5120)
    context: int = 2048  # tokens in the cache of each slot
    steps: int = 32  # tokens that each decodes in a turn


SIZES = {
    "tiny": Work(ModelConfig(VOCAB, 64, 1, 4, 2, 16, 128, 4096), times=1, rows=ROWS, context=64, steps=8),
    "1b": Work(MODELS["1B"]),
    "3b": Work(MODELS["3B"]),
}


def lengthened(rollouts: Sequence[Rollout], times: int) -> list[Rollout]:
    """Every token becomes `times` others, the same ones wherever it stands: what calls share is as much longer as they are."""

    def longer(ids: np.ndarray) -> np.ndarray:
        return (ids[:, None] * times + np.arange(times)).reshape(-1).astype(np.int32)

    def call(t: Transition) -> Transition:
        prompt, response = longer(t.prompt_ids), longer(t.response_ids)
        return dataclasses.replace(t, prompt_ids=prompt, response_ids=response, logprobs=np.repeat(t.logprobs, times))

    return [dataclasses.replace(r, transitions=tuple(map(call, r.transitions))) for r in rollouts]


@dataclasses.dataclass(frozen=True)
class Way:
    """How an update is made to fit."""

    lora: LoraSettings | None
    remat: Remat
    bytes: float  # that it takes by the formulas

    @property
    def trained(self) -> str:
        return "all parameters" if self.lora is None else f"an adapter of rank {self.lora.rank}"


def way_to_train(work: Work, memory: float) -> Way:
    """All parameters without remat, all of them with it, or an adapter: the first that fits the memory; the last if none does.

    To what `scaling.update_bytes` counts, the weights rounded to bf16 are added. Of an adapter, the float32 base takes 4 bytes a parameter
    and what is trained next to nothing. Every token is taken for an action.
    """
    row = work.rows.lengths[-1]
    again = Workload(tokens=1, edges=1, row=row, rows=work.rows.rows(row, 1))
    kept = dataclasses.replace(again, remat=False)
    p = count_params(work.model)
    rounded = again.compute_bytes * p
    ways = [
        Way(None, "none", rounded + update_bytes(work.model, ONE, kept)),
        Way(None, "layers", rounded + update_bytes(work.model, ONE, again)),
        Way(LoraSettings(rank=16), "layers", rounded + 4 * p + passing_bytes(work.model, ONE, again)),
    ]
    return next((way for way in ways if way.bytes <= SHARE * memory), ways[-1])
