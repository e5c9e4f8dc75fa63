"""The smallest policy that a train step takes, recorded conversations of two roles, and a plain policy gradient on them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightningrl import losses
from lightningrl.model.config import ModelConfig
from lightningrl.model.params import shapes
from lightningrl.packing.rows import PackedBatch, Rows, RowSettings
from lightningrl.recipes import get_recipe
from lightningrl.table import TokenTable, UnitCounts
from lightningrl.tabulate import table_from_rollouts
from lightningrl.train import EdgeBatch, Scores
from lightningrl.types import Rollout
from tests.conversations import rollouts

CONFIG = ModelConfig(
    vocab_size=320,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=32,
    max_positions=64,
    qk_norm=True,
)
ROWS = RowSettings((32,), 128, 64)
REINFORCE = dataclasses.replace(
    get_recipe("lightningrl"),
    name="reinforce",
    loss=functools.partial(losses.negative_log_likelihood, weighted=True),
    aggregation=losses.token_mean,
)
ROLES = ("reader", "writer")


def params(seed: int = 0, config: ModelConfig = CONFIG, dtype: Any = np.float32) -> Any:
    """Of standard deviation 0.3, so that log-probs are far from uniform."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(dtype), shapes(config))


def recorded(seed: int = 3) -> list[Rollout]:
    """Calls of a conversation are answered by its roles in turn."""
    return [
        dataclasses.replace(r, transitions=tuple(dataclasses.replace(t, role=ROLES[t.turn % 2]) for t in r.transitions))
        for r in rollouts(seed)
    ]


def table(seed: int = 3) -> Any:
    return table_from_rollouts(recorded(seed), size=32)


def edges_of(batch: PackedBatch, advantage: np.ndarray) -> EdgeBatch:
    """Edges for `REINFORCE`, which reads nothing but the advantage, one a transition."""
    mask, zeros = np.asarray(batch.edges.mask), np.zeros(batch.edges.mask.shape, np.float32)
    return EdgeBatch(
        tokens=batch.edges,
        counts=UnitCounts(sequence_tokens=zeros, rollout_tokens=zeros, group_tokens=zeros),
        advantage=np.where(mask, advantage[batch.edges.transition], 0).astype(np.float32),
        old_value=zeros,
        value_target=zeros,
    )


def advantages(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=32).astype(np.float32)


def mean_so_far(params: Any, config: Any, rows: Rows, edges: TokenTable, **_: Any) -> Scores:
    """In place of `train.score_edges`, where no decoder is needed: quick to compile, and computed in the dtype of the parameters."""
    embedded = params["embedding"][rows.tokens]
    hidden = jnp.tanh(
        jnp.cumsum(embedded, axis=1) / (1 + rows.positions[..., None]) @ params["layers"][0]["down"].T[:, : CONFIG.hidden_size]
    )
    logp = jax.nn.log_softmax(hidden.reshape(-1, CONFIG.hidden_size)[edges.node] @ params["embedding"].T)
    picked = jnp.take_along_axis(logp, edges.token[:, None], axis=-1)[:, 0]
    nothing = jnp.zeros_like(picked)
    return Scores(logp=picked, entropy=nothing, value=nothing, sum_pi2=nothing)
