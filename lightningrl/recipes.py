"""Named algorithms: a credit, an advantage, a spread, a loss and an aggregation, put together.

A recipe is data. `dataclasses.replace(get_recipe("lightningrl"), kl=k3, kl_coef=0.01)` is another one, and an assigner of one's
own is a function in the place of `credit`. `python -m lightningrl.recipes` prints the table.
"""

from __future__ import annotations

import dataclasses
import functools
import signal
import textwrap
from collections.abc import Callable
from typing import Any

from lightningrl import advantages, credit, losses
from lightningrl.losses.aggregation import Aggregate
from lightningrl.losses.metrics import Metrics
from lightningrl.table import Array, Credit, Evidence, LossInputs, TokenTable, TransitionTable, UnitCounts

CreditFn = Callable[[TransitionTable, Evidence], Credit]
AdvantageFn = Callable[[TransitionTable, Credit, Evidence], Array]
SpreadFn = Callable[[TransitionTable, TokenTable, Array, Evidence], Array]
LossFn = Callable[..., tuple[Array, Array, Metrics]]  # (LossInputs), and `selected` of a recipe with a `select`
SelectFn = Callable[..., Array]  # (LossInputs, *, key)
AggregationFn = Callable[[Array, Array, UnitCounts], Aggregate]
KlFn = Callable[[LossInputs], Array]
ValueTargetFn = Callable[[TransitionTable, Evidence], Array]

_clip = functools.partial(losses.ppo_clip, clip_low=0.2, clip_high=0.28, dual_clip=3.0)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One algorithm. The objective is aggregation(loss) + kl_coef · aggregation(kl) - entropy_coef · aggregation(entropy)
    + value_coef · value_aggregation(value_loss), each sum divided by its own denominator."""

    name: str
    arxiv: str
    use_when: str
    credit: CreditFn
    advantage: AdvantageFn
    loss: LossFn
    aggregation: AggregationFn
    spread: SpreadFn = advantages.broadcast
    select: SelectFn | None = None  # bool of the edges' shape, for a loss of batch scope: without gradient, from the whole batch
    needs: tuple[str, ...] = ()  # fields of Evidence that must be filled
    kl: KlFn | None = None  # needs a reference policy
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    value_target: ValueTargetFn | None = None  # f32[N], what a turn critic learns; None for none
    token_value_target: SpreadFn | None = None  # f32[E], what a token critic learns; None for none
    value_loss: LossFn = losses.value_loss  # (LossInputs, *, states)
    value_aggregation: AggregationFn = losses.token_mean  # under the mask of the states that the value loss keeps
    value_coef: float = 0.0

    def __post_init__(self) -> None:
        fields = [field.name for field in dataclasses.fields(Evidence)]
        for need in self.needs:
            if need not in fields:
                raise ValueError(f"Recipe {self.name!r} needs {need!r}, which is no field of Evidence: {', '.join(fields)}.")
        if (self.kl is None) != (self.kl_coef == 0.0):
            raise ValueError(f"Recipe {self.name!r} must set both kl and kl_coef, or neither.")
        if self.value_target is not None and self.token_value_target is not None:
            raise ValueError(f"Recipe {self.name!r} has a turn critic and a token critic: the policy has one value head.")
        if (self.critic_target is None) != (self.value_coef == 0.0):
            raise ValueError(f"Recipe {self.name!r} must set both value_target and value_coef, or neither.")

    @property
    def critic_target(self) -> ValueTargetFn | SpreadFn | None:
        """What a critic of either kind learns; None where the policy needs no value head."""
        return self.value_target or self.token_value_target

    @property
    def critic_states(self) -> losses.States:
        """What the critic values the states before."""
        return "calls" if self.token_value_target is None else "tokens"


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
    loss=_clip,
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
        "reinforce_pp_baseline",
        "2501.03262",
        "rewards of tasks differ in scale: group mean, then one scale for the whole batch",
        advantage=functools.partial(advantages.group_norm, scale="none"),
        spread=advantages.reinforce_plus_plus_baseline,
        aggregation=losses.token_mean,
    ),
    _like(_LIGHTNINGRL, "opo", "2505.23585", "lengths differ much: the baseline of least variance", advantage=advantages.opo),
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

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*_CREDITS, *_ADVANTAGES, *_LOSSES)}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
      ValueError: there is none; the sentence lists those there are.
    """
    if name not in RECIPES:
        raise ValueError(f"There is no recipe {name!r}: choose one of {', '.join(sorted(RECIPES))}.")
    return RECIPES[name]


def describe(function: Callable) -> str:
    """A stage as one would call it: its name and the settings that `functools.partial` fixed."""
    if not isinstance(function, functools.partial):
        return function.__name__
    settings = ", ".join(f"{key}={value!r}" for key, value in function.keywords.items())
    return f"{describe(function.func)}({settings})"


def table_text() -> str:
    """All recipes, one paragraph each."""
    paragraphs = []
    for recipe in RECIPES.values():
        lines = {
            "use it when": recipe.use_when,
            "credit": describe(recipe.credit),
            "advantage": describe(recipe.advantage),
            "spread": describe(recipe.spread),
            "loss": describe(recipe.loss),
            **({"select": describe(recipe.select)} if recipe.select is not None else {}),
            "aggregation": describe(recipe.aggregation),
            "needs": ", ".join(recipe.needs) or "nothing but the rollouts",
        }
        if recipe.critic_target is not None:
            lines["critic"] = f"{recipe.value_coef} × {describe(recipe.value_loss)}, towards {describe(recipe.critic_target)}"
        body = "\n".join(textwrap.fill(text, 100, initial_indent=f"  {key:<13}", subsequent_indent=" " * 15) for key, text in lines.items())
        paragraphs.append(f"{recipe.name}  (arXiv {recipe.arxiv})\n{body}")
    return "\n\n".join(paragraphs)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` ends it without a traceback
    print(table_text())
