"""The train step, shared by reinforcement learning and supervised training.

An update adds up gradients over micro-batches, each term already divided by the denominator of the *whole* batch, then
applies the optimizer once: how the batch is cut changes nothing but rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from lightningrl.losses.value import value_states
from lightningrl.model import decoder
from lightningrl.model.config import ModelConfig
from lightningrl.model.params import Params, shapes
from lightningrl.packing.rows import Rows
from lightningrl.recipe import Recipe
from lightningrl.segments import safe_divide
from lightningrl.sharding import batch_sharding, edges_sharding, local, optimizer_sharding, params_sharding, place, replicated
from lightningrl.table import Array, LossInputs, TokenTable, UnitCounts

Metrics = dict[str, tuple[jax.Array, jax.Array]]  # (sum, weight) pairs, which add up over micro-batches


@struct.dataclass
class TrainState:
    params: Params
    opt_state: Any
    step: jax.Array  # int32 [], updates done


@struct.dataclass
class EdgeBatch:
    """What a loss needs to know of edges before the forward pass. Every array [micro-batches, E], or [E] for one of them."""

    tokens: TokenTable
    counts: UnitCounts
    advantage: Array  # float32
    old_value: Array  # float32
    value_target: Array  # float32
    selected: Array | None = None  # bool, what `Recipe.select` says of the whole batch; None without one


@struct.dataclass
class Scores:
    """What the policy says of edges. Every array [E]."""

    logp: jax.Array  # float32, of the tempered distribution
    entropy: jax.Array  # float32
    value: jax.Array  # float32
    sum_pi2: jax.Array  # float32, Σₐ π(a)² of the tempered distribution


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    total_steps: int | None = None  # with it, cosine decay to a tenth; without, constant
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.95


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) behind a global-norm clip; matrices decay, norms and biases do not."""
    s = settings
    if s.total_steps is not None:
        rate = optax.warmup_cosine_decay_schedule(0.0, s.learning_rate, s.warmup_steps, s.total_steps, s.learning_rate / 10)
    else:
        rate = optax.linear_schedule(s.learning_rate / (s.warmup_steps + 1), s.learning_rate, s.warmup_steps)
    return optax.chain(
        optax.clip_by_global_norm(s.max_grad_norm),
        optax.adamw(rate, b1=s.b1, b2=s.b2, weight_decay=s.weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    )


def score_edges(params: Params, config: ModelConfig, rows: Rows, edges: TokenTable) -> Scores:
    """Log-prob, entropy and value of every edge, read at its node. Log-softmax in float32 of logits / τ."""
    hidden = decoder.forward(params, config, rows.tokens, rows.positions, rows.end)
    at_nodes = hidden.reshape(-1, hidden.shape[-1])[edges.node]  # [E, D]: logits of action tokens only
    logp = jax.nn.log_softmax(decoder.logits(params, config, at_nodes) / edges.temperature[:, None], axis=-1)
    p = jnp.exp(logp)
    return Scores(
        logp=jnp.take_along_axis(logp, edges.token[:, None], axis=-1)[:, 0],
        entropy=-jnp.sum(p * logp, axis=-1),
        value=decoder.values(params, at_nodes),
        sum_pi2=jnp.sum(p * p, axis=-1),
    )


def loss_inputs(scores: Scores, edges: EdgeBatch) -> LossInputs:
    """All that a loss may look at, of edges in any shape."""
    return LossInputs(
        tokens=edges.tokens,
        counts=edges.counts,
        advantage=edges.advantage,
        logp=scores.logp,
        entropy=scores.entropy,
        value=scores.value,
        old_value=edges.old_value,
        value_target=edges.value_target,
    )


class TrainStep:
    """Compiled functions for one model, recipe and optimizer over a mesh; state is passed in and out, and donated.

    `score` reads, `update` trains. Both compile once per row length. All that is drawn at random comes from `seed` and the step.
    With several processes all of them call both, with equal rows and edges; scores and metrics are each process' own copies.
    """

    def __init__(self, config: ModelConfig, recipe: Recipe, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int = 0) -> None:
        self.config, self.recipe, self.optimizer, self.mesh, self.seed = config, recipe, optimizer, mesh, seed
        self._rows_at, self._whole = batch_sharding(mesh), replicated(mesh)
        params_at, abstract = params_sharding(config, mesh), shapes(config)
        opt_state_at = optimizer_sharding(optimizer, abstract, params_at, self._whole)
        self._state_at = TrainState(params=params_at, opt_state=opt_state_at, step=self._whole)  # type: ignore[arg-type]  # shardings
        self._score = jax.jit(lambda params, rows, edges: score_edges(params, config, rows, edges), out_shardings=self._whole)
        self._denominators = jax.jit(self._denominators_of)
        self._select = jax.jit(self._selection_of)
        self._gradients_of = jax.grad(self._objective, has_aux=True)
        self._accumulate = jax.jit(
            lambda total, *batch: jax.tree.map(jnp.add, total, self._gradients_of(*batch)),
            out_shardings=(params_at, self._whole),
            donate_argnums=0,
        )
        self._zeros: Any = None  # makes what accumulation starts from
        self._apply = jax.jit(self._apply_gradients, out_shardings=(self._state_at, self._whole), donate_argnums=0)

    def init(self, params: Params) -> TrainState:
        """Fresh optimizer state around a copy of the parameters, sharded by the rules."""
        params = jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=self._state_at.params)(self.placed(params))
        opt_state = jax.jit(self.optimizer.init, out_shardings=self._state_at.opt_state)(params)
        return TrainState(params=params, opt_state=opt_state, step=place(np.zeros((), np.int32), self._whole))

    def placed(self, params: Params) -> Params:
        """Parameters, sharded by the rules; not copied where they lie so already."""
        return place(params, self._state_at.params)

    def score(self, params: Params, rows: Sequence[Rows], edges: TokenTable) -> Scores:
        """Scores of all edges, [micro-batches, E], without gradient."""
        params = self.placed(params)
        parts = [local(self._score(params, *self._micro_batch(i, r, edges))) for i, r in enumerate(rows)]
        return jax.tree.map(lambda *x: jnp.stack(x), *parts)

    def update(self, state: TrainState, rows: Sequence[Rows], edges: EdgeBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step on a batch. `state` is donated. Metrics are means over the masked edges of the whole batch."""
        if not rows:
            raise ValueError("an update needs at least one micro-batch")
        denominators = place(self._denominators(edges), self._whole)
        if self.recipe.select is not None:
            scores = self.score(state.params, rows, edges.tokens)
            edges = dataclasses.replace(edges, selected=self._select(local(state.step), scores, edges))
        total = None
        for i, r in enumerate(rows):
            batch = (state.params, *self._micro_batch(i, r, edges), denominators)
            total = self._accumulate(self._nothing(batch) if total is None else total, *batch)
        assert total is not None
        state, metrics = self._apply(state, *total)
        return state, local(metrics)

    def _micro_batch(self, i: int, rows: Rows, edges: Any) -> tuple[Rows, Any]:
        """The i-th micro-batch where its arrays belong."""
        edges = jax.tree.map(lambda x: x[i], edges)
        (count,) = jax.tree.leaves(edges)[0].shape
        return place(rows, self._rows_at), place(edges, edges_sharding(self.mesh, count))

    def _nothing(self, batch: Any) -> tuple[Params, Metrics]:
        if self._zeros is None:
            shapes = jax.eval_shape(self._gradients_of, *batch)
            # Placed as later totals are: zeros that lie elsewhere would have the step traced and compiled once more.
            at = (self._state_at.params, self._whole)
            self._zeros = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), out_shardings=at)
        return self._zeros()

    # ---- traced
    def _denominators_of(self, edges: EdgeBatch) -> dict[str, jax.Array]:
        """Of each aggregation, from masks alone: they do not depend on the policy."""
        tokens, zeros = edges.tokens, jnp.zeros(jnp.shape(edges.tokens.mask), jnp.float32)
        states = value_states(tokens, self.recipe.critic_states)
        return {
            "policy": self.recipe.aggregation(zeros, tokens.mask, edges.counts)[1],
            "value": self.recipe.value_aggregation(zeros, states, edges.counts)[1],
        }

    def _selection_of(self, step: jax.Array, scores: Scores, edges: EdgeBatch) -> Array:
        assert self.recipe.select is not None
        return self.recipe.select(loss_inputs(scores, edges), key=jax.random.fold_in(jax.random.key(self.seed), step))

    def _objective(self, params: Params, rows: Rows, edges: EdgeBatch, denominators: dict[str, jax.Array]) -> tuple[jax.Array, Metrics]:
        r, tokens, counts = self.recipe, edges.tokens, edges.counts
        scores = score_edges(params, self.config, rows, tokens)
        inputs = loss_inputs(scores, edges)
        loss, keep, metrics = r.loss(inputs) if r.select is None else r.loss(inputs, selected=edges.selected)
        pairs = {
            "loss": r.aggregation(jnp.where(keep, loss, 0.0), tokens.mask, counts),
            "entropy": r.aggregation(scores.entropy, tokens.mask, counts),
        }
        objective = safe_divide(pairs["loss"][0] - r.entropy_coef * pairs["entropy"][0], denominators["policy"])
        if r.kl is not None:
            pairs["kl"] = r.aggregation(r.kl(inputs), tokens.mask, counts)
            objective += r.kl_coef * safe_divide(pairs["kl"][0], denominators["policy"])
        if r.critic_target is not None:
            value_loss, states, value_metrics = r.value_loss(inputs, states=r.critic_states)
            pairs["value_loss"] = r.value_aggregation(value_loss, states, counts)
            objective += r.value_coef * safe_divide(pairs["value_loss"][0], denominators["value"])
            metrics = metrics | value_metrics
        return objective, metrics | pairs

    def _apply_gradients(self, state: TrainState, gradients: Params, pairs: Metrics) -> tuple[TrainState, dict[str, jax.Array]]:
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        metrics = {name: safe_divide(*pair) for name, pair in pairs.items()}
        metrics["grad_norm"] = optax.tree.norm(gradients)
        after = TrainState(params=optax.apply_updates(state.params, updates), opt_state=opt_state, step=state.step + 1)
        return after, metrics
