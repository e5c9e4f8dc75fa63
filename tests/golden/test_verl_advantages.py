"""Our advantages against verl's, for every estimator of its registry."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from lightningrl import advantages, credit
from lightningrl.table import Evidence
from tests.golden.goldens import CLOSE, Goldens, make_rows

VERL = Goldens("verl")
DRAWN = VERL["inputs"]
REWARDS = VERL["inputs/rewards"]
NOTHING = Evidence()

# verl's whitening adds 1e-8 to the variance, which is under the tolerance here; ours adds an epsilon to its root.
GROUP = functools.partial(advantages.group_norm, **advantages.preset("verl"))
CENTRED = functools.partial(GROUP, scale="none")
GDPO = functools.partial(advantages.gdpo, singleton="raw", degenerate="formula", batch_count="tokens", batch_eps=0.0)
BASELINE = functools.partial(advantages.reinforce_plus_plus_baseline, eps=0.0, degenerate="formula")

# The estimators of whole rollouts: what we call, and how it is spread over tokens.
OF_ROLLOUTS = {
    "grpo": (GROUP, advantages.broadcast),
    "grpo/no_std": (CENTRED, advantages.broadcast),
    "grpo_vectorized": (GROUP, advantages.broadcast),
    "grpo_vectorized/no_std": (CENTRED, advantages.broadcast),
    "grpo_passk": (functools.partial(advantages.pass_at_k, eps=1e-6), advantages.broadcast),
    "grpo_passk/no_std": (functools.partial(advantages.pass_at_k, scale="none"), advantages.broadcast),
    "rloo": (functools.partial(advantages.leave_one_out, singleton="raw"), advantages.broadcast),
    "rloo_vectorized": (advantages.leave_one_out, advantages.broadcast),
    "reinforce_plus_plus_baseline": (CENTRED, BASELINE),
    "gdpo": (GDPO, advantages.broadcast),
    "gdpo/two_rewards": (functools.partial(GDPO, weights=(1.0, 0.5)), advantages.broadcast),
    "remax": (advantages.remax, advantages.broadcast),
    "opo": (advantages.opo, advantages.broadcast),
    "gpg": (functools.partial(advantages.gpg, informative="nonzero"), advantages.broadcast),
}
SINGLETON = np.flatnonzero(DRAWN["group"] == "t3")


def rows_of(mask, **settings):
    several = len(mask) < len(DRAWN["group"])  # pass@k refuses groups of one
    keep = DRAWN["group"] != "t3" if several else np.ones(len(mask), bool)
    return make_rows(mask, DRAWN["group"][keep], DRAWN["outcome"][keep], logps=DRAWN, **settings)


def on_actions(golden, what="advantages"):
    """verl leaves numbers at observations and padding, which no loss reads."""
    return np.where(golden["mask"] > 0, golden[what], 0.0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def of_rollouts(advantage, spread, table, tokens, evidence):
    return spread(table, tokens, advantage(table, credit.identical(table, evidence), evidence), evidence)


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True], ids=["calls", "one_call"])
@pytest.mark.parametrize("name", list(OF_ROLLOUTS))
def test_estimators_of_rollouts(name, merged):
    """Rows cut into calls at their observations, or not: rollouts are counted, so it is the same."""
    golden = VERL[f"advantage/{name}"]
    rows = rows_of(golden["mask"], merged=merged)
    table = rows.table
    if name == "gdpo/two_rewards":
        table = dataclasses.replace(table, outcome=np.stack([table.outcome[:, 0], REWARDS["format"][rows.row]], axis=1))
    advantage, spread = OF_ROLLOUTS[name]
    ours = rows.grid(of_rollouts(advantage, spread, table, rows.tokens, Evidence(greedy_reward=REWARDS["greedy"][rows.row])))
    compared = np.ones(len(ours), bool)
    if name in ("opo", "gpg"):
        compared[SINGLETON] = False  # below
    np.testing.assert_allclose(ours[compared], on_actions(golden)[compared], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("case", VERL.under("small"))
def test_epsilons(case):
    """Rewards that differ by a thousandth: another epsilon would show in the third digit."""
    golden = VERL[case]
    rows = make_rows(np.ones((6, 1)), golden["group"], golden["outcome"])
    function, spread = OF_ROLLOUTS[case.split("/")[1]]
    np.testing.assert_allclose(rows.grid(of_rollouts(function, spread, rows.table, rows.tokens, NOTHING)), golden["advantages"], **CLOSE)


def turn_rewards(golden):
    """What was paid at the end of each run of actions, without the outcome that verl adds to the last."""
    rewards = golden["rewards"].copy()
    for i, row in enumerate(golden["mask"] > 0):
        rewards[i, np.flatnonzero(row)[-1]] -= DRAWN["outcome"][i]
    return rewards


@pytest.mark.slow
def test_token_gae():
    golden, settings = VERL["advantage/gae"], VERL.cases["advantage/gae"]
    rows = rows_of(golden["mask"], turn_reward=turn_rewards(golden))
    evidence = Evidence(token_value=DRAWN["value"].ravel())

    @jax.jit
    def run(table, tokens, evidence):
        plain = advantages.token_gae(table, tokens, None, evidence, **settings)
        target = advantages.token_lambda_return(table, tokens, None, evidence, **settings)
        return advantages.whiten_tokens(plain, tokens.mask, eps=0.0), target

    whitened, target = run(rows.table, rows.tokens, evidence)
    np.testing.assert_allclose(rows.grid(whitened), on_actions(golden), **CLOSE)
    np.testing.assert_allclose(rows.grid(target), on_actions(golden, "returns"), **CLOSE)


def test_reinforce_plus_plus():
    golden, settings = VERL["advantage/reinforce_plus_plus"], VERL.cases["advantage/reinforce_plus_plus"]
    rows = rows_of(golden["mask"], turn_reward=turn_rewards(golden))
    run = jax.jit(functools.partial(advantages.reinforce_plus_plus, eps=0.0, **settings))
    np.testing.assert_allclose(rows.grid(run(rows.table, rows.tokens, None, NOTHING)), on_actions(golden), **CLOSE)


BASELINES = {
    "optimal_token_baseline": advantages.optimal_token_baseline,
    "tir_optimal_token_baseline": advantages.multi_turn_optimal_token_baseline,
}


def token_baseline(case):
    golden, settings = VERL[f"advantage/{case}"], dict(VERL.cases[f"advantage/{case}"])
    rows = rows_of(golden["mask"])
    if settings.pop("rho", False):
        settings["rho"] = np.minimum(np.exp(DRAWN["old_logp"] - DRAWN["behaviour_logp"]), 2.0).ravel()
    run = jax.jit(functools.partial(BASELINES[case.split("/")[0]], singleton="raw", **settings))
    return golden, rows.grid(run(rows.table, rows.tokens, None, Evidence(sum_pi2=DRAWN["sum_pi2"].ravel())))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["", "/zero_tail", "/weighted"])
@pytest.mark.parametrize("name", list(BASELINES))
def test_optimal_token_baselines(name, variant):
    """The first on rows without observations, for one call a rollout; the second on all."""
    golden, ours = token_baseline(name + variant)
    np.testing.assert_allclose(ours, on_actions(golden), **CLOSE)


def test_verls_optimal_token_baseline_takes_columns_for_positions():
    """On rows with observations it compares tokens by column, but cuts the longest row's tail by its number of actions.

    On paper a token without another rollout's token beside it has none to be compared with, and all others have. verl's row 0 of
    12 actions has its baseline from column 8 on (8 are the actions of the next longest row), and row 8 still has an action in column 8.
    Both of ours count positions in actions, within the call or over the rollout (`tir_`, equal to verl's above).
    """
    case = "optimal_token_baseline/observations"
    golden, ours = token_baseline(case)
    weight = np.cumsum(golden["mask"] * (1 - 2 * np.exp(DRAWN["old_logp"]) + DRAWN["sum_pi2"]), axis=1, dtype=np.float64)
    group = DRAWN["group"] == "t1"
    actions = golden["mask"][group] * weight[group]
    baseline = (DRAWN["outcome"][group, None] * actions).sum(axis=0) / actions.sum(axis=0)
    assert golden["mask"][8, 8] == 1 and golden["mask"][0].all()
    paper = DRAWN["outcome"][0] - baseline[:9]
    np.testing.assert_allclose(golden["advantages"][0, :8], paper[:8], **CLOSE)
    assert golden["advantages"][0, 8] == DRAWN["outcome"][0] != pytest.approx(paper[8])
    # Ours, in (turn, k): row 0 is one call of 12 tokens, and its first 6 stand beside the others' first calls.
    assert (ours[0, 6:] == DRAWN["outcome"][0]).all() and (ours[0, 1:6] != DRAWN["outcome"][0]).all()


@pytest.mark.parametrize(("name", "factor"), [("opo", 1.0), ("gpg", 10 / 8)])
def test_verl_keeps_the_raw_reward_of_a_group_of_one(name, factor):
    """On paper the only rollout of a task is its own baseline, so that its advantage is 0; ours is."""
    golden = VERL[f"advantage/{name}"]
    rows = rows_of(golden["mask"])
    advantage, spread = OF_ROLLOUTS[name]
    ours = rows.grid(of_rollouts(advantage, spread, rows.table, rows.tokens, NOTHING))
    actions = golden["mask"][SINGLETON] > 0
    assert (ours[SINGLETON] == 0).all()
    np.testing.assert_allclose(golden["advantages"][SINGLETON][actions], factor * DRAWN["outcome"][SINGLETON[0]], rtol=1e-6)


def test_verls_gpg_counts_rewards_that_are_not_zero():
    """α is to make up for groups without a signal: 10 rollouts, of which 6 are in groups that differ; verl takes the 8 that are not 0."""
    rows = rows_of(VERL["advantage/gpg"]["mask"])
    ours, verls = (
        rows.grid(of_rollouts(function, advantages.broadcast, rows.table, rows.tokens, NOTHING))
        for function in (advantages.gpg, OF_ROLLOUTS["gpg"][0])
    )
    np.testing.assert_allclose(ours[:2] / 10 * 6, verls[:2] / 10 * 8, **CLOSE)
    assert (ours[1] == 0).all()


def test_singletons_of_the_default_are_zero_and_verls_are_raw():
    for name in ("grpo", "grpo_vectorized", "rloo", "gdpo", "reinforce_plus_plus_baseline"):
        assert VERL[f"advantage/{name}"]["advantages"][SINGLETON].any(), name
    assert not VERL["advantage/rloo_vectorized"]["advantages"][SINGLETON].any()
    rows = rows_of(VERL["advantage/grpo"]["mask"])
    for function in (advantages.group_norm, advantages.leave_one_out):
        assert not rows.grid(of_rollouts(function, advantages.broadcast, rows.table, rows.tokens, NOTHING))[SINGLETON].any()


@pytest.mark.slow
@pytest.mark.parametrize("case", VERL.under("hazard/constant"))
def test_seven_rewards_of_a_tenth_have_no_advantage(case):
    """0.1 less the mean of seven 0.1 is not 0 in float32; on paper it is, and with ours, which compares."""
    name = case.split("/")[-1]
    largest = np.abs(VERL[case]["advantages"]).max()
    assert (0.001 < largest < 0.1) if name.startswith("grpo") else largest < 1e-4  # the standard deviation is rounding as well
    rows = make_rows(np.ones((7, 1)), ["t"] * 7, np.full(7, 0.1))
    function, spread = {
        "grpo": (advantages.group_norm, advantages.broadcast),
        "gdpo": (advantages.gdpo, advantages.broadcast),
        "rloo": (advantages.leave_one_out, advantages.broadcast),
        "reinforce_plus_plus_baseline": (functools.partial(advantages.group_norm, scale="none"), advantages.reinforce_plus_plus_baseline),
        "opo": (advantages.opo, advantages.broadcast),
        "gpg": (advantages.gpg, advantages.broadcast),
    }[name.removesuffix("_vectorized")]
    assert (rows.grid(of_rollouts(function, spread, rows.table, rows.tokens, NOTHING)) == 0).all()


LATE = ("gae", "reinforce_plus_plus", "remax")


@pytest.mark.slow
@pytest.mark.parametrize("name", LATE)
def test_verl_loses_a_reward_that_is_paid_at_an_observation(name):
    """A rollout that ends with a tool's answer, and its outcome of 1 there. On paper the last action earned it, and so it is with ours."""
    golden, settings = VERL[f"hazard/late_reward/{name}"], VERL.cases[f"hazard/late_reward/{name}"]
    gamma, decay = settings["gamma"], settings["gamma"] * settings["lambda_"]
    mask = golden["mask"] > 0
    rows = make_rows(mask, ["a", "b"], [1.0, 0.0])
    evidence = Evidence(token_value=golden["value"].ravel(), greedy_reward=np.zeros_like(rows.table.weight))
    paper = np.zeros(mask.shape)
    for i, outcome in enumerate((1.0, 0.0)):
        carried, following = 0.0, 0.0
        for n, k in enumerate(np.flatnonzero(mask[i])[::-1]):
            reward, value = (outcome if n == 0 else 0.0), float(golden["value"][i, k])
            if name == "gae":
                paper[i, k] = carried = reward + gamma * following - value + decay * carried
                following = value
            elif name == "reinforce_plus_plus":
                paper[i, k] = carried = reward + gamma * carried
            else:
                paper[i, k] = outcome
    if name == "gae":
        ours = jax.jit(functools.partial(advantages.token_gae, **settings))(rows.table, rows.tokens, None, evidence)
        assert golden["returns"][0, 2] == 0.0  # verl's critic learns that the state before the last action is worth nothing
    elif name == "reinforce_plus_plus":
        run = jax.jit(functools.partial(advantages.reinforce_plus_plus, gamma=gamma, eps=0.0))
        ours = run(rows.table, rows.tokens, None, evidence)
        paper[mask] = (paper[mask] - paper[mask].mean()) / paper[mask].std(ddof=1)
        assert not golden["returns"].any()
    else:
        ours = of_rollouts(advantages.remax, advantages.broadcast, rows.table, rows.tokens, evidence)
        assert not golden["advantages"].any()
    np.testing.assert_allclose(rows.grid(ours), paper, **CLOSE)


def test_every_recorded_estimator_is_compared():
    compared = {f"advantage/{name}" for name in OF_ROLLOUTS} | {"advantage/gae", "advantage/reinforce_plus_plus"}
    compared |= {f"advantage/{name}{variant}" for name in BASELINES for variant in ("", "/zero_tail", "/weighted")}
    compared |= {"advantage/optimal_token_baseline/observations"}
    assert compared == set(VERL.under("advantage"))
    assert set(VERL.under("hazard")) == {f"hazard/late_reward/{name}" for name in LATE} | set(VERL.under("hazard/constant"))
    assert len({case.split("/")[1] for case in compared}) == 14
