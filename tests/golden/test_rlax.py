"""Our returns and V-trace against rlax's, over tokens and over turns."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from lightningrl import advantages, credit
from lightningrl.table import Evidence
from tests.golden.goldens import CLOSE, Goldens, make_rows, turns_of

RLAX = Goldens("rlax")
DRAWN = RLAX["inputs"]
ROWS = make_rows(DRAWN["action"], DRAWN["group"], DRAWN["outcome"], turn_reward=DRAWN["turn_reward"], logps=DRAWN)
STARTS = [(i, run[0]) for i, row in enumerate(turns_of(DRAWN["action"])) for run in row]
PADDING = np.zeros(len(ROWS.table.valid) - len(STARTS), np.float32)
TURN_VALUE = np.array([DRAWN["value"][at] for at in STARTS], np.float32)  # a turn's value is that at its first token
EVIDENCE = Evidence(token_value=DRAWN["value"].ravel(), value=np.concatenate([TURN_VALUE, PADDING]))


def settings_of(case):
    """rlax's settings as ours."""
    settings = dict(RLAX.cases[case])
    rho, pg_rho = settings.pop("clip_rho_threshold", None), settings.pop("clip_pg_rho_threshold", None)
    clips = {} if rho is None else {"clip_rho": rho, "clip_c": 1.0, "clip_pg_rho": pg_rho}
    return settings | clips


def over_tokens(function, **settings):
    return ROWS.grid(jax.jit(functools.partial(function, **settings))(ROWS.table, ROWS.tokens, None, EVIDENCE))


def v_trace_errors(settings):
    settings = {name: x for name, x in settings.items() if name != "clip_pg_rho"}
    return np.where(ROWS.mask, over_tokens(advantages.v_trace_target, **settings) - DRAWN["value"], 0.0)


TOKENS = {
    "token/lambda_returns": lambda s: {"returns": over_tokens(advantages.token_lambda_return, **s)},
    "token/discounted_returns": lambda s: {"returns": over_tokens(advantages.token_lambda_return, gamma=s["gamma"], lambda_=1.0)},
    "token/truncated_generalized_advantage_estimation": lambda s: {"advantages": over_tokens(advantages.token_gae, **s)},
    "token/vtrace": lambda s: {"errors": v_trace_errors(s)},
    "token/vtrace_td_error_and_advantage": lambda s: {"errors": v_trace_errors(s), "advantages": over_tokens(advantages.v_trace, **s)},
}
TURNS = {
    "turn/lambda_returns": lambda s: {"returns": credit.gae_value_target(ROWS.table, EVIDENCE, **s)},
    "turn/discounted_returns": lambda s: {"returns": credit.reward_to_go(ROWS.table, EVIDENCE, gamma=s["gamma"]).value},
    "turn/truncated_generalized_advantage_estimation": lambda s: {"advantages": credit.gae(ROWS.table, EVIDENCE, **s).value},
}
MASKED = {"masked/next": TOKENS["token/vtrace_td_error_and_advantage"]}


@pytest.mark.slow
@pytest.mark.parametrize("case", [*TOKENS, *TURNS, *MASKED])
def test_returns_and_v_trace(case):
    """`masked` is rlax under its sample mask: observations are carried across in both."""
    ours = (TOKENS | TURNS | MASKED)[case](settings_of(case))
    assert ours.keys() == RLAX[case].keys()
    for what, golden in RLAX[case].items():
        compared = ours[what][: len(STARTS)] if case in TURNS else ours[what]
        np.testing.assert_allclose(compared, golden, **CLOSE)


def test_rlax_bootstraps_from_the_place_beside_it_also_where_that_is_masked():
    """V-trace's advantage of an action before an observation: on paper it looks to the next action, as ours does whatever stands between.

    rlax does not say that the values handed in at masked places must be those of the next action. With the critic's own values
    there (`masked/own`) its errors are right, and its advantages wrong before every observation, and nowhere else.
    """
    own, right = RLAX["masked/own"], RLAX["masked/next"]
    np.testing.assert_allclose(own["errors"], right["errors"], **CLOSE)
    action = DRAWN["action"] > 0
    later = np.flip(np.cumsum(np.flip(action, 1), 1), 1) - action > 0
    beside = np.concatenate([~action[:, 1:], np.zeros_like(action[:, :1])], axis=1)
    wrong = action & ~np.isclose(own["advantages"], right["advantages"], **CLOSE)
    np.testing.assert_array_equal(wrong & later, action & beside & later)
    np.testing.assert_allclose(over_tokens(advantages.v_trace, **settings_of("masked/own")), right["advantages"], **CLOSE)


def test_every_recorded_method_is_compared():
    assert {"inputs", "masked/own", *TOKENS, *TURNS, *MASKED} == set(RLAX.cases)
