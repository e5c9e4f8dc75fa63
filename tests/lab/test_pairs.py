"""Nothing of the library is left out of the lab without a word, and who is told the truth is marked."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable

import pytest

from lightningrl import advantages, credit
from lightningrl.lab.evidence import PRODUCERS
from lightningrl.lab.exact import EXACT
from lightningrl.lab.pairs import MADE_BY, NOT_APPLICABLE, ON_TREES, PAIRS, recipe_pair, sampled_orders
from lightningrl.recipes import RECIPES
from lightningrl.table import Evidence

NO_CREDIT = {"gae_value_target", "node_values", "state_values", "turn_rewards"}  # what critics learn, and what credit is made of
NO_ADVANTAGE = {
    "bi_level_value_target",
    "token_lambda_return",
    "v_trace_target",  # what critics learn
    "broadcast",  # the spread of all others
    "preset",  # settings of group_norm
    "rae_update",  # moves the baseline of role_baseline
    "require_return",
    "statistics_weights",
    "whiten_tokens",  # what advantages are made of
}


def family(name: str) -> list:
    return [pair for pair in PAIRS.values() if pair.family == name]


def plain(function: Callable) -> Callable:
    return plain(function.func) if isinstance(function, functools.partial) else function


def functions(module) -> set[str]:
    return {name for name in module.__all__ if inspect.isfunction(getattr(module, name))}


def test_every_recipe_is_a_pair():
    assert [pair.recipe for pair in family("recipe")] == list(RECIPES.values())
    assert all(PAIRS[name].recipe is recipe for name, recipe in RECIPES.items())


def test_a_recipe_that_needs_what_nobody_makes_is_refused():
    strange = dataclasses.replace(RECIPES["lightningrl"], name="strange", needs=("attention", "prm_logp"))
    assert recipe_pair(strange).needs == ("attention", "exact_implicit_reward")
    missing = [field.name for field in dataclasses.fields(Evidence) if field.name not in MADE_BY]
    assert not missing
    with pytest.raises(ValueError, match="no producer makes 'judge'"), pytest.MonkeyPatch.context() as patch:
        patch.delitem(MADE_BY, "judge")
        recipe_pair(dataclasses.replace(strange, needs=("judge",)))


def test_a_recipe_is_given_the_rollouts_that_it_reads():
    on_tree = dataclasses.replace(RECIPES["lightningrl"], credit=functools.partial(credit.tree_grpo, sequential=True))
    branching = dataclasses.replace(RECIPES["lightningrl"], credit=credit.vineppo, needs=("branch_value", "branch_count"))
    assert recipe_pair(on_tree).kind == "trees"
    assert (recipe_pair(branching).kind, recipe_pair(branching).needs) == ("branches", ("branch_value",))
    assert all(pair.kind == "trees" for pair in PAIRS.values() if plain(pair.recipe.credit) in ON_TREES)


def test_every_assigner_is_a_pair():
    assigned = {plain(pair.recipe.credit).__name__ for pair in family("assigner")}
    assigned |= {"shapley_sampled"} if sampled_orders.__name__ in assigned else set()
    assert functions(credit) - NO_CREDIT <= assigned
    assert NO_CREDIT <= functions(credit)


def test_every_advantage_is_a_pair():
    used = {plain(f).__name__ for pair in family("advantage") for f in (pair.recipe.advantage, pair.recipe.spread)}
    used |= {"group_norm"}
    assert functions(advantages) - NO_ADVANTAGE <= used
    assert NO_ADVANTAGE <= functions(advantages)


def test_pairs_differ_in_one_thing():
    """Assigners have one advantage for each kind of credit, advantages one assigner, and both the loss of lightningrl."""
    for pair in family("assigner"):
        assert plain(pair.recipe.advantage) in (advantages.group_norm, advantages.whiten)
        assert pair.recipe.spread is advantages.broadcast
    for pair in family("advantage"):
        assert pair.recipe.credit is credit.identical
    rest = {(p.recipe.loss, p.recipe.aggregation, p.recipe.kl, p.recipe.entropy_coef) for f in ("assigner", "advantage") for p in family(f)}
    assert len(rest) == 1
    assert PAIRS["identical + group_norm"].recipe.loss is RECIPES["lightningrl"].loss


def test_pairs_have_their_evidence():
    for pair in PAIRS.values():
        assert set(pair.needs) <= {*PRODUCERS, *EXACT}
        assert ("branch_value" in pair.needs) == (pair.kind == "branches")
        assert pair.told == any(need.startswith("exact_") or need == "judge" for need in pair.needs)
    assert len(PAIRS) >= 55
    assert len(NOT_APPLICABLE) >= 3


def test_a_pair_with_exact_evidence_names_the_one_without():
    for pair in PAIRS.values():
        if pair.family == "recipe":  # named as it is in `RECIPES`, whoever makes its evidence
            continue
        assert ("(exact)" in pair.name or ", exact)" in pair.name) == any(need in EXACT for need in pair.needs)
        if pair.learned is None:
            continue
        twin = PAIRS[pair.learned]
        assert pair.told and not twin.told
        assert pair.recipe == dataclasses.replace(twin.recipe, name=pair.recipe.name)
