"""Pairs against the truth: signals and gradients at fixed policies, and learning, for all processes and seeds at once.

Every pair gets the same number of environment steps: how many calls a group costs on average, extra rollouts included, is
computed exactly for the policy of the moment, and the number of groups follows from it, drawn by chance where it is no whole number.
Whatever is drawn with the same seed is the same for every pair that samples in the same way.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lightningrl.lab.evidence import FROM_MEMORY, Memory, no_memory, remember
from lightningrl.lab.pairs import Pair
from lightningrl.lab.process import ACTIONS, STATES, TURNS, Process
from lightningrl.lab.sampling import Kind, Plan, steps_per_group
from lightningrl.lab.truth import expected_return, optimal_values, policy_gradient, policy_values
from lightningrl.lab.update import (
    Batch,
    call_advantages,
    descend,
    edge_advantages,
    gradient,
    loss_part,
    make_batch,
    make_evidence,
)
from lightningrl.recipe import describe
from lightningrl.table import Array, Evidence

MEASURE, LEARN = 0, 1  # what keys are for …
BATCH, EARLIER, EVIDENCE, UPDATE = 0, 1, 2, 3  # … and in each batch


@dataclasses.dataclass(frozen=True)
class Settings:
    seeds: int = 20
    batches: int = 24  # at a fixed policy
    iterations: int = 30  # of learning
    epochs: int = 2  # updates from one batch
    learning_rate: float = 0.1  # Adam's
    steps: int = 128  # environment steps of a batch
    group_size: int = 8
    restarts: int = 2  # rollouts from every state, of pairs that branch …
    restarted: int = 2  # … from so many rollouts of a task: they compare none with each other
    spread: float = 0.7  # standard deviation of the logits that a policy starts from
    decay: float = 0.5  # what a batch is worth to a critic one batch later
    seed: int = 0

    def __post_init__(self) -> None:
        longest = 2 * self.group_size * TURNS, self.restarted * (TURNS + self.restarts * TURNS * (TURNS + 1) // 2)
        if self.steps < max(longest):
            raise ValueError(f"{self.steps} steps a batch are not enough for a group of rollouts of {TURNS} calls: {max(longest)} are.")

    def plan(self, kind: Kind, greedy: bool = False) -> Plan:
        """Room for as many groups as the steps are enough for where every rollout ends after one call."""
        size, shortest = self.group_size, 1
        if kind == "branches":
            size, shortest = self.restarted, 1 + self.restarts
        return Plan(kind, self.steps // (size * shortest), size, self.restarts, greedy)


class Study:
    """Compiled functions, shared by pairs as far as they can be. Arrays have axes [processes, seeds] in front."""

    def __init__(self, processes: Process, settings: Settings) -> None:
        self.processes = jax.tree.map(jnp.asarray, processes)
        self.settings = settings
        self.count = self.processes.start.shape[0]
        self._compiled: dict[Hashable, Callable] = {}
        self._lock = threading.Lock()
        self.optimizer = optax.adam(settings.learning_rate)
        noise = jax.vmap(lambda key: jax.random.normal(key, (self.count, STATES, ACTIONS)))
        keys = jax.random.split(jax.random.key(settings.seed), settings.seeds)
        self.logits = jnp.swapaxes(settings.spread * noise(keys), 0, 1)  # [P, seeds, S, A]

    def measure(self, pair: Pair, tick: Callable[[], Any] = lambda: None) -> dict[str, np.ndarray]:
        """At the policies that learning starts from: f64[P, seeds] each.

        `correlation` of the credit of calls with the true advantage, over all calls of all batches; `cosine` of a batch's gradient with
        the true one g, on average; of the expected gradient E[ĝ]: `expected` |E[ĝ]|², and `left` min over c ≥ 0 of |E[ĝ] - c g|², both
        without the bias of a finite number of batches (and so at times a little below 0); `variance` E|ĝ - E[ĝ]|²; `steps` of a batch.
        """
        logits, plan = self.logits, self._plan(pair)
        cost = self.cost(logits, plan)
        memory = self.stack(no_memory())
        totals: dict[str, np.ndarray] = {}
        gradients, steps = [], []
        earlier: Array
        for number in range(self.settings.batches):
            keys = functools.partial(self.keys, MEASURE, number)
            groups, earlier = self.settings.steps / cost, np.zeros(())
            if _remembers(pair):  # half of the steps are for an earlier batch at the same policy
                groups = groups / 2
                past = self.batch(logits, logits, keys(EARLIER), groups, plan)
                memory, earlier = self.remember(self.stack(no_memory()), past, 0.0), past.steps
            batch = self.batch(logits, logits, keys(BATCH), groups, plan)
            edges, extra = self._advantages(pair, logits, logits, memory, batch, keys(EVIDENCE), plan)
            sums, estimate = self._gradient(pair)(self.processes, logits, batch, edges, keys(UPDATE))
            gradients.append(np.asarray(estimate, np.float64))
            steps.append(np.asarray(batch.steps + extra + earlier, np.float64))
            for name, x in sums.items():
                totals[name] = totals.get(name, 0.0) + np.asarray(x, np.float64)
            tick()
        truth = np.asarray(self._shared("policy_gradient", policy_gradient)(self.processes, logits), np.float64)
        return {"correlation": _correlation(totals), "steps": np.mean(steps, 0), **_against(np.stack(gradients), truth)}

    def learn(self, pair: Pair, tick: Callable[[], Any] = lambda: None) -> dict[str, np.ndarray]:
        """`returns` f64[P, seeds, iterations+1], exact, of the policy before each update and after the last; `steps` f64[P, seeds]."""
        logits, reference, plan = self.logits, self.logits, self._plan(pair)
        state = self.over_seeds("init", self.optimizer.init)(logits)
        memory = self.stack(no_memory())
        returns, steps = [self._return(logits)], np.zeros(logits.shape[:2])
        for iteration in range(self.settings.iterations):
            keys = functools.partial(self.keys, LEARN, iteration)
            groups = self.settings.steps / self.cost(logits, plan)
            batch = self.batch(logits, reference, keys(BATCH), groups, plan)
            edges, extra = self._advantages(pair, logits, reference, memory, batch, keys(EVIDENCE), plan)
            if _remembers(pair):
                memory = self.remember(memory, batch, self.settings.decay)
            logits, state = self._descend(pair)(self.processes, logits, state, batch, edges, keys(UPDATE))
            returns.append(self._return(logits))
            steps += np.asarray(batch.steps + extra, np.float64)
            tick()
        return {"returns": np.stack([np.asarray(x, np.float64) for x in returns], -1), "steps": steps}

    def best(self) -> np.ndarray:
        """f64[P]: what the best policy gets."""
        return np.asarray(jax.jit(jax.vmap(lambda p: expected_return(p, optimal_values(p))))(self.processes), np.float64)

    # What is compiled once and shared

    def _plan(self, pair: Pair) -> Plan:
        return self.settings.plan(pair.kind, "greedy_reward" in pair.needs)

    def cost(self, logits: Array, plan: Plan) -> Array:
        return self._shared(("cost", plan), lambda p, x: steps_per_group(p, x, plan))(self.processes, logits)

    def _return(self, logits: Array) -> Array:
        return self._shared("return", lambda p, x: expected_return(p, policy_values(p, x)))(self.processes, logits)

    def batch(self, logits: Array, reference: Array, key: Array, groups: Array, plan: Plan) -> Batch:
        make = self._shared(("batch", plan), lambda p, *x: make_batch(p, *x, plan=plan))
        return make(self.processes, logits, reference, key, groups)

    def remember(self, memory: Memory, batch: Batch, decay: float) -> Memory:
        shapes = batch.table.valid.shape
        update = self.over_seeds(("remember", shapes, decay), lambda m, b: remember(m, b.table, b.rollouts, decay))
        return update(memory, batch)

    def evidence(
        self, needs: tuple[str, ...], logits: Array, reference: Array, memory: Memory, batch: Batch, key: Array, plan: Plan
    ) -> tuple[Evidence, Array]:
        find = self._shared(("evidence", needs, plan), lambda p, *x: make_evidence(p, *x, needs=needs, plan=plan))
        return find(self.processes, logits, reference, memory, batch, key)

    def _advantages(
        self, pair: Pair, logits: Array, reference: Array, memory: Memory, batch: Batch, key: Array, plan: Plan
    ) -> tuple[Array, Array]:
        evidence, extra = self.evidence(pair.needs, logits, reference, memory, batch, key, plan)
        r = pair.recipe
        stages = tuple(describe(f) for f in (r.credit, r.advantage, r.spread))
        assign = self.over_seeds(("advantages", stages, plan), lambda *x: edge_advantages(r, *x))
        return assign(batch.table, batch.tokens, evidence), extra

    def _gradient(self, pair: Pair) -> Callable:
        recipe = loss_part(pair.recipe)

        def both(process, logits, batch, edges, key):
            return _moments(batch, call_advantages(edges)), gradient(recipe, logits, batch, edges, key)

        return self._shared(("gradient", recipe, pair.kind), both)

    def _descend(self, pair: Pair) -> Callable:
        recipe = loss_part(pair.recipe)
        step = functools.partial(descend, recipe, self.optimizer, self.settings.epochs)
        return self._shared(("descend", recipe, pair.kind), lambda process, *x: step(*x))

    def _shared(self, name: Hashable, function: Callable) -> Callable:
        """Compiled over [processes, seeds] of a function whose first argument is a process."""
        over_seeds = lambda process, *x: jax.vmap(functools.partial(function, process))(*x)  # noqa: E731
        return self._once(name, over_seeds)

    def over_seeds(self, name: Hashable, function: Callable) -> Callable:
        """The same of a function that needs no process."""
        return self._once(name, jax.vmap(function))

    def _once(self, name: Hashable, over_seeds: Callable) -> Callable:
        with self._lock:
            return self._compiled.setdefault(name, jax.jit(jax.vmap(over_seeds)))

    def keys(self, *numbers: int) -> Array:
        key = jax.random.key(self.settings.seed + 1)
        for number in numbers:
            key = jax.random.fold_in(key, number)
        return jax.random.split(key, (self.count, self.settings.seeds))

    def stack(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.count, self.settings.seeds, *x.shape)), tree)


def _remembers(pair: Pair) -> bool:
    return bool(set(pair.needs) & set(FROM_MEMORY))


def _moments(batch: Batch, credit: Array) -> dict[str, Array]:
    """Sums over the calls of a batch from which a correlation is made."""
    x, y = (jnp.where(batch.table.valid, z, 0.0) for z in (credit, batch.true_advantage))
    sums = {"n": batch.table.valid, "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
    return {name: jnp.sum(z.astype(jnp.float32)) for name, z in sums.items()}


def _correlation(sums: Mapping[str, np.ndarray]) -> np.ndarray:
    """Pearson's; 0 where the credit is constant: it says nothing."""
    n = sums["n"]
    cov, var_x, var_y = (sums[a + b] / n - sums[a] * sums[b] / n**2 for a, b in ("xy", "xx", "yy"))
    norm = np.sqrt(np.maximum(var_x * var_y, 0.0))
    return np.where(norm > 1e-12, cov / np.where(norm > 1e-12, norm, 1.0), 0.0)


def _against(estimates: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Estimates [B, P, seeds, S, A] of the truth [P, seeds, S, A]; what any learning rate could put right, their scale, drops out.

    What is `left` of E[ĝ] is min over c ≥ 0 of |E[ĝ] - c g|²: its part at right angles to g, or all of it where it points backwards.
    """
    flat, true = estimates.reshape(*estimates.shape[:3], -1), truth.reshape(*truth.shape[:2], -1)
    unit = true / np.linalg.norm(true, axis=-1, keepdims=True)
    along = (flat * unit).sum(-1)
    norms = np.linalg.norm(flat, axis=-1)
    cosine = np.where(norms > 0, along / np.where(norms > 0, norms, 1.0), 0.0).mean(0)
    mean = flat.mean(0)
    variance = flat.var(0, ddof=1)
    across = flat - along[..., None] * unit
    # A mean of B batches still holds 1/B of their variance, which would pass for bias.
    left = (across.mean(0) ** 2).sum(-1) - across.var(0, ddof=1).sum(-1) / len(flat)
    expected = (mean**2).sum(-1) - variance.sum(-1) / len(flat)
    left = np.where(along.mean(0) >= 0, left, expected)
    return {
        "cosine": cosine,
        "left": left,
        "expected": expected,
        "variance": variance.sum(-1),
    }
