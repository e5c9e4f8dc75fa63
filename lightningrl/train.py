"""The train step, shared by reinforcement learning and supervised training.

An update adds up gradients over micro-batches, each term already divided by the denominator of the *whole* batch, then
applies the optimizer once: how the batch is cut changes nothing but rounding.

What is trained is kept in float32, all parameters or an adapter on them, and so are gradients, their sums and the optimizer's state.
What is computed with, the weights, is made from it within the step: the adapter merged, everything rounded to the compute dtype.
"""

from __future__ import annotations

import dataclasses
import functools
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
from lightningrl.model.attention import Implementation, TreeAttention
from lightningrl.model.config import ModelConfig
from lightningrl.model.decoder import Remat
from lightningrl.model.lora import Adapter, LoraSettings, adapter_shapes, adapter_sharding, merge
from lightningrl.model.params import Params, shapes
from lightningrl.model.token_scores import token_scores
from lightningrl.packing.rows import Rows
from lightningrl.recipe import Recipe
from lightningrl.segments import safe_divide
from lightningrl.sharding import (
    attention_over,
    batch_sharding,
    edges_sharding,
    local,
    optimizer_sharding,
    params_sharding,
    place,
    replicated,
)
from lightningrl.table import Array, LossInputs, TokenTable, UnitCounts

Metrics = dict[str, tuple[jax.Array, jax.Array]]  # (sum, weight) pairs, which add up over micro-batches


@struct.dataclass
class TrainState:
    params: Params  # where there is an adapter, its base, which no update changes
    opt_state: Any  # of what is trained: the adapter where there is one, else the parameters
    step: jax.Array  # int32 [], updates done
    adapter: Adapter | None = None
    reference: Params | Adapter | None = None  # the moving mean of what is trained; None where the reference is another


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


def score_edges(
    params: Params, config: ModelConfig, rows: Rows, edges: TokenTable, *, remat: Remat = "none", attention: TreeAttention | None = None
) -> Scores:
    """Log-prob, entropy and value of every edge, read at its node. Log-softmax in float32 of logits / τ."""
    hidden = decoder.forward(params, config, rows.tokens, rows.positions, rows.end, remat=remat, attention=attention)
    at_nodes = hidden.reshape(-1, hidden.shape[-1])[edges.node]  # [E, D]: logits of action tokens only
    logp, entropy, sum_pi2 = token_scores(params, config, at_nodes, edges.token, edges.temperature)
    return Scores(logp=logp, entropy=entropy, value=decoder.values(params, at_nodes), sum_pi2=sum_pi2)


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


def _padded(batch: Any) -> Any:
    """Arrays [micro-batches, …] with further micro-batches of zeros, which no mask lets in, up to a power of two: few shapes to compile."""

    def padded(x: Array) -> Array:
        more = (1 << (len(x) - 1).bit_length()) - len(x)
        pad = np.pad if isinstance(x, np.ndarray) else jnp.pad  # what is on a device stays there
        return pad(x, [(0, more)] + [(0, 0)] * (np.ndim(x) - 1))

    return jax.tree.map(padded, batch)


class TrainStep:
    """Compiled functions for one model, recipe and optimizer over a mesh; state is passed in and out, and donated.

    `score` reads, `update` trains. Both compile once for every shape of a micro-batch. All that is drawn at random comes from `seed`
    and the step.
    With several processes all of them call every method, with equal arguments; scores and metrics are each process' own copies.

    Args:
      lora: trains an adapter of these settings; None trains all parameters.
      compute_dtype: what weights and activations are rounded to, such as bfloat16; None computes in the dtype of the parameters.
        Log-softmax, losses, the statistics of norms and softmax, sums of gradients and the optimizer stay float32.
      ema_decay: d in [0, 1): after every update, reference ← d·reference + (1 - d)·trained, the anchor of the KL term in WARP
        (arXiv 2406.16768, its first stage); it starts as what is trained does. None keeps no such reference.
      remat: what gradients compute again instead of keeping it, see `decoder.forward`.
      attention: an implementation of `attend_tree`; None: the best for the length of the rows and the backend.
    """

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        seed: int = 0,
        *,
        lora: LoraSettings | None = None,
        compute_dtype: Any = None,
        ema_decay: float | None = None,
        remat: Remat = "none",
        attention: Implementation | None = None,
    ) -> None:
        self.config, self.recipe, self.optimizer, self.mesh, self.seed = config, recipe, optimizer, mesh, seed
        self.lora, self.compute_dtype, self.ema_decay = lora, compute_dtype, ema_decay
        self._score_edges = functools.partial(score_edges, remat=remat, attention=attention_over(mesh, config, attention))
        self._rows_at, self._whole = batch_sharding(mesh), replicated(mesh)
        self._params_at = params_sharding(config, mesh)
        self._trained_at = self._params_at if lora is None else adapter_sharding(self._params_at, config, lora)
        abstract = shapes(config) if lora is None else adapter_shapes(config, lora)
        self._state_at = TrainState(
            params=self._params_at if lora is None else {},  # a base is no output of an update
            opt_state=optimizer_sharding(optimizer, abstract, self._trained_at, self._whole),
            step=self._whole,  # type: ignore[arg-type]
            adapter=None if lora is None else self._trained_at,
            reference=None if ema_decay is None else self._trained_at,
        )
        self._weights = jax.jit(self._weights_of, out_shardings=self._params_at)
        self._score = jax.jit(lambda params, *batch: self._score_edges(self.rounded(params), config, *batch), out_shardings=self._whole)
        self._denominators = jax.jit(self._denominators_of)
        self._select = jax.jit(self._selection_of)
        self._gradients_of = jax.grad(self._objective, has_aux=True)
        self._accumulate = jax.jit(
            lambda total, *batch: jax.tree.map(jnp.add, total, self._gradients_of(*batch)),
            out_shardings=(self._trained_at, self._whole),
            donate_argnums=0,
        )
        self._zeros: Any = None  # makes what accumulation starts from
        self._start = jax.jit(optimizer.init, out_shardings=self._state_at.opt_state)
        self._apply = jax.jit(self._apply_gradients, out_shardings=(self._state_at, self._whole), donate_argnums=0)

    def init(self, params: Params, adapter: Adapter | None = None) -> TrainState:
        """Fresh optimizer state around a copy of what is trained, sharded by the rules. A base is not copied, as nothing consumes it."""
        if (adapter is None) != (self.lora is None):
            raise ValueError("an adapter is trained by a step that was given its settings, and by no other")
        copy = jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=self._trained_at)
        trained = copy(place(params if adapter is None else adapter, self._trained_at))
        return TrainState(
            params=trained if adapter is None else self.placed(params),
            opt_state=self._start(trained),
            step=place(np.zeros((), np.int32), self._whole),
            adapter=None if adapter is None else trained,
            reference=None if self.ema_decay is None else copy(trained),
        )

    def placed(self, params: Params) -> Params:
        """Parameters, sharded by the rules; not copied where they lie so already."""
        return place(params, self._params_at)

    def weights(self, state: TrainState) -> Params:
        """What the policy computes with: the adapter merged, in the compute dtype. Where that is nothing to do, the state's own arrays."""
        return self._weights(*self._trained(state))

    def reference(self, state: TrainState) -> Params:
        """The same of the moving mean. With an adapter it is the mean of the factors A and B, not of their products."""
        return self._weights(state.reference, self._trained(state)[1])

    def rounded(self, params: Params) -> Params:
        """Parameters in the compute dtype."""
        return params if self.compute_dtype is None else jax.tree.map(lambda x: x.astype(self.compute_dtype), params)

    def score(self, params: Params, rows: Sequence[Rows], edges: TokenTable) -> Scores:
        """Scores of all edges, [micro-batches, E], without gradient; of parameters in any dtype, computed in the compute dtype."""
        params = self.placed(params)
        parts = [local(self._score(params, *self._micro_batch(i, r, edges))) for i, r in enumerate(rows)]
        return jax.tree.map(lambda *x: jnp.stack(x), *parts)

    def update(self, state: TrainState, rows: Sequence[Rows], edges: EdgeBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step on a batch. `state` is donated. Metrics are means over the masked edges of the whole batch."""
        if not rows:
            raise ValueError("an update needs at least one micro-batch")
        denominators = place(self._denominators(_padded(edges.tokens), _padded(edges.counts)), self._whole)
        if self.recipe.select is not None:
            scores = self.score(self.weights(state), rows, edges.tokens)
            selected = self._select(local(state.step), _padded(scores), _padded(edges))
            edges = dataclasses.replace(edges, selected=selected[: len(rows)])
        total, (trained, base) = None, self._trained(state)
        for i, r in enumerate(rows):
            batch = (trained, base, *self._micro_batch(i, r, edges), denominators)
            total = self._accumulate(self._nothing(batch) if total is None else total, *batch)
        assert total is not None
        # A base is not consumed: others have it too.
        after, metrics = self._apply(state if base is None else dataclasses.replace(state, params={}), *total)
        return after if base is None else dataclasses.replace(after, params=base), local(metrics)

    @property
    def compiled(self) -> int:
        """Programs of the step compiled so far: to score and to add up gradients one each for every shape of a micro-batch, to see the
        whole batch one for every power of two of micro-batches, to apply the optimizer one."""
        functions = (self._score, self._accumulate, self._denominators, self._select, self._apply)
        return sum(function._cache_size() for function in functions)  # type: ignore[attr-defined]

    def memory(self, state: TrainState, rows: Rows, edges: EdgeBatch) -> Any:
        """XLA's memory analysis of adding up the gradients of one micro-batch; `edges` are [micro-batches, E]."""
        batch = (*self._trained(state), *self._micro_batch(0, rows, edges), self._denominators(edges.tokens, edges.counts))
        return self._accumulate.lower(self._nothing(batch), *batch).compile().memory_analysis()

    def _micro_batch(self, i: int, rows: Rows, edges: Any) -> tuple[Rows, Any]:
        """The i-th micro-batch where its arrays belong."""
        edges = jax.tree.map(lambda x: x[i], edges)
        (count,) = jax.tree.leaves(edges)[0].shape
        return place(rows, self._rows_at), place(edges, edges_sharding(self.mesh, count))

    def _nothing(self, batch: Any) -> tuple[Params, Metrics]:
        if self._zeros is None:
            shapes = jax.eval_shape(self._gradients_of, *batch)
            # Placed as later totals are: zeros that lie elsewhere would have the step traced and compiled once more.
            at = (self._trained_at, self._whole)
            self._zeros = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), out_shardings=at)
        return self._zeros()

    def _trained(self, state: TrainState) -> tuple[Params | Adapter, Params | None]:
        """What gradients are of, and the base that it lies on, if it lies on one."""
        return (state.params, None) if state.adapter is None else (state.adapter, state.params)

    # ---- traced
    def _weights_of(self, trained: Params | Adapter, base: Params | None) -> Params:
        return self.rounded(trained if self.lora is None or base is None else merge(base, trained, self.lora.scale))

    def _denominators_of(self, tokens: TokenTable, counts: UnitCounts) -> dict[str, jax.Array]:
        """Of each aggregation, from masks alone: they do not depend on the policy."""
        zeros = jnp.zeros(jnp.shape(tokens.mask), jnp.float32)
        states = value_states(tokens, self.recipe.critic_states)
        return {
            "policy": self.recipe.aggregation(zeros, tokens.mask, counts)[1],
            "value": self.recipe.value_aggregation(zeros, states, counts)[1],
        }

    def _selection_of(self, step: jax.Array, scores: Scores, edges: EdgeBatch) -> Array:
        assert self.recipe.select is not None
        return self.recipe.select(loss_inputs(scores, edges), key=jax.random.fold_in(jax.random.key(self.seed), step))

    def _objective(
        self, trained: Params | Adapter, base: Params | None, rows: Rows, edges: EdgeBatch, denominators: dict[str, jax.Array]
    ) -> tuple[jax.Array, Metrics]:
        r, tokens, counts = self.recipe, edges.tokens, edges.counts
        scores = self._score_edges(self._weights_of(trained, base), self.config, rows, tokens)
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
        trained = self._trained(state)[0]
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, trained)
        metrics = {name: safe_divide(*pair) for name, pair in pairs.items()}
        metrics["grad_norm"] = optax.tree.norm(gradients)
        trained = optax.apply_updates(trained, updates)
        reference = None if self.ema_decay is None else optax.incremental_update(trained, state.reference, 1 - self.ema_decay)
        params, adapter = (trained, None) if self.lora is None else (state.params, trained)
        return TrainState(params=params, opt_state=opt_state, step=state.step + 1, adapter=adapter, reference=reference), metrics
