"""How long credit, advantage and loss take, from 1k to 1M transitions, and how that compares with other libraries.

    python scripts/bench_credit.py --json bench.json --verl_python VERL/bin/python --rlax_python RLAX/bin/python

Everything compared is timed in this one run, on the same numbers, and its results are compared as well. Each library runs in its own
Python (verl needs torch), one after the other. Compilation is not counted: a training run compiles a shape once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightningrl import advantages, credit, losses
from lightningrl.recipe import Recipe
from lightningrl.recipes import RECIPES, get_recipe
from lightningrl.segments import reverse_affine_scan
from lightningrl.table import Array, Evidence, LossInputs, TokenTable, TransitionTable

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from bench_credit_inputs import CALLS, Batch, make_batch, make_evidence, ragged, rows  # noqa: E402
from bench_credit_others import GAMMA, LAMBDA, fastest  # noqa: E402

WORKER = pathlib.Path(__file__).with_name("bench_credit_others.py")
SIZES = (1_000, 10_000, 100_000, 1_000_000)
COMPARED_AT = 100_000
LONG = 64  # tokens of a response where functions of tokens are measured on their own
BYTES_PER_EDGE = 200  # what a function of tokens needs at most, seen
GROWTH, GROUPED, PER_TOKEN = 12.0, 10.0, 20.0  # the goals

Stage = Callable[[TransitionTable, TokenTable, Evidence], Array]


def objective(recipe: Recipe, table: TransitionTable, tokens: TokenTable, evidence: Evidence) -> tuple[Array, Array]:
    """Credit, advantage, spread, selection, loss and aggregation: the loss and its gradient in the log-probs."""
    advantage = recipe.advantage(table, recipe.credit(table, evidence), evidence)
    zero = jnp.zeros(tokens.mask.shape, jnp.float32)
    inputs = LossInputs(
        tokens=tokens,
        counts=losses.count_units(table, tokens),
        advantage=recipe.spread(table, tokens, advantage, evidence),
        logp=tokens.old_logp,
        entropy=zero,
        value=zero,
        old_value=zero,
        value_target=value_target(recipe, table, tokens, advantage, evidence),
    )
    selected = {} if recipe.select is None else {"selected": recipe.select(inputs, key=jax.random.key(0))}

    def loss_of(logp: Array) -> Array:
        now = dataclasses.replace(inputs, logp=logp)
        terms = [(1.0, recipe.loss(now, **selected), tokens.mask, recipe.aggregation)]
        if recipe.kl is not None:
            terms.append((recipe.kl_coef, (recipe.kl(now), tokens.mask, {}), tokens.mask, recipe.aggregation))
        if recipe.critic_target is not None:
            values = recipe.value_loss(now, states=recipe.critic_states)
            terms.append((recipe.value_coef, values, values[1], recipe.value_aggregation))
        sums = [(weight, *aggregate(jnp.where(keep, x, 0.0), mask, inputs.counts)) for weight, (x, keep, _), mask, aggregate in terms]
        return sum(weight * total / denominator for weight, total, denominator in sums)

    return jax.value_and_grad(loss_of)(tokens.old_logp)


def value_target(recipe: Recipe, table: TransitionTable, tokens: TokenTable, advantage: Array, evidence: Evidence) -> Array:
    if recipe.token_value_target is not None:
        return recipe.token_value_target(table, tokens, advantage, evidence)
    if recipe.value_target is not None:
        return recipe.value_target(table, evidence)[tokens.transition]
    return jnp.zeros(tokens.mask.shape, jnp.float32)


def seconds(function: Callable, *arguments: Any) -> float:
    jitted = jax.jit(function)
    jax.block_until_ready(jitted(*arguments))
    return fastest(lambda: jax.block_until_ready(jitted(*arguments)))


def bench_recipes(names: Sequence[str], sizes: Sequence[int], longest: int, seed: int) -> Iterator[dict[str, Any]]:
    for transitions in sizes:
        batch = ragged(transitions, longest, seed)
        for name in names:
            evidence = make_evidence(batch, get_recipe(name).needs, seed)
            taken = seconds(functools.partial(objective, get_recipe(name)), batch.table, batch.tokens, evidence)
            yield {"name": name, "transitions": transitions, "edges": batch.tokens.mask.shape[0], "seconds": taken}


def spread_of(function: Callable, **settings: Any) -> Stage:
    return lambda table, tokens, evidence: function(table, tokens, jnp.zeros(table.valid.shape, jnp.float32), evidence, **settings)


def from_group(advantage: Callable, spread: Callable = advantages.broadcast, **settings: Any) -> Stage:
    """Outcome, advantage and what every token gets, which is what verl returns."""

    def stage(table, tokens, evidence):
        earned = credit.identical(table, evidence)
        return spread(table, tokens, advantage(table, earned, evidence, **settings), evidence)

    return stage


def whitened_gae(table: TransitionTable, tokens: TokenTable, evidence: Evidence) -> Array:
    """verl's estimator whitens."""
    advantage = spread_of(advantages.token_gae, gamma=GAMMA, lambda_=LAMBDA)(table, tokens, evidence)
    return advantages.whiten_tokens(advantage, tokens.mask)


VERL_GRPO = advantages.preset("verl")
BASELINE_PP = functools.partial(advantages.reinforce_plus_plus_baseline, degenerate="formula")
OURS_FOR_VERL: dict[str, tuple[float | None, Stage]] = {  # by verl's name: how many times faster we want to be, and our function
    "grpo": (GROUPED, from_group(advantages.group_norm, **VERL_GRPO)),
    "grpo_vectorized": (None, from_group(advantages.group_norm, **VERL_GRPO)),
    "rloo": (GROUPED, from_group(advantages.leave_one_out)),
    "rloo_vectorized": (None, from_group(advantages.leave_one_out)),
    "opo": (GROUPED, from_group(advantages.opo)),
    "grpo_passk": (GROUPED, from_group(advantages.pass_at_k)),
    "reinforce_plus_plus_baseline": (GROUPED, from_group(advantages.group_norm, BASELINE_PP, scale="none")),
    "gpg": (GROUPED, from_group(advantages.gpg, informative="nonzero")),
    "gdpo": (GROUPED, from_group(advantages.gdpo, singleton="raw", degenerate="formula", batch_count="tokens", batch_eps=0.0)),
    "remax": (None, from_group(advantages.remax)),
    "gae": (PER_TOKEN, whitened_gae),
    "reinforce_plus_plus": (PER_TOKEN, spread_of(advantages.reinforce_plus_plus, gamma=GAMMA)),
    "optimal_token_baseline": (PER_TOKEN, spread_of(advantages.optimal_token_baseline, singleton="raw")),
    "tir_optimal_token_baseline": (PER_TOKEN, spread_of(advantages.multi_turn_optimal_token_baseline, singleton="raw")),
}
OURS_FOR_RLAX: dict[str, tuple[float | None, Stage]] = {
    "gae": (None, spread_of(advantages.token_gae, gamma=GAMMA, lambda_=LAMBDA)),
    "lambda_returns": (None, spread_of(advantages.token_lambda_return, gamma=GAMMA, lambda_=LAMBDA)),
    "v_trace": (None, spread_of(advantages.v_trace, gamma=GAMMA, lambda_=LAMBDA)),
}


def compare(
    library: str, python: str, ours: Mapping[str, tuple[float | None, Stage]], sizes: Sequence[int], longest: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Our functions and a library's on the same rows, one response a rollout: verl's unit. rlax knows no mask: all rows are full."""
    with tempfile.TemporaryDirectory() as folder:
        files = [(f"{folder}/{n}.npz", f"{folder}/{n}.out.npz") for n in sizes]
        ours_given = [rows(n, longest, library == "verl", seed, source) for n, (source, _) in zip(sizes, files, strict=True)]
        # Threads of torch that wait for each other by spinning take seconds for milliseconds where a core is shared.
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        subprocess.run([python, str(WORKER), library, *(name for pair in files for name in pair)], check=True, env=environment)
        for n, (_, target), (batch, evidence, mask) in zip(sizes, files, ours_given, strict=True):
            with np.load(target) as theirs:
                for name, (goal, stage) in ours.items():
                    yield {
                        "library": library,
                        "name": name,
                        "transitions": n,
                        "edges": batch.tokens.mask.shape[0],
                        "seconds": seconds(stage, batch.table, batch.tokens, evidence),
                        "their_seconds": float(theirs[f"seconds/{name}"]),
                        "goal": goal,
                        "largest_difference": largest_difference(stage, batch, evidence, theirs[f"result/{name}"][mask]),
                    }


def largest_difference(stage: Stage, batch: Batch, evidence: Evidence, theirs: np.ndarray) -> float:
    mine = jax.jit(stage)(batch.table, batch.tokens, evidence)
    return float(np.abs(np.asarray(mine) - theirs).max())


LONG_FUNCTIONS: dict[str, tuple[Stage, tuple[str, ...]]] = {
    "token_gae": (spread_of(advantages.token_gae), ("token_value",)),
    "reinforce_plus_plus": (spread_of(advantages.reinforce_plus_plus), ()),
    "optimal_token_baseline": (spread_of(advantages.optimal_token_baseline), ("sum_pi2",)),
}


def bench_tokens(sizes: Sequence[int], seed: int) -> Iterator[dict[str, Any]]:
    """Functions of tokens on 64 tokens a transition, up to 64M, where memory allows."""
    for transitions in sizes:
        edges = transitions * LONG
        if edges * BYTES_PER_EDGE > available_memory():
            yield {"name": "all", "transitions": transitions, "edges": edges, "skipped": "not enough memory"}
            continue
        calls = np.full(-(-transitions // CALLS), CALLS)
        calls[-1] -= calls.sum() - transitions
        batch = make_batch(transitions, np.full(transitions, LONG), calls, seed)
        for name, (stage, needs) in LONG_FUNCTIONS.items():
            taken = seconds(stage, batch.table, batch.tokens, make_evidence(batch, needs, seed))
            yield {"name": name, "transitions": transitions, "edges": edges, "seconds": taken}


def available_memory() -> float:
    """Bytes; infinite where the system does not say."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return float(found[1]) * 1024 if found else float("inf")


def associative(factors: Array, terms: Array, ids: Array, mask: Array) -> Array:
    """`segments.reverse_affine_scan` as a tree of compositions instead of one step after the other."""
    a, b = affine_maps(factors, terms, ids, mask)
    return jax.lax.associative_scan(
        lambda later, earlier: (earlier[0] * later[0], earlier[0] * later[1] + earlier[1]), (a, b), reverse=True
    )[1]


def blocked(factors: Array, terms: Array, ids: Array, mask: Array) -> Array:
    """√N blocks at once, √N steps each, then what the blocks hand on to each other."""
    n = mask.shape[0]
    blocks = max(1, int(n**0.5))
    length = -(-n // blocks)
    filling = [(0, blocks * length - n)]
    a, b = affine_maps(factors, terms, ids, mask)
    a, b = (jnp.pad(x, filling, constant_values=fill).reshape(blocks, length).T for x, fill in ((a, 1.0), (b, 0.0)))

    def compose(later, earlier):
        result = (earlier[0] * later[0], earlier[0] * later[1] + earlier[1])
        return result, result

    whole, within = jax.lax.scan(compose, (jnp.ones(blocks), jnp.zeros(blocks)), (a, b), reverse=True)
    _, carried = jax.lax.scan(lambda x, f: (f[0] * x + f[1], x), jnp.zeros(()), whole, reverse=True)
    return (within[0] * carried + within[1]).T.reshape(-1)[:n]


def affine_maps(factors: Array, terms: Array, ids: Array, mask: Array) -> tuple[Array, Array]:
    """x ↦ a x + b of every entry: the identity where it is masked, a = 0 at the end of a segment."""
    n = mask.shape[0]
    following = jax.lax.cummin(jnp.where(mask, jnp.arange(n), n), reverse=True)
    following = jnp.append(following[1:], n)
    goes_on = (following < n) & (ids[jnp.minimum(following, n - 1)] == ids)
    return jnp.where(mask, jnp.where(goes_on, factors, 0.0), 1.0), jnp.where(mask, terms, 0.0)


SCANS = {"sequential": reverse_affine_scan, "associative": associative, "blocked": blocked}


def bench_scans(sizes: Sequence[int], seed: int) -> Iterator[dict[str, Any]]:
    for n in sizes:
        rng = np.random.default_rng([seed, n])
        ids, mask = np.sort(rng.integers(0, n // 4 + 1, n)).astype(np.int32), rng.random(n) < 0.9
        given = tuple(map(jnp.asarray, (np.full(n, GAMMA, np.float32), rng.normal(size=n).astype(np.float32), ids, mask)))
        taken = {name: seconds(scan, *given) for name, scan in SCANS.items()}
        expected = jax.jit(reverse_affine_scan)(*given)
        apart = max(float(jnp.abs(jax.jit(scan)(*given) - expected).max()) for scan in SCANS.values())
        yield {"entries": n, "seconds": taken, "fastest": min(taken, key=taken.__getitem__), "largest_difference": apart}


def growth_goals(rows: Sequence[Mapping[str, Any]], what: str) -> Iterator[dict[str, Any]]:
    """Ten times the transitions in at most twelve times the time."""
    taken = {(row["name"], row["transitions"]): row["seconds"] for row in rows if "seconds" in row}
    for name in dict.fromkeys(row["name"] for row in rows):
        if (name, SIZES[-1]) in taken and (name, SIZES[-2]) in taken:
            ratio = taken[name, SIZES[-1]] / taken[name, SIZES[-2]]
            yield {"name": f"{what} {name}: seconds of 1M transitions / 100k", "value": ratio, "goal": GROWTH, "met": ratio <= GROWTH}


def speed_goals(compared: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in compared:
        if row["goal"] is not None and row["transitions"] == COMPARED_AT:
            ratio = row["their_seconds"] / row["seconds"]
            name = f"{row['library']}'s {row['name']}: times as fast at 100k transitions"
            yield {"name": name, "value": ratio, "goal": row["goal"], "met": ratio >= row["goal"]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, required=True, metavar="FILE", help="where the results go")
    parser.add_argument("--max", type=int, default=SIZES[-1], help="transitions, at most (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16, help="of a response, at most (default: %(default)s)")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="which ones (default: all)")
    parser.add_argument("--verl_python", help="a Python that has verl, to compare with")
    parser.add_argument("--rlax_python", help="a Python that has rlax, to compare with")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    sizes = [n for n in SIZES if n <= given.max]
    if not sizes:
        parser.error(f"--max must be at least {SIZES[0]}")
    compared_sizes = [n for n in sizes if n <= COMPARED_AT]

    results: dict[str, Any] = {
        "backend": jax.default_backend(),
        "devices": [str(device) for device in jax.devices()],
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {"jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "tokens": given.tokens,
        "seed": given.seed,
    }
    sections: dict[str, Iterator[dict[str, Any]]] = {"scans": bench_scans(sizes, given.seed)}
    for library, python, ours in (("verl", given.verl_python, OURS_FOR_VERL), ("rlax", given.rlax_python, OURS_FOR_RLAX)):
        if python:
            sections[library] = compare(library, python, ours, compared_sizes, given.tokens, given.seed)
    sections["recipes"] = bench_recipes(given.recipes.split(","), sizes, given.tokens, given.seed)
    sections["tokens_alone"] = bench_tokens(sizes, given.seed)
    for section, found in sections.items():
        results[section] = []
        for row in found:
            results[section].append(row)
            print(section, json.dumps(row), flush=True)
    results["goals"] = [
        *growth_goals(results["recipes"], "recipe"),
        *growth_goals(results["tokens_alone"], "tokens"),
        *speed_goals(results.get("verl", [])),
    ]
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for goal in results["goals"]:
        print(f"{'met    ' if goal['met'] else 'NOT MET'} {goal['value']:8.2f} (goal {goal['goal']:g})  {goal['name']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
