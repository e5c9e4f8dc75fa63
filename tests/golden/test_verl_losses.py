"""Our losses against verl's: every policy loss of its registry in every aggregation, in value and in gradient."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningrl import losses
from tests.golden.goldens import CLOSE, Goldens, make_inputs, make_rows

VERL = Goldens("verl")
DRAWN = VERL["inputs"]
HORIZON = DRAWN["action"].shape[1]  # verl's constant length of seq-mean-token-sum-norm, if none is given

AGGREGATIONS = {
    "token-mean": losses.token_mean,
    "token-sum": lambda *x: (losses.token_mean(*x)[0], 1.0),
    "seq-mean-token-mean": losses.sequence_mean,
    "seq-mean-token-sum": losses.sequence_sum,
    "seq-mean-token-sum-norm": functools.partial(losses.sequence_sum, length=HORIZON),
}
# Which settings of verl's are which of ours.
CLIP = lambda s: {"clip_low": s["clip_ratio_low"], "clip_high": s["clip_ratio_high"]}  # noqa: E731
TRUST = lambda s: {"limit_low": s["clip_ratio_low"], "limit_high": s["clip_ratio_high"], "max_ratio": s["clip_ratio_c"]}  # noqa: E731
COV = lambda s: {  # noqa: E731
    **CLIP(s),
    "fraction": s["policy_loss"]["clip_cov_ratio"],
    "cov_low": s["policy_loss"]["clip_cov_lb"],
    "cov_high": s["policy_loss"]["clip_cov_ub"],
}
LOSSES = {
    "vanilla": lambda s: functools.partial(losses.ppo_clip, **CLIP(s), dual_clip=s["clip_ratio_c"]),
    "dppo_tv": lambda s: functools.partial(losses.dppo_tv, **TRUST(s)),
    "dppo_kl": lambda s: functools.partial(losses.dppo_kl, **TRUST(s)),
    "gspo": lambda s: functools.partial(losses.gspo_token, **CLIP(s)),
    "sapo": lambda s: functools.partial(losses.sapo, **s),
    "gpg": lambda s: losses.gpg,
    "clip_cov": lambda s: functools.partial(losses.clip_cov, key=jax.random.key(0), **COV(s)),
    "kl_cov": lambda s: functools.partial(
        losses.kl_cov, fraction=s["policy_loss"]["kl_cov_ratio"], kl_coef=s["policy_loss"]["ppo_kl_coef"]
    ),
    "geo_mean": lambda s: functools.partial(losses.gmpo, **CLIP(s)),
    "dro": lambda s: functools.partial(losses.dro, beta=s["policy_loss"]["dro_beta"]),
    "cispo": lambda s: functools.partial(losses.cispo, lower=1 - s["clip_ratio_low"], upper=1 + s["clip_ratio_high"]),
}
ALWAYS = {"sapo": "seq-mean-token-mean", "geo_mean": "seq-mean-token-mean"}  # whatever aggregation is asked for


# At a log-ratio past ±20 we clamp, as verl's other losses do; these of verl's do not.
UNCLAMPED = ("clip_cov", "dro", "geo_mean", "gspo", "kl_cov")
FAR = ((0, 1), (0, 2), (4, 0), (4, 1))
# What ours cannot give, and why.
NOT_REPRODUCED = {
    "weighted/geo_mean": "verl weighs a sequence by the geometric mean of its tokens' truncated weights; no correction of ours has that",
}


def one_empty():
    mask = DRAWN["action"].copy()
    mask[5] = 0
    return mask


def rows_of(drawn=DRAWN, mask=None):
    return make_rows(DRAWN["action"] if mask is None else mask, DRAWN["group"], DRAWN["outcome"], logps=drawn, merged=True)


@functools.cache
def program(name: str, settings: str, weighted: bool):
    """Every aggregation of a loss and the gradients: compiled once for all cases of it."""
    loss_of = LOSSES[name](json.loads(settings))
    if weighted:
        loss_of = functools.partial(losses.corrected, loss=loss_of, correction=losses.token_truncation)

    def totals(logp, inputs):
        loss, keep, _ = loss_of(dataclasses.replace(inputs, logp=logp))
        pairs = [f(jnp.where(keep, loss, 0.0), inputs.tokens.mask, inputs.counts) for f in AGGREGATIONS.values()]
        values = jnp.stack([above / below for above, below in pairs])
        return values, values

    return jax.jit(jax.jacrev(totals, has_aux=True))


@functools.cache
def answers(kind: str, name: str, settings: str, advantage: str):
    """Every aggregation of a loss and its gradients, on the inputs of a kind of case."""
    drawn = VERL["inputs/far"] if kind == "far" else DRAWN
    rows = rows_of(drawn, one_empty() if kind == "empty_row" else None)
    inputs = make_inputs(rows, logp=drawn["logp"], advantage=drawn[advantage], drawn=drawn)
    gradients, values = program(name, settings, kind == "weighted")(inputs.logp, inputs)
    return np.asarray(values), np.asarray(gradients).reshape(-1, *rows.mask.shape)


def ours(case):
    """Our value and gradient under verl's settings of a case."""
    settings, (kind, name, *_) = dict(VERL.cases[case]), case.split("/")
    advantage, mode = settings.pop("advantage"), settings.pop("mode")
    values, gradients = answers(kind, name, json.dumps(settings), advantage)
    number = list(AGGREGATIONS).index(ALWAYS.get(name, mode))
    return values[number], gradients[number]


def check(case):
    value, gradient = ours(case)
    np.testing.assert_allclose(value, VERL[case]["loss"], **CLOSE)
    np.testing.assert_allclose(gradient, VERL[case]["gradient"], **CLOSE)
    return gradient


@pytest.mark.slow
@pytest.mark.parametrize("case", VERL.under("loss"))
def test_policy_losses(case):
    assert np.abs(check(case)).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in VERL.under("weighted") if case not in NOT_REPRODUCED])
def test_policy_losses_with_importance_weights(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in VERL.under("empty_row") if case != "empty_row/geo_mean"])
def test_policy_losses_with_a_row_without_actions(case):
    check(case)


def test_verls_gmpo_counts_a_row_without_actions():
    """On paper the mean is over the sequences there are, 9; verl divides by the rows, 10. Every other loss of verl's leaves the row out."""
    golden = VERL["empty_row/geo_mean"]
    value, gradient = ours("empty_row/geo_mean")
    np.testing.assert_allclose(value * np.float32(9 / 10), golden["loss"], **CLOSE)
    np.testing.assert_allclose(gradient * 9 / 10, golden["gradient"], **CLOSE)
    logs = (DRAWN["logp"] - DRAWN["old_logp"]).astype(np.float64)
    a, used = DRAWN["row_advantage"], one_empty() > 0
    clipped = np.where(a > 0, np.minimum(logs, 0.4), np.where(a < 0, np.maximum(logs, -0.3), 0.0))
    paper = [-a[i, 0] * np.exp(clipped[i][used[i]].mean()) for i in range(len(a)) if used[i].any()]
    assert len(paper) == 9
    np.testing.assert_allclose(value, np.mean(paper), **CLOSE)


@pytest.mark.parametrize("case", [case for case in VERL.under("far") if case.split("/")[1] not in UNCLAMPED])
def test_policy_losses_far_from_the_old_policy(case):
    check(case)


@pytest.mark.parametrize("name", UNCLAMPED)
def test_losses_that_verl_does_not_clamp(name):
    """Four log-ratios of ±25. verl's are those on paper, up to e²⁵; with ours such a token has no gradient through its ratio.

    Everything else is as in verl: all other tokens, and for the two losses of sequences all other rows.
    """
    far, golden = VERL["inputs/far"], VERL[f"far/{name}"]["gradient"]
    _, gradient = ours(f"far/{name}")
    others = np.ones(golden.shape, bool)
    for row, column in FAR:
        others[row, slice(None) if name in ("gspo", "geo_mean") else column] = False
    np.testing.assert_allclose(gradient[others], golden[others], **CLOSE)
    a, beta = far["token_advantage"], VERL.cases["far/dro"]["policy_loss"]["dro_beta"]
    if name == "dro":
        paper, clamped = [-a[at] + beta * (far["logp"] - far["old_logp"])[at] for at in FAR], [-a[at] for at in FAR]
        np.testing.assert_allclose([golden[at] for at in FAR], paper, rtol=1e-5)
        np.testing.assert_allclose([gradient[at] for at in FAR], clamped, rtol=1e-5)
    elif name in ("clip_cov", "kl_cov"):
        np.testing.assert_allclose(golden[0, 2], -a[0, 2] * np.exp(25.0), rtol=1e-5)
        assert all(gradient[at] == 0 for at in FAR)
    else:
        # GSPO's mean over 12 tokens has two log-ratios of 25 in it and GMPO's one, as it clips the other; ours has 20 for each.
        moved = gradient[0] != 0
        np.testing.assert_allclose(golden[0, moved], gradient[0, moved] * np.exp((10 if name == "gspo" else 5) / 12), rtol=1e-5)
        assert moved.any()


@pytest.mark.slow
def test_clip_covs_draw():
    """verl drew other tokens than our key would; given its draw, the loss is the same, and it is a draw that ours could have made."""
    case = "draw/clip_cov"
    settings = LOSSES["clip_cov"](VERL.cases[case]).keywords
    rows = rows_of()
    inputs = make_inputs(rows, logp=DRAWN["logp"], advantage=DRAWN["token_advantage"], drawn=DRAWN)
    limits = {name: x for name, x in settings.items() if name not in ("key", "fraction")}
    may = np.asarray(losses.clip_cov_selection(inputs, key=jax.random.key(0), fraction=1.0, **limits))
    drawn = may & (VERL[case]["gradient"].ravel() == 0)
    mine = np.asarray(losses.clip_cov_selection(inputs, key=jax.random.key(0), fraction=settings["fraction"], **limits))
    assert 1 < drawn.sum() == mine.sum() < may.sum() and not (mine & ~may).any()

    def total(logp):
        loss, keep, _ = losses.clip_cov(dataclasses.replace(inputs, logp=logp), selected=drawn, **limits)
        above, below = losses.token_mean(jnp.where(keep, loss, 0.0), inputs.tokens.mask, inputs.counts)
        return above / below

    value, gradient = jax.jit(jax.value_and_grad(total))(inputs.logp)
    np.testing.assert_allclose(value, VERL[case]["loss"], **CLOSE)
    np.testing.assert_allclose(rows.grid(gradient), VERL[case]["gradient"], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(AGGREGATIONS))
def test_aggregations(mode):
    """Also over rows cut into calls, where verl's mean over sequences is our mean over rollouts; and by micro-batches that add up."""
    golden = VERL[f"aggregation/{mode}"]
    for merged in (True, False):
        aggregate = losses.rollout_mean if mode == "seq-mean-token-mean" and not merged else AGGREGATIONS[mode]
        if mode.startswith("seq-mean-token-sum") and not merged:
            continue  # a sequence is a call there
        rows = make_rows(golden["mask"], DRAWN["group"], DRAWN["outcome"], merged=merged)
        inputs = make_inputs(rows, logp=DRAWN["logp"], advantage=DRAWN["token_advantage"], drawn=DRAWN)

        @jax.jit
        def parts_of(loss, mask, counts, aggregate=aggregate):
            return aggregate(loss, mask, counts)

        def total(loss, inputs=inputs):
            above, below = parts_of(loss, inputs.tokens.mask, inputs.counts)
            return above / below, below

        (value, whole), gradient = jax.value_and_grad(total, has_aux=True)(DRAWN["loss"].ravel())
        np.testing.assert_allclose(value, golden["loss"], **CLOSE)
        np.testing.assert_allclose(rows.grid(gradient), golden["gradient"], **CLOSE)
        edges = np.arange(len(inputs.tokens.mask)).reshape(rows.mask.shape)
        for part, chosen in zip(golden["parts"], (edges[:4].ravel(), edges[4:].ravel()), strict=True):
            counts = jax.tree.map(lambda x, chosen=chosen: x[chosen], inputs.counts)
            above, _ = parts_of(DRAWN["loss"].ravel()[chosen], inputs.tokens.mask[chosen], counts)
            np.testing.assert_allclose(above / whole, part, **CLOSE)


def test_aggregations_are_all_of_verls():
    assert {f"aggregation/{mode}" for mode in AGGREGATIONS} == set(VERL.under("aggregation"))
    assert {case.split("/")[-1] for case in VERL.under("loss")} == set(AGGREGATIONS)


def test_every_loss_is_compared():
    assert {case.split("/")[1] for case in VERL.under("loss")} == set(LOSSES) and len(LOSSES) == 11
    for start in ("weighted", "empty_row", "far"):
        assert {case.split("/")[1] for case in VERL.under(start)} == set(LOSSES)
    assert set(NOT_REPRODUCED) <= set(VERL.cases)
