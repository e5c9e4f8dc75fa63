"""Our KL terms, critic's loss, importance weights and rejections against verl's."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningrl import losses
from tests.golden.goldens import CLOSE, Goldens, make_inputs, make_rows

VERL = Goldens("verl")
DRAWN = VERL["inputs"]
ROWS = make_rows(DRAWN["action"], DRAWN["group"], DRAWN["outcome"], logps=DRAWN, merged=True)
INPUTS = make_inputs(ROWS, logp=DRAWN["logp"], advantage=DRAWN["token_advantage"], drawn=DRAWN)
KL = {"k1": losses.k1, "k2": losses.k2, "k3": losses.k3, "k3+": losses.k3_plus}
CORRECTIONS = {
    "token/truncated": functools.partial(losses.token_truncation, cap=1.2),
    "token/masked": functools.partial(losses.token_masking, low=0.7, high=1.3),
    "sequence/truncated": functools.partial(losses.sequence_truncation, cap=1.2),
    "sequence/masked": functools.partial(losses.sequence_masking, low=0.7, high=1.3),
}


@pytest.mark.parametrize("name", list(KL))
def test_kl_terms(name):
    golden = VERL[f"kl/{name}"]

    def total(logp):
        values = KL[name](dataclasses.replace(INPUTS, logp=logp))
        return jnp.sum(values * DRAWN["loss"].ravel()), values

    gradient, values = jax.jit(jax.grad(total, has_aux=True))(INPUTS.logp)
    np.testing.assert_allclose(ROWS.grid(values), golden["values"], **CLOSE)
    np.testing.assert_allclose(ROWS.grid(gradient), golden["gradient"], **CLOSE)


def test_value_loss():
    """verl's critic has a value for every token; ours one for every call, so here each token is a call's first."""
    inputs = dataclasses.replace(INPUTS, tokens=dataclasses.replace(INPUTS.tokens, k=np.zeros_like(INPUTS.tokens.k)))

    def total(value):
        loss, keep, _ = losses.value_loss(dataclasses.replace(inputs, value=value), **VERL.cases["value_loss"])
        above, below = losses.token_mean(loss, keep, inputs.counts)
        return above / below

    value, gradient = jax.jit(jax.value_and_grad(total))(inputs.value)
    np.testing.assert_allclose(value, VERL["value_loss"]["loss"], **CLOSE)
    np.testing.assert_allclose(ROWS.grid(gradient), VERL["value_loss"]["gradient"], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("normalised", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("name", list(CORRECTIONS))
def test_importance_weights(name, normalised):
    correction = CORRECTIONS[name]
    if normalised:
        mean = losses.sequence_mean if name.startswith("sequence") else losses.token_mean
        correction = functools.partial(losses.batch_normalised, correction=correction, aggregation=mean)
    weight, keep = jax.jit(correction)(INPUTS)
    golden = VERL[f"correction/{name}" + ("/normalised" if normalised else "")]["weights"]
    np.testing.assert_allclose(ROWS.grid(weight), golden, **CLOSE)
    np.testing.assert_array_equal(ROWS.grid(keep), golden > 0)


@pytest.mark.slow
@pytest.mark.parametrize("case", VERL.under("rejection"))
def test_rejections(case):
    """verl's k1 bounds the ratio the other way round, and its sequences are named `seq`."""
    golden, settings = VERL[case]["mask"] > 0, VERL.cases[case]
    limits = {"high": float(settings["limit"].split("_")[-1])}
    if settings["estimator"] == "k1":
        low, high = (float(x) for x in settings["limit"].split("_"))
        limits = {"low": 1 / high, "high": 1 / low}
    level = settings["level"].replace("seq", "sequence")
    weight, keep = jax.jit(functools.partial(losses.rejection, estimator=settings["estimator"], level=level, **limits))(INPUTS)
    np.testing.assert_array_equal(ROWS.grid(keep), golden)
    np.testing.assert_array_equal(ROWS.grid(weight), golden.astype(np.float32))
    assert 0 < golden.sum() < ROWS.mask.sum()


def test_all_terms_are_compared():
    assert set(VERL.under("kl")) == {f"kl/{name}" for name in KL}
    assert set(VERL.under("correction")) == {f"correction/{name}{end}" for name in CORRECTIONS for end in ("", "/normalised")}
    assert len(VERL.under("rejection")) == 11
