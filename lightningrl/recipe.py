"""What an algorithm is: a credit, an advantage, a spread, a loss and an aggregation, put together."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from lightningrl import advantages, losses
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


@dataclasses.dataclass(frozen=True)
class Branches:
    """Rollouts are started anew in the middle, by replay, and what they come to is trained on as they are: a tree grows."""

    points: int  # calls of each rollout, drawn at random, before which it branches; fewer where it has fewer
    width: int  # branches at each

    def __post_init__(self) -> None:
        if self.points < 1 or self.width < 1:
            raise ValueError(f"{self} grows no tree: both numbers must be at least 1.")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One algorithm. The objective is aggregation(loss) + kl_coef · aggregation(kl) - entropy_coef · aggregation(entropy)
    + value_coef · value_aggregation(value_loss), each sum divided by its own denominator."""

    name: str
    arxiv: str  # ids, comma-separated; none where there is no paper there
    use_when: str
    credit: CreditFn
    advantage: AdvantageFn
    loss: LossFn
    aggregation: AggregationFn
    spread: SpreadFn = advantages.broadcast
    select: SelectFn | None = None  # bool of the edges' shape, for a loss of batch scope: without gradient, from the whole batch
    branches: Branches | None = None  # None: rollouts run from their start to their end and no more
    needs: tuple[str, ...] = ()  # fields of Evidence that must be filled
    evidence_settings: tuple[tuple[str, str], ...] = ()  # which way of making it, where `producers` knows several
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
        loss, settings = settings_of(self.loss)
        if loss is losses.corrected:
            correction, of_correction = settings_of(settings["correction"])
            if correction is losses.batch_normalised and of_correction["mean"] is None:
                raise ValueError(
                    f"Recipe {self.name!r} would normalise its weights over a micro-batch, since a loss never sees the whole batch: "
                    "give batch_normalised a mean, or use the correction without it."
                )
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


_OF_SEQUENCES = (losses.gspo, losses.gspo_token, losses.luspo, losses.gmpo, losses.vespo)


def with_correction(recipe: Recipe) -> Recipe:
    """The recipe with truncated importance sampling around its loss (`losses.correction`), for responses of another program's sampler.

    Weights are per token, or per sequence where the loss is of sequences. A recipe that has a correction, or the behaviour policy in
    its loss, stays as it is.
    """
    function, settings = settings_of(recipe.loss)
    if function is losses.opsm:  # its anchor is that of a test; the ratio is its inner loss's
        function, settings = settings_of(settings["loss"])
    if function in (losses.corrected, losses.decoupled_ppo) or settings.get("anchor") == "behaviour":
        return recipe
    correction = losses.sequence_truncation if function in _OF_SEQUENCES else losses.token_truncation
    return dataclasses.replace(recipe, loss=functools.partial(losses.corrected, loss=recipe.loss, correction=correction))


def settings_of(stage: Callable) -> tuple[Callable, dict[str, Any]]:
    """The function that a stage is, and its settings: those that `functools.partial` fixed, and else its defaults."""
    settings: dict[str, Any] = {}
    while isinstance(stage, functools.partial):
        settings, stage = stage.keywords | settings, stage.func
    parameters = inspect.signature(stage).parameters.values()
    return stage, {p.name: p.default for p in parameters if p.default is not p.empty} | settings


def describe(function: Callable) -> str:
    """A stage as one would call it: its name and the settings that `functools.partial` fixed."""
    if not isinstance(function, functools.partial):
        return function.__name__
    settings = ", ".join(f"{key}={value!r}" for key, value in function.keywords.items())
    return f"{describe(function.func)}({settings})"


def paragraph(recipe: Recipe) -> str:
    """A recipe for a terminal of 100 columns."""
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
    if recipe.branches is not None:
        lines["needs"] = f"branches at {recipe.branches.points} of a rollout's calls, {recipe.branches.width} at each"
    if recipe.critic_target is not None:
        lines["critic"] = f"{recipe.value_coef} × {describe(recipe.value_loss)}, towards {describe(recipe.critic_target)}"
    body = "\n".join(textwrap.fill(text, 100, initial_indent=f"  {key:<13}", subsequent_indent=" " * 15) for key, text in lines.items())
    return recipe.name + (f"  (arXiv {recipe.arxiv})" if recipe.arxiv else "") + f"\n{body}"
