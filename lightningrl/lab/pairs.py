"""What the lab compares: every recipe, every assigner with one advantage, every advantage with one assigner."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax

from lightningrl import advantages, credit, losses
from lightningrl.lab.evidence import PRODUCERS
from lightningrl.lab.exact import EXACT
from lightningrl.lab.sampling import Kind
from lightningrl.recipe import AdvantageFn, CreditFn, Recipe, SpreadFn, describe
from lightningrl.recipes import RECIPES
from lightningrl.table import Credit, Evidence, TransitionTable

Family = Literal["recipe", "assigner", "advantage"]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A recipe to be measured, what it is given, and how its rollouts are sampled."""

    name: str
    family: Family
    recipe: Recipe
    needs: tuple[str, ...] = ()  # producers of `lab.evidence` and `lab.exact`
    kind: Kind = "groups"
    learned: str | None = None  # of a pair with exact evidence: the one that has the same learned or sampled

    @property
    def told(self) -> bool:
        """Whether it knows what no learner does."""
        return any(need in EXACT or need == "judge" for need in self.needs)


def sampled_orders(table: TransitionTable, evidence: Evidence) -> Credit:
    """`shapley_sampled` with the same random orders in every batch."""
    return credit.shapley_sampled(table, evidence, key=jax.random.key(0))


# Of each field that a recipe may need: who makes it, and how rollouts are sampled.
MADE_BY: dict[str, str] = {name: name for name in PRODUCERS} | {
    "branch_count": "branch_value",
    "hindsight_logp": "hindsight",
    "response_logp": "hindsight",
    "answer_logp": "exact_answer_logp",
    "prm_logp": "exact_implicit_reward",
    "prm_ref_logp": "exact_implicit_reward",
}
ON_TREES = (credit.spo_tree, credit.treerl, credit.tree_grpo, credit.treeadv)

# Its own gradient is that of token_mean at one token a call: every call weighs the same, and nothing but the assigner tells pairs apart.
_PLAIN = dataclasses.replace(RECIPES["lightningrl"], aggregation=losses.token_mean, needs=())


def recipe_pair(recipe: Recipe) -> Pair:
    """A recipe as it is, with its evidence from whoever makes it.

    Raises:
      ValueError: nobody makes a field that it needs.
    """
    for need in recipe.needs:
        if need not in MADE_BY:
            raise ValueError(f"The lab cannot measure recipe {recipe.name!r}: no producer makes {need!r}; give it one in `lab.evidence`.")
    needs = tuple(dict.fromkeys(MADE_BY[need] for need in recipe.needs))
    if ("kind", "spa") in recipe.evidence_settings:
        needs = ("contributions",)
    kind: Kind = "groups"
    if describe(recipe.credit).split("(")[0] in [f.__name__ for f in ON_TREES]:
        kind = "trees"
    if "branch_value" in needs:
        kind = "branches"
    return Pair(recipe.name, "recipe", recipe, needs, kind)


_SCALED: AdvantageFn = functools.partial(advantages.whiten, shift_mean=False)


def _assigner(name: str, assign: CreditFn, *needs: str, advantage: bool = False, kind: Kind = "groups", learned: str | None = None) -> Pair:
    """A "return" is compared within its group; an "advantage", from which nothing may be taken off, is scaled over the batch."""
    then: AdvantageFn = _SCALED if advantage else advantages.group_norm
    label, learned_label = (f"{x} + {'whiten' if advantage else 'group_norm'}" for x in (name, learned))
    recipe = dataclasses.replace(_PLAIN, name=label, credit=assign, advantage=then)
    return Pair(label, "assigner", recipe, needs, kind, learned_label if learned else None)


def _advantage(name: str, then: AdvantageFn, *needs: str, spread: SpreadFn = advantages.broadcast, learned: str | None = None) -> Pair:
    label = f"identical + {name}"
    recipe = dataclasses.replace(_PLAIN, name=label, advantage=then, spread=spread)
    return Pair(label, "advantage", recipe, needs, learned=f"identical + {learned}" if learned else None)


def _assigners() -> list[Pair]:
    is_advantage = functools.partial(_assigner, advantage=True)
    on_tree = functools.partial(_assigner, advantage=True, kind="trees")
    restarted = functools.partial(_assigner, advantage=True, kind="branches")
    step_alone = functools.partial(credit.potential_difference, lambda_=0.0)
    return [
        _assigner("identical", credit.identical),
        _assigner("last_only", credit.last_only),
        _assigner("uniform_split", credit.uniform_split),
        _assigner("intermediate", credit.intermediate),
        _assigner("reward_to_go", credit.reward_to_go),
        _assigner("reward_to_go(γ=0.9)", functools.partial(credit.reward_to_go, gamma=0.9)),
        _assigner("lambda_return", credit.lambda_return, "value"),
        _assigner("lambda_return(exact)", credit.lambda_return, "exact_value", learned="lambda_return"),
        _assigner("potential_difference", credit.potential_difference, "potential"),
        _assigner("potential_difference(λ=0)", step_alone, "potential"),
        _assigner("potential_difference(λ=0, exact)", step_alone, "exact_potential", learned="potential_difference(λ=0)"),
        _assigner("rudder", credit.rudder, "predicted_return"),
        _assigner("rudder(exact)", credit.rudder, "exact_predicted_return", learned="rudder"),
        _assigner("spa", credit.spa, "contributions"),
        _assigner("spa(exact)", credit.spa, "exact_predicted_return", learned="spa"),
        _assigner("attention_based", credit.attention_based, "attention"),
        _assigner("shapley", credit.shapley, "coalition"),
        _assigner("shapley(exact)", credit.shapley, "exact_coalition", learned="shapley"),
        _assigner("shapley_sampled", sampled_orders, "coalition"),
        _assigner("leave_one_call_out", credit.leave_one_call_out, "coalition"),
        is_advantage("mt_grpo", credit.mt_grpo),
        is_advantage("gigpo", credit.gigpo),
        is_advantage("hgpo", credit.hgpo),
        is_advantage("salt", credit.salt),
        is_advantage("rewardflow", credit.rewardflow),
        is_advantage("gae", credit.gae, "value"),
        is_advantage("gae(γ=λ=1)", functools.partial(credit.gae, gamma=1.0, lambda_=1.0), "value"),
        is_advantage("gae(exact)", credit.gae, "exact_value", learned="gae"),
        is_advantage("hindsight", credit.hindsight, "hindsight"),
        is_advantage("hindsight(exact)", credit.hindsight, "exact_hindsight", learned="hindsight"),
        is_advantage("hcapo", credit.hcapo, "hindsight"),
        is_advantage("hcapo(exact)", credit.hcapo, "exact_hindsight", learned="hcapo"),
        is_advantage("igpo(exact)", credit.igpo, "exact_answer_logp"),
        is_advantage("judged", credit.judged, "judge"),
        restarted("vineppo", credit.vineppo, "branch_value"),
        is_advantage("vineppo(exact)", credit.vineppo, "exact_branch_value", learned="vineppo"),
        restarted("counterfactual", credit.counterfactual, "branch_value"),
        is_advantage("counterfactual(exact)", credit.counterfactual, "exact_branch_value", learned="counterfactual"),
        on_tree("spo_tree", credit.spo_tree),
        on_tree("treerl", credit.treerl),
        on_tree("tree_grpo", credit.tree_grpo),
        on_tree("tree_grpo(sequential)", functools.partial(credit.tree_grpo, sequential=True)),
        on_tree("treeadv", credit.treeadv),
    ]


def _advantages() -> list[Pair]:
    centred = functools.partial(advantages.group_norm, scale="none")
    return [
        _advantage("unchanged", advantages.unchanged),
        _advantage("group_norm(transitions)", functools.partial(advantages.group_norm, count="transitions")),
        _advantage("group_norm(scale=none)", centred),
        _advantage("leave_one_out", advantages.leave_one_out),
        _advantage("whiten", advantages.whiten),
        _advantage("remax", advantages.remax, "greedy_reward"),
        _advantage("role_baseline", advantages.role_baseline, "role_baseline"),
        _advantage("opo", advantages.opo),
        _advantage("accepted", advantages.accepted),
        _advantage("gpg", advantages.gpg),
        _advantage("maxrl", advantages.maxrl),
        _advantage("gdpo", advantages.gdpo),
        _advantage("pass_at_k", advantages.pass_at_k),
        _advantage("reinforce_plus_plus", advantages.unchanged, spread=advantages.reinforce_plus_plus),
        _advantage("reinforce_plus_plus_baseline", centred, spread=advantages.reinforce_plus_plus_baseline),
        _advantage("optimal_token_baseline", advantages.unchanged, "sum_pi2", spread=advantages.optimal_token_baseline),
        _advantage("multi_turn_otb", advantages.unchanged, "sum_pi2", spread=advantages.multi_turn_optimal_token_baseline),
        _advantage("token_gae", advantages.unchanged, "token_value", spread=advantages.token_gae),
        _advantage("token_gae(exact)", advantages.unchanged, "exact_token_value", spread=advantages.token_gae, learned="token_gae"),
        _advantage("bi_level_gae", advantages.unchanged, "token_value", spread=advantages.bi_level_gae),
        _advantage("v_trace", advantages.unchanged, "token_value", spread=advantages.v_trace),
        _advantage("prime(exact)", advantages.leave_one_out, "exact_implicit_reward", spread=advantages.prime),
        _advantage("istar(exact)", advantages.group_norm, "exact_implicit_reward_of_policy", spread=advantages.istar),
    ]


PAIRS: dict[str, Pair] = {pair.name: pair for pair in (*map(recipe_pair, RECIPES.values()), *_assigners(), *_advantages())}

# Estimators that are no pair of their own, and why.
NOT_APPLICABLE: dict[str, str] = {
    "igpo, learned": "needs the log-prob of a task's written answer; a tabular one is no text, so only the exact chance is there",
    "prime and istar, learned": "need a process-reward model that is a language model; only the one without an error of fit is there",
    "broadcast": "the spread of every pair that names no other",
    "rae_update": "moves the baseline of role_baseline, which is a pair",
    "value targets": "token_lambda_return, v_trace_target, gae_value_target and bi_level_value_target are what critics learn, not credit",
    "presets": "group_norm with another epsilon, ddof or rule for groups of one, of which there are none here",
    "judged, learned": "no judge but the scripted one, which is told the best action and is wrong in a fifth of all calls",
}
