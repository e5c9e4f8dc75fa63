"""An array of a wrong shape is refused by chex before anything is computed, and not broadcast to [N, N].

Every array that a function reads is given an axis too many, one after the other. What a function doesn't read may have any shape:
that is so where the function does without it.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningrl import advantages, credit, losses
from lightningrl.normalize import group_normalize
from lightningrl.table import Credit
from tests.batches import make_evidence, make_inputs, make_rollout, make_table, make_tokens

pytestmark = pytest.mark.slow  # every function is traced once for each of its arrays

TABLE = make_table(
    make_rollout("a", 1.0, [0.0, 0.5], lengths=[2, 1]), make_rollout("a", 0.0, [0.25], lengths=[3]), make_rollout("b", 0.5), size=6
)
TOKENS = make_tokens(TABLE, 9)
INPUTS = make_inputs(TABLE, TOKENS)
EVIDENCE = make_evidence(TABLE, TOKENS)
RETURN = Credit(value=np.ones(6, np.float32), kind="return")
ADVANTAGE = np.ones(6, np.float32)
KEY = jax.random.key(0)

Case = tuple[Callable[..., Any], tuple[Any, ...]]


def functions(module: types.ModuleType, *, without: set[str]) -> dict[str, Callable[..., Any]]:
    found = {name: getattr(module, name) for name in module.__all__ if name not in without}
    return {name: function for name, function in found.items() if isinstance(function, types.FunctionType)}


OF_CREDIT = {"accepted", "gdpo", "gpg", "group_norm", "leave_one_out", "maxrl", "opo", "pass_at_k", "remax", "role_baseline"}
OF_CREDIT |= {"unchanged", "whiten"}
OTHER_ADVANTAGES = {"preset", "require_return", "rae_update", "statistics_weights", "whiten_tokens"}
AGGREGATIONS = {"group_mean", "rollout_mean", "sequence_mean", "sequence_sum", "token_mean"}
CORRECTIONS = {"batch_normalised", "corrected", "geometric", "rejection", "sequence_masking", "sequence_truncation", "token_masking"}
OTHER_LOSSES = {"count_units", "metric_means", "value_states", "token_truncation"} | AGGREGATIONS | CORRECTIONS
SETTINGS: dict[str, dict[str, Any]] = {"clip_cov": {"key": KEY}, "clip_cov_selection": {"key": KEY}, "dro": {"beta": 1.0}}
SETTINGS["opsm"] = {"threshold": 0.1}

CASES: dict[str, Case] = {
    **{
        f"credit.{name}": (f, (TABLE, EVIDENCE))
        for name, f in functions(credit, without={"node_values", "state_values", "turn_rewards"}).items()
    },
    **{f"credit.{name}": (getattr(credit, name), (TABLE,)) for name in ("node_values", "state_values", "turn_rewards")},
    "credit.identical with intermediate": (functools.partial(credit.identical, include_intermediate=True), (TABLE, EVIDENCE)),
    "credit.hgpo as its code": (functools.partial(credit.hgpo, levels="code"), (TABLE, EVIDENCE)),
    "credit.shapley_sampled": (functools.partial(credit.shapley_sampled, key=KEY, permutations=2), (TABLE, EVIDENCE)),
    **{
        f"advantages.{name}": (f, (TABLE, RETURN, EVIDENCE) if name in OF_CREDIT else (TABLE, TOKENS, ADVANTAGE, EVIDENCE))
        for name, f in functions(advantages, without=OTHER_ADVANTAGES).items()
    },
    "advantages.whiten without a shift": (functools.partial(advantages.whiten, shift_mean=False), (TABLE, RETURN, EVIDENCE)),
    "advantages.rae_update": (lambda b, table: advantages.rae_update(b, table, 0.5), (jnp.zeros(1), TABLE)),
    "advantages.statistics_weights": (lambda table: advantages.statistics_weights(table, "rollouts"), (TABLE,)),
    "advantages.whiten_tokens": (advantages.whiten_tokens, (TOKENS.old_logp, TOKENS.mask)),
    **{
        f"losses.{name}": (functools.partial(f, **SETTINGS.get(name, {})), (INPUTS,))
        for name, f in functions(losses, without=OTHER_LOSSES).items()
    },
    **{f"losses.{name}": (getattr(losses, name), (INPUTS.logp, TOKENS.mask, INPUTS.counts)) for name in sorted(AGGREGATIONS)},
    "losses.count_units": (losses.count_units, (TABLE, TOKENS)),
    "losses.value_states": (lambda tokens: losses.value_states(tokens, "calls"), (TOKENS,)),
    "group_normalize": (group_normalize, (ADVANTAGE, TABLE.group, TABLE.weight)),
}


def arrays(x: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all arrays of nested records."""
    if isinstance(x, tuple):
        return [p for i, part in enumerate(x) for p in arrays(part, (*path, i))]
    if dataclasses.is_dataclass(x):
        return [p for field in dataclasses.fields(x) for p in arrays(getattr(x, field.name), (*path, field.name))]
    return [path] if isinstance(x, (np.ndarray, jax.Array)) else []


def replaced(x: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    if not path:
        return change(x)
    if isinstance(x, tuple):
        return (*x[: path[0]], replaced(x[path[0]], path[1:], change), *x[path[0] + 1 :])
    return dataclasses.replace(x, **{path[0]: replaced(getattr(x, path[0]), path[1:], change)})


def read(function: Callable[..., Any], given: tuple[Any, ...], paths: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Those arrays that the function cannot do without, by halves, for most are not read."""
    without = functools.reduce(lambda x, path: replaced(x, path, lambda _: None), paths, given)
    try:
        jax.eval_shape(function, *without)
    except Exception:  # noqa: BLE001 - whatever a missing array leads to
        half = len(paths) // 2
        return paths if len(paths) == 1 else read(function, given, paths[:half]) + read(function, given, paths[half:])
    return []


@pytest.mark.filterwarnings("ignore:shape requires ndarray")  # of the None in an array's place
@pytest.mark.parametrize("name", sorted(CASES))
def test_a_wrong_shape_is_refused(name):
    function, given = CASES[name]
    jax.eval_shape(function, *given)
    paths = read(function, given, arrays(given))
    assert paths
    for path in paths:
        with pytest.raises(AssertionError):
            jax.eval_shape(function, *replaced(given, path, lambda x: x[:, None]))


def test_a_wrong_shape_of_what_need_not_be_given_is_refused():
    """Optional arrays, which the test above takes for arrays that are not read."""
    flags, wide = TOKENS.mask[:, None], np.ones((6, 1), np.float32)
    few = dataclasses.replace(EVIDENCE, branch_count=EVIDENCE.branch_count[:, :1])
    for call in (
        lambda: losses.clip_cov(INPUTS, selected=flags),
        lambda: losses.kl_cov(INPUTS, selected=flags),
        lambda: losses.m2po(INPUTS, selected=flags),
        lambda: advantages.rae_update(np.zeros(1, np.float32), TABLE, 0.5, values=wide),
        lambda: advantages.v_trace(TABLE, TOKENS, ADVANTAGE, EVIDENCE, rho=np.ones((9, 1), np.float32)),
        lambda: advantages.optimal_token_baseline(TABLE, TOKENS, ADVANTAGE, EVIDENCE, rho=np.ones((9, 1), np.float32)),
        lambda: credit.shapley_sampled(TABLE, EVIDENCE, marginals=np.ones((2, 6, 1), np.float32)),
        lambda: credit.vineppo(TABLE, few),
        lambda: group_normalize(ADVANTAGE, TABLE.group, TABLE.weight, units=TABLE.rollout[:, None]),
    ):
        with pytest.raises(AssertionError):
            jax.eval_shape(call)
