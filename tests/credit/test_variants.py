"""Every public function of credit and advantages on NumPy arrays without jit, and under jit and vmap: the same."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningrl import advantages, credit
from lightningrl.table import Evidence, TokenTable, TransitionTable
from tests.batches import make_rollout, make_table, make_tokens

SIZE, EDGES, ROLLOUTS, CALLS = 16, 16, 5, 3  # padded: both tables have fewer; of one size, so that operations are compiled once
FIRST = make_table(
    make_rollout("a", 1.0, [0.0, 0.5, 0.0], lengths=[2, 1, 3], roles=["writer", "checker", "writer"]),
    make_rollout("a", 0.0, [0.25], lengths=[2], roles=["writer"]),
    make_rollout("a", 0.5, [0.0, 0.0], lengths=[1, 1], roles=["writer", "checker"], trainable=[True, False]),
    make_rollout("b", 0.7, [0.0], lengths=[1]),
    size=SIZE,
)
SECOND = make_table(
    make_rollout("a", 0.25, [0.5], lengths=[3], roles=["checker"]),
    make_rollout("b", 1.0, [0.0, 1.0], lengths=[1, 2], roles=["writer", "checker"]),
    make_rollout("b", 0.0, [0.0, 0.5, -0.25], lengths=[2, 2, 1], roles=["writer", "checker", "writer"]),
    make_rollout("c", 0.0, [0.0], lengths=[2]),
    make_rollout("c", 1.0, [0.0], lengths=[1]),
    size=SIZE,
)

Function = Callable[[TransitionTable, TokenTable, Evidence], chex.ArrayTree]


def make_evidence(seed: int) -> Evidence:
    """Every field there is."""
    rng = np.random.default_rng(seed)

    def draw(*shape, low=-1.0, high=1.0):
        return rng.uniform(low, high, shape).astype(np.float32)

    return Evidence(
        value=draw(SIZE),
        token_value=draw(EDGES),
        branch_value=draw(SIZE, 2),
        branch_count=rng.integers(0, 3, (SIZE, 2)).astype(np.float32),
        potential=draw(SIZE, 2),
        predicted_return=draw(SIZE),
        attention=draw(SIZE, low=0.1),
        coalition=draw(ROLLOUTS, 2**CALLS),
        hindsight_logp=draw(SIZE, low=-3, high=0),
        response_logp=draw(SIZE, low=-3, high=0),
        answer_logp=draw(SIZE, 2, low=-3, high=0),
        prm_logp=draw(EDGES, low=-3, high=0),
        prm_ref_logp=draw(EDGES, low=-3, high=0),
        sum_pi2=draw(EDGES, low=0.1),
        judge=draw(SIZE),
        greedy_reward=draw(SIZE),
        role_baseline=draw(SIZE),
    )


GIVEN = [(FIRST, make_tokens(FIRST, EDGES, seed=1), make_evidence(1)), (SECOND, make_tokens(SECOND, EDGES, seed=2), make_evidence(2))]


def assigner(function: Callable) -> Function:
    return lambda table, tokens, evidence: function(table, evidence)


def of_table(function: Callable) -> Function:
    return lambda table, tokens, evidence: function(table)


def advantage(function: Callable) -> Function:
    return lambda table, tokens, evidence: function(table, credit.reward_to_go(table, evidence, gamma=0.5), evidence)


def spread(function: Callable) -> Function:
    return lambda table, tokens, evidence: function(table, tokens, credit.salt(table, evidence).value, evidence)


FUNCTIONS: dict[str, Function] = {
    **{f"credit.{name}": of_table(getattr(credit, name)) for name in ("node_values", "state_values", "turn_rewards")},
    "credit.shapley_sampled": assigner(functools.partial(credit.shapley_sampled, key=jax.random.key(0), permutations=2)),
    "credit.gigpo with std": assigner(functools.partial(credit.gigpo, scale="std", baseline="code")),
    "credit.hgpo as its code": assigner(functools.partial(credit.hgpo, levels="code")),
    "credit.tree_grpo in sequence": assigner(functools.partial(credit.tree_grpo, sequential=True)),
    **{
        f"advantages.{name}": advantage(getattr(advantages, name))
        for name in (
            "accepted",
            "gdpo",
            "gpg",
            "group_norm",
            "leave_one_out",
            "maxrl",
            "opo",
            "pass_at_k",
            "remax",
            "role_baseline",
            "unchanged",
            "whiten",
        )
    },
    **{
        f"advantages.group_norm as {name}": advantage(functools.partial(advantages.group_norm, **advantages.PRESETS[name]))
        for name in ("verl", "art")  # between them, every setting that a preset sets
    },
    "advantages.statistics_weights": of_table(functools.partial(advantages.statistics_weights, count="transitions")),
    "advantages.rae_update": lambda table, tokens, evidence: advantages.rae_update(jnp.zeros(2), table, 0.5),
    "advantages.whiten_tokens": lambda table, tokens, evidence: advantages.whiten_tokens(tokens.old_logp, tokens.mask),
}
HOST_ONLY = {"advantages.preset", "advantages.require_return"}  # they take names
for _package, _kind in ((credit, assigner), (advantages, spread)):
    for _name in _package.__all__:
        _full = f"{_package.__name__.split('.')[-1]}.{_name}"
        if isinstance(getattr(_package, _name), types.FunctionType) and _full not in HOST_ONLY:
            FUNCTIONS.setdefault(_full, _kind(getattr(_package, _name)))
NAMES = pytest.mark.parametrize("name", list(FUNCTIONS))


@contextlib.contextmanager
def compiled_quickly():
    """Compilation is what takes time here."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def every(table: TransitionTable, tokens: TokenTable, evidence: Evidence) -> dict[str, chex.ArrayTree]:
    return {name: function(table, tokens, evidence) for name, function in FUNCTIONS.items()}


@functools.cache
def plain() -> dict[str, chex.ArrayTree]:
    """Of the first table: NumPy arrays go in, and nothing is traced, not even the body of a scan."""
    with jax.disable_jit(), compiled_quickly():
        return every(*GIVEN[0])


@functools.cache
def compiled() -> tuple[dict[str, chex.ArrayTree], dict[str, chex.ArrayTree]]:
    """Of both tables at once, and of both the other way round."""
    both = jax.jit(jax.vmap(every))
    with compiled_quickly():
        one, other = (both(*jax.tree.map(lambda *x: np.stack(x), *given)) for given in (GIVEN, GIVEN[::-1]))
    return one, other


@pytest.mark.slow
@NAMES
def test_is_the_same_under_jit_and_vmap_as_without(name):
    """Up to what the compiler rounds differently when it fuses; the kind of a credit is in the tree's structure."""
    actual = jax.tree.map(lambda x: x[0], compiled()[0][name])
    wanted = plain()[name]
    chex.assert_trees_all_equal_structs(actual, wanted)
    for leaf in jax.tree.leaves(wanted):
        assert np.isfinite(leaf).all()
    chex.assert_trees_all_close(actual, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.slow
@NAMES
def test_a_table_does_not_see_the_one_beside_it(name):
    one, other = (result[name] for result in compiled())
    chex.assert_trees_all_equal(one, jax.tree.map(lambda x: x[::-1], other))


@NAMES
def test_something_is_computed_and_depends_on_the_table(name):
    leaves = jax.tree.leaves(compiled()[0][name])
    assert any(np.any(leaf[0] != 0) and np.any(leaf[0] != leaf[1]) for leaf in leaves)
