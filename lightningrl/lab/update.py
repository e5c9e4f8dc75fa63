"""From a batch to an update of the table of logits: a recipe's advantages, its objective, its gradient."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import struct

from lightningrl.lab.evidence import PRODUCERS, Memory, Sampled
from lightningrl.lab.exact import EXACT
from lightningrl.lab.process import RESPONSE, TURNS, Process
from lightningrl.lab.records import make_table, make_tokens
from lightningrl.lab.sampling import Plan, Rollouts, sample
from lightningrl.lab.truth import policy_values
from lightningrl.losses import count_units
from lightningrl.recipe import Recipe
from lightningrl.recipes import RECIPES
from lightningrl.segments import safe_divide
from lightningrl.table import Array, Evidence, LossInputs, TokenTable, TransitionTable, UnitCounts


@struct.dataclass
class Batch:
    """Sampled rollouts in all their forms, with what is true of them."""

    rollouts: Rollouts
    table: TransitionTable
    tokens: TokenTable
    counts: UnitCounts
    true_advantage: Array  # float32 [N]
    steps: Array  # float32 [], calls of these rollouts


def make_batch(process: Process, logits: Array, reference: Array, key: Array, groups: Array, *, plan: Plan) -> Batch:
    rollouts = sample(process, logits, key, plan, groups)
    table = make_table(process, rollouts, plan.group_size)
    tokens = make_tokens(process, rollouts, logits, reference)
    advantage = policy_values(process, logits).advantage[jnp.arange(TURNS), rollouts.state, rollouts.action]
    return Batch(
        rollouts=rollouts,
        table=table,
        tokens=tokens,
        counts=count_units(table, tokens),
        true_advantage=jnp.where(table.valid, jnp.ravel(advantage), 0.0),
        steps=jnp.sum(table.valid).astype(jnp.float32),
    )


def make_evidence(
    process: Process, logits: Array, reference: Array, memory: Memory, batch: Batch, key: Array, *, needs: tuple[str, ...], plan: Plan
) -> tuple[Evidence, Array]:
    """What the producers of these names say of a batch, and how many steps of the environment that took.

    The key must not be the one that the batch was sampled with: extra rollouts would repeat its chances.
    """
    sampled = Sampled(
        process=process, logits=logits, reference=reference, memory=memory, rollouts=batch.rollouts, table=batch.table, key=key
    )
    fields: dict[str, Array] = {}
    steps = jnp.zeros(())
    for need in needs:
        made, cost = (PRODUCERS | EXACT)[need](sampled, plan)
        fields |= made
        steps += cost
    return Evidence(**fields), steps


def edge_advantages(recipe: Recipe, table: TransitionTable, tokens: TokenTable, evidence: Evidence) -> Array:
    """f32[E]: credit, advantage and spread."""
    advantage = recipe.advantage(table, recipe.credit(table, evidence), evidence)
    return recipe.spread(table, tokens, advantage, evidence)


def call_advantages(edges: Array) -> Array:
    """f32[N]: that of each call's first token, the one with which the action is chosen."""
    return edges.reshape(-1, RESPONSE)[:, 0]


def objective(recipe: Recipe, logits: Array, batch: Batch, advantage: Array, key: Array) -> jax.Array:
    """What the recipe minimises, critic aside: policy loss, KL and entropy, each with its aggregation."""
    inputs = loss_inputs(logits, batch, advantage)
    selected = {} if recipe.select is None else {"selected": recipe.select(jax.lax.stop_gradient(inputs), key=key)}
    loss, keep, _ = recipe.loss(inputs, **selected)
    total, denominator = recipe.aggregation(jnp.where(keep, loss, 0.0), batch.tokens.mask, batch.counts)
    if recipe.kl is not None:
        total += recipe.kl_coef * recipe.aggregation(recipe.kl(inputs), batch.tokens.mask, batch.counts)[0]
    if recipe.entropy_coef:
        total -= recipe.entropy_coef * recipe.aggregation(inputs.entropy, batch.tokens.mask, batch.counts)[0]
    return safe_divide(total, denominator)


def loss_inputs(logits: Array, batch: Batch, advantage: Array) -> LossInputs:
    """A table has a choice at each response's first token only; the others have probability 1."""
    logs = jax.nn.log_softmax(logits)
    state, action = jnp.ravel(batch.rollouts.state), jnp.ravel(batch.rollouts.action)
    entropy = -jnp.sum(jnp.exp(logs) * logs, -1)[state]
    chosen = (jnp.arange(RESPONSE) == 0) & batch.table.valid[:, None]
    logp, entropy = (jnp.ravel(jnp.where(chosen, x[:, None], 0.0)) for x in (logs[state, action], entropy))
    zeros = jnp.zeros_like(logp)
    return LossInputs(
        tokens=batch.tokens,
        counts=batch.counts,
        advantage=advantage,
        logp=logp,
        entropy=entropy,
        value=zeros,
        old_value=zeros,
        value_target=zeros,
    )


def gradient(recipe: Recipe, logits: Array, batch: Batch, advantage: Array, key: Array) -> jax.Array:
    """The estimate of ∇J that the recipe makes, f32[S, A]: minus the gradient of its objective."""
    return -jax.grad(lambda x: objective(recipe, x, batch, advantage, key))(logits)


def descend(
    recipe: Recipe,
    optimizer: optax.GradientTransformation,
    epochs: int,
    logits: Array,
    state: optax.OptState,
    batch: Batch,
    advantage: Array,
    key: Array,
) -> tuple[Array, optax.OptState]:
    """Logits and optimizer state after so many steps on one batch; the first is on policy, where no ratio is clipped."""

    def step(carry, step_key):
        logits, state = carry
        updates, state = optimizer.update(-gradient(recipe, logits, batch, advantage, step_key), state, logits)
        return (optax.apply_updates(logits, updates), state), None

    return jax.lax.scan(step, (logits, state), jax.random.split(key, epochs))[0]


def loss_part(recipe: Recipe) -> Recipe:
    """The recipe with all that `gradient` does not look at set to one thing: recipes that share it share what is compiled."""
    return dataclasses.replace(
        RECIPES["lightningrl"],
        loss=recipe.loss,
        aggregation=recipe.aggregation,
        select=recipe.select,
        kl=recipe.kl,
        kl_coef=recipe.kl_coef,
        entropy_coef=recipe.entropy_coef,
    )
