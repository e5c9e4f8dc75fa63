"""Named algorithms: a credit, an advantage, a spread, a loss and an aggregation, put together.

A recipe is data. `dataclasses.replace(get_recipe("lightningrl"), kl=k3, kl_coef=0.01)` is another one, and an assigner of one's
own is a function in the place of `credit`. `python -m lightningrl.recipes` prints the table.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import signal
from typing import Any

from lightningrl import advantages, credit, losses
from lightningrl.recipe import Branches, Recipe, paragraph

_clip = functools.partial(losses.ppo_clip, clip_low=0.2, clip_high=0.28, dual_clip=3.0)


_LIGHTNINGRL = Recipe(
    name="lightningrl",
    arxiv="2508.03680, 2608.17528",
    use_when="the outcome is all there is: every rollout weighs one, however many calls it made",
    credit=credit.identical,
    advantage=advantages.group_norm,
    loss=_clip,
    aggregation=losses.rollout_mean,
)

_PAPER = Recipe(
    name="lightningrl_paper",
    arxiv="2508.03680",
    use_when="you reproduce the paper: all calls of a task form one group, every token weighs the same",
    credit=credit.identical,
    advantage=functools.partial(advantages.group_norm, count="transitions"),
    loss=functools.partial(losses.ppo_clip, clip_low=0.2, clip_high=0.3, dual_clip=3.0),
    aggregation=losses.token_mean,
)


def _like(recipe: Recipe, name: str, arxiv: str, use_when: str, **changes: Any) -> Recipe:
    return dataclasses.replace(recipe, name=name, arxiv=arxiv, use_when=use_when, **changes)


_TOKEN_PPO = _like(
    _LIGHTNINGRL,
    "token_ppo",
    "1707.06347, 1506.02438",
    "answers are long and a critic can learn where they go wrong: PPO as it is used for chat models, a value for each token",
    advantage=advantages.unchanged,
    spread=functools.partial(advantages.token_gae, gamma=1.0, lambda_=0.95),
    needs=("token_value",),
    token_value_target=functools.partial(advantages.token_lambda_return, gamma=1.0, lambda_=0.95),
    value_coef=0.5,
)


# How credit is assigned.
_CREDITS = (
    _PAPER,
    _LIGHTNINGRL,
    _like(
        _LIGHTNINGRL,
        "lightningrl_rtg",
        "2508.03680",
        "tools pay intermediate rewards: a call answers for what follows it (without any, it is lightningrl)",
        credit=functools.partial(credit.reward_to_go, gamma=1.0),
    ),
    _like(
        _LIGHTNINGRL,
        "air",
        "2508.03680",
        "as lightningrl_rtg, for rewards that speak of one call only: its own, and the outcome",
        credit=credit.intermediate,
    ),
    _like(
        _LIGHTNINGRL,
        "mt_grpo",
        "2505.11821",
        "as air, where turn rewards should not drown the outcome: each is compared with the group by itself",
        credit=credit.mt_grpo,
        advantage=advantages.unchanged,
    ),
    _like(_LIGHTNINGRL, "last_only", "2508.03680", "only the last call counts: to compare others with", credit=credit.last_only),
    _like(
        _LIGHTNINGRL,
        "gigpo",
        "2505.10978",
        "rollouts of a task come through equal states: calls made in one state are compared with each other",
        credit=credit.gigpo,
        advantage=advantages.unchanged,
    ),
    _like(
        _LIGHTNINGRL,
        "hgpo",
        "2602.22817",
        "as gigpo, where a state means something else after another history",
        credit=credit.hgpo,
        advantage=advantages.unchanged,
    ),
    _like(
        _LIGHTNINGRL,
        "salt",
        "2510.20022",
        "rollouts share steps: a step that good and bad rollouts took alike is neither praised nor blamed",
        credit=credit.salt,
        advantage=advantages.unchanged,
    ),
    _like(
        _LIGHTNINGRL,
        "rewardflow",
        "2603.18859",
        "states recur and tools are deterministic: a state is worth the best that was reached from it",
        credit=credit.rewardflow,
        advantage=advantages.unchanged,
    ),
    # Turn-PPO takes the ratio per turn as well; here the ratio stays per token and only the advantage is per turn.
    Recipe(
        name="ppo",
        arxiv="2512.17008",
        use_when="rollouts are long, or a task has too few of them for a group: a critic tells turns apart",
        credit=functools.partial(credit.gae, gamma=0.99, lambda_=0.9),
        advantage=functools.partial(advantages.whiten, shift_mean=False),
        loss=_clip,
        aggregation=losses.rollout_mean,
        needs=("value",),
        value_target=functools.partial(credit.gae_value_target, gamma=0.99, lambda_=0.9),
        value_coef=0.5,
    ),
    _TOKEN_PPO,
    _like(
        _TOKEN_PPO,
        "bi_level_gae",
        "2504.20073, 2510.16907",
        "as token_ppo, with many turns: rewards are discounted over turns, and not over the tokens between them",
        spread=functools.partial(advantages.bi_level_gae, turn_gamma=0.95, turn_lambda=1.0),
        token_value_target=functools.partial(advantages.bi_level_value_target, turn_gamma=0.95, turn_lambda=1.0),
    ),
)

# What a model says of the calls: a return model, another prompt, a process-reward model, a judge.
_MODELS = (
    _like(
        _LIGHTNINGRL,
        "rudder",
        "1806.07857",
        "the deciding call comes early: what a call changed in the return that a model predicts",
        credit=credit.rudder,
        needs=("predicted_return",),
    ),
    _like(
        _LIGHTNINGRL,
        "spa",
        "2505.20732",
        "as rudder, with a model of each call's share",
        credit=credit.spa,
        needs=("predicted_return",),
        evidence_settings=(("kind", "spa"),),
    ),
    _like(
        _LIGHTNINGRL,
        "abc",
        "2402.00782",
        "as rudder, by what a return model attends to",
        credit=credit.attention_based,
        needs=("attention",),
    ),
    _like(
        _LIGHTNINGRL,
        "scar",
        "2505.20417",
        "calls help one another: the Shapley value of each, of rollouts of at most ten calls",
        credit=credit.shapley,
        needs=("coalition",),
    ),
    _like(
        _LIGHTNINGRL,
        "hindsight",
        "1912.02503",
        "what a call has to do with the outcome is in its words: was it likelier, knowing the outcome?",
        credit=functools.partial(credit.hindsight, per_token=True),
        advantage=advantages.unchanged,
        needs=("hindsight_logp", "response_logp"),
    ),
    _like(
        _LIGHTNINGRL,
        "hcapo",
        "2603.08754",
        "as hindsight, as a weight of returns besides grpo's advantage",
        credit=credit.hcapo,
        advantage=advantages.unchanged,
        needs=("hindsight_logp", "response_logp"),
    ),
    _like(
        _LIGHTNINGRL,
        "igpo",
        "2510.14967",
        "calls gather information and the true answer is a text: how much likelier did a call make it?",
        credit=credit.igpo,
        advantage=advantages.unchanged,
        needs=("answer_logp",),
    ),
    _like(
        _LIGHTNINGRL,
        "prime",
        "2502.01456",
        "answers are long and only outcomes are known: a second model learns rewards for tokens from them",
        advantage=advantages.leave_one_out,
        spread=advantages.prime,
        needs=("prm_logp", "prm_ref_logp"),
    ),
    _like(
        _LIGHTNINGRL,
        "istar",
        "2509.19199",
        "as prime, with a reward for each call",
        spread=advantages.istar,
        needs=("prm_logp", "prm_ref_logp"),
        evidence_settings=(("objective", "trajectory_dpo"), ("reference", "policy"), ("rewards", "before_update")),
    ),
    _like(
        _LIGHTNINGRL,
        "judged",
        "",
        "somebody can tell good calls from bad ones: a judge's scores (as RULER's), and the outcome",
        credit=functools.partial(credit.judged, outcome_weight=1.0),
        advantage=advantages.unchanged,
        needs=("judge",),
    ),
    _like(
        _LIGHTNINGRL,
        "shaped",
        "",
        "you know how far along a state is: shaping by a potential (Ng, Harada, Russell 1999), which changes no best policy",
        credit=credit.potential_difference,
        needs=("potential",),
    ),
)

# What rollouts started in the middle of others came to. A tree's branches are trained on too, and cost as much as rollouts.
_TREE = _like(_LIGHTNINGRL, "tree", "", "", advantage=advantages.unchanged, branches=Branches(points=1, width=2))

_BRANCHES = (
    _like(
        _LIGHTNINGRL,
        "vineppo",
        "2410.01679",
        "runs are cheap and a critic is not to be had: rollouts from before and after a call say what it changed",
        credit=credit.vineppo,
        advantage=advantages.unchanged,
        needs=("branch_value", "branch_count"),
    ),
    _like(
        _LIGHTNINGRL,
        "counterfactual",
        "1705.08926",
        "as vineppo, where a call should answer for all that came after it: the rollout against others from the same state",
        credit=credit.counterfactual,
        advantage=advantages.unchanged,
        needs=("branch_value", "branch_count"),
    ),
    _like(
        _TREE,
        "spo_tree",
        "2505.23564",
        "as vineppo, but extra rollouts are trained on: each call against its siblings",
        credit=credit.spo_tree,
    ),
    _like(_TREE, "treerl", "2506.11902", "as spo_tree, with what a call is worth against the start besides", credit=credit.treerl),
    _like(
        _TREE,
        "tree_grpo",
        "2509.21240",
        "rollouts of a tree are alike: each against its tree and the task",
        credit=credit.tree_grpo,
    ),
    _like(_TREE, "treeadv", "2601.03703", "as grpo on a tree: shared calls get their rollouts' mean advantage", credit=credit.treeadv),
)

# What is taken off, and what scales.
_ADVANTAGES = (
    _like(
        _LIGHTNINGRL,
        "grpo",
        "2402.03300",
        "you want GRPO as it was published, with its KL term: each call's tokens averaged",
        loss=functools.partial(losses.ppo_clip, clip_low=0.2, clip_high=0.2, dual_clip=None),
        aggregation=losses.sequence_mean,
        kl=losses.k3,
        kl_coef=0.04,
    ),
    _like(
        _LIGHTNINGRL,
        "dr_grpo",
        "2503.20783",
        "lengths and hard tasks should not be favoured: no division by the deviation or by the length",
        advantage=functools.partial(advantages.group_norm, scale="none"),
        aggregation=losses.sequence_sum,
    ),
    _like(
        _LIGHTNINGRL,
        "rloo",
        "2402.14740",
        "groups are small: the baseline leaves the rollout out",
        advantage=advantages.leave_one_out,
    ),
    _like(
        _LIGHTNINGRL,
        "reinforce_pp",
        "2501.03262",
        "tasks are alike in difficulty and have one rollout each: rewards against the whole batch's",
        advantage=advantages.unchanged,
        spread=advantages.reinforce_plus_plus,
        aggregation=losses.token_mean,
    ),
    _like(
        _LIGHTNINGRL,
        "reinforce_pp_baseline",
        "2501.03262",
        "rewards of tasks differ in scale: group mean, then one scale for the whole batch",
        advantage=functools.partial(advantages.group_norm, scale="none"),
        spread=advantages.reinforce_plus_plus_baseline,
        aggregation=losses.token_mean,
    ),
    _like(
        _LIGHTNINGRL,
        "remax",
        "2310.10505",
        "there is one rollout a task: the greedy one is the baseline",
        advantage=advantages.remax,
        needs=("greedy_reward",),
    ),
    _like(
        _LIGHTNINGRL,
        "rae",
        "2506.24119",
        "roles play against each other, and rules favour one: a running baseline for each role",
        advantage=advantages.role_baseline,
        needs=("role_baseline",),
    ),
    _like(_LIGHTNINGRL, "opo", "2505.23585", "lengths differ much: the baseline of least variance", advantage=advantages.opo),
    _like(_LIGHTNINGRL, "gdpo", "2601.05242", "rollouts have several named outcomes: each has its say", advantage=advantages.gdpo),
    _like(
        _LIGHTNINGRL,
        "rft",
        "2308.01825, 2304.06767",
        "to compare with: rollouts that succeeded are imitated, the others are not learned from",
        advantage=advantages.accepted,
        loss=functools.partial(losses.negative_log_likelihood, weighted=True),
        aggregation=losses.token_mean,
    ),
    _like(_LIGHTNINGRL, "maxrl", "2602.02710", "rewards are 0 or 1 and successes are rare", advantage=advantages.maxrl),
    _like(_LIGHTNINGRL, "pass_at_k", "2503.19595", "one success among many tries is enough", advantage=advantages.pass_at_k),
    _like(
        _LIGHTNINGRL,
        "otb",
        "2602.07078",
        "gradients are noisy: at each token the baseline of least variance, which sure rollouts have little say in",
        advantage=advantages.unchanged,
        spread=advantages.multi_turn_optimal_token_baseline,
        needs=("sum_pi2",),
    ),
    _like(
        _LIGHTNINGRL,
        "gpg",
        "2504.02546",
        "nothing should be clipped: the plain policy gradient, one update an iteration",
        advantage=advantages.gpg,
        loss=losses.gpg,
        aggregation=losses.token_mean,
    ),
)

# How a token's loss is made.
_LOSSES = (
    _like(
        _PAPER,
        "row_weighted",
        "2508.03680, 2608.17528",
        "to compare with: lightningrl_paper at the clip of lightningrl and dapo, which differ from it in what weighs one",
        loss=_clip,
    ),
    _like(_LIGHTNINGRL, "dapo", "2503.14476", "answers are long: clip-higher, every token weighs the same", aggregation=losses.token_mean),
    _like(
        _LIGHTNINGRL,
        "gspo",
        "2507.18071",
        "ratios per token are noise (mixtures of experts): one ratio for each call",
        loss=losses.gspo,
        aggregation=losses.sequence_mean,
    ),
    _like(_LIGHTNINGRL, "gmpo", "2507.20673", "as gspo, with ratios clipped per token", loss=losses.gmpo, aggregation=losses.sequence_mean),
    _like(
        _LIGHTNINGRL,
        "cispo",
        "2506.13585",
        "rare tokens matter: a clipped token keeps its gradient",
        loss=losses.cispo,
        aggregation=losses.token_mean,
    ),
    _like(_LIGHTNINGRL, "sapo", "2511.20347", "clipping is too abrupt: ratios fade out softly", loss=losses.sapo),
    _like(
        _LIGHTNINGRL,
        "clip_cov",
        "2505.22617",
        "entropy collapses: some of the tokens that make it fall are left out",
        loss=losses.clip_cov,
        select=losses.clip_cov_selection,
        aggregation=losses.token_mean,
    ),
    _like(
        _LIGHTNINGRL,
        "kl_cov",
        "2505.22617",
        "as clip_cov, but the tokens that make entropy fall most are held by a KL term, and nothing is clipped",
        loss=losses.kl_cov,
        select=losses.kl_cov_selection,
        aggregation=losses.token_mean,
    ),
    _like(
        _LIGHTNINGRL,
        "m2po",
        "2510.01161",
        "rollouts are stale: of ratios to the behaviour policy the largest are left out until their second moment is small",
        loss=losses.m2po,
        select=losses.second_moment_keep,
        aggregation=losses.token_mean,
    ),
    _like(_LIGHTNINGRL, "dppo", "2602.04879", "probabilities, not their ratios, should stay close", loss=losses.dppo_tv),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*_CREDITS, *_MODELS, *_BRANCHES, *_ADVANTAGES, *_LOSSES)}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
      ValueError: there is none; the sentence lists those there are, and after them what was probably meant.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, cutoff=0.5)
        hint = f"; nearest to it: {', '.join(near)}" if near else ""
        raise ValueError(f"There is no recipe {name!r}: choose one of {', '.join(sorted(RECIPES))}{hint}.")
    return RECIPES[name]


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` ends it without a traceback
    print("\n\n".join(paragraph(recipe) for recipe in RECIPES.values()))
