"""Our advantages, losses and corrections against TRL's GRPO, RLOO and GMPO trainers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningrl import advantages, credit, losses
from lightningrl.table import Credit, Evidence
from tests.golden.goldens import CLOSE, Goldens, make_inputs, make_rows

TRL = Goldens("trl")
DRAWN = TRL["inputs"]
NOTHING = Evidence()
ROWS = make_rows(DRAWN["action"], DRAWN["group"], DRAWN["outcome"], logps=DRAWN, merged=True)

# What ours cannot give, and why.
NOT_REPRODUCED = {
    "advantage/grpo/batch": "reward less the group's mean, over the raw rewards' deviation in the batch: no function of ours has that",
}


def clip(s):
    return {"clip_low": s["epsilon"], "clip_high": s["epsilon_high"]}


def ppo(s):
    return functools.partial(losses.ppo_clip, **clip(s), dual_clip=s.get("delta"))


def gspo(s):
    return functools.partial(losses.gspo, **clip(s))


def sapo(s):
    return functools.partial(losses.sapo, tau_pos=s["sapo_temperature_pos"], tau_neg=s["sapo_temperature_neg"])


def vespo(s, anchor="old"):
    return functools.partial(
        losses.vespo, **{name.removeprefix("vespo_"): x for name, x in s.items() if name != "loss_type"}, anchor=anchor
    )


def of_length(length):
    return functools.partial(losses.sequence_sum, length=length)


# The loss, how it is aggregated, and the KL term.
LOSSES = {
    "grpo": lambda s: (ppo(s), losses.sequence_mean, None),
    "bnpo": lambda s: (ppo(s), losses.token_mean, None),
    "dr_grpo": lambda s: (ppo(s), of_length(s["max_completion_length"]), None),
    "dapo": lambda s: (ppo(s), losses.token_mean, None),
    "luspo": lambda s: (functools.partial(losses.luspo, **clip(s)), losses.sequence_mean, None),
    "cispo": lambda s: (functools.partial(losses.cispo, lower=0.0, upper=s["epsilon_high"]), losses.token_mean, None),
    "sapo": lambda s: (sapo(s), losses.sequence_mean, None),
    "vespo": lambda s: (vespo(s), losses.token_mean, None),
    "grpo/sequence": lambda s: (gspo(s), losses.sequence_mean, None),
    "grpo/delta": lambda s: (ppo(s), losses.sequence_mean, None),
    "dapo/kl": lambda s: (ppo(s), losses.token_mean, losses.k3),
    "dapo/kl_unbiased": lambda s: (ppo(s), losses.token_mean, losses.k3_unbiased),
    "dapo/off_policy_mask": lambda s: (
        functools.partial(losses.opsm, threshold=s["off_policy_mask_threshold"], loss=ppo(s)),
        losses.token_mean,
        None,
    ),
    "gmpo": lambda s: (functools.partial(losses.gmpo, **clip(s)), losses.sequence_mean, None),
}
# TRL bounds by None or infinity where ours has a number.
CORRECTIONS = {
    "token_truncate": lambda high: functools.partial(losses.token_truncation, cap=high),
    "token_mask": lambda high: functools.partial(losses.token_masking, low=0.7, high=high),
    "sequence_truncate": lambda high: functools.partial(losses.sequence_truncation, cap=high),
    "sequence_mask": lambda high: functools.partial(losses.sequence_masking, low=0.0, high=high),
}


def inputs_of(rows=ROWS):
    return make_inputs(rows, logp=DRAWN["logp"], advantage=DRAWN["row_advantage"], drawn=DRAWN)


def value_and_gradient(loss_of, aggregate, kl=None, kl_coef=0.0, rows=ROWS):
    @jax.jit
    @jax.value_and_grad
    def total(logp, inputs):
        filled = dataclasses.replace(inputs, logp=logp)
        loss, keep, _ = loss_of(filled)
        above, below = aggregate(jnp.where(keep, loss, 0.0), inputs.tokens.mask, inputs.counts)
        if kl is None:
            return above / below
        return above / below + kl_coef * aggregate(kl(filled), inputs.tokens.mask, inputs.counts)[0] / below

    value, gradient = total(np.ravel(DRAWN["logp"]), inputs_of(rows))
    return value, rows.grid(gradient)


def check(case, value, gradient, scale=1.0):
    np.testing.assert_allclose(value * np.float32(scale), TRL[case]["loss"], **CLOSE)
    np.testing.assert_allclose(gradient * np.float32(scale), TRL[case]["gradient"], **CLOSE)
    assert np.abs(gradient).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LOSSES))
def test_losses(name):
    settings = TRL.cases[f"loss/{name}"]
    loss_of, aggregate, kl = LOSSES[name](settings)
    check(f"loss/{name}", *value_and_gradient(loss_of, aggregate, kl, settings.get("beta", 0.0)))


PER_ROW = ("grpo", "dr_grpo", "luspo", "sapo")


@pytest.mark.parametrize("case", TRL.under("empty_row"))
def test_losses_with_a_row_without_actions(case):
    """A completion that was cut off and masked.

    TRL's means over rows count it: the losses of 11 sequences are divided by 12. On paper, in verl and in ours a sequence without
    tokens has no loss to average. Means over tokens are the same in all.
    """
    name = case.split("/")[1]
    mask = DRAWN["action"].copy()
    mask[5] = 0
    rows = make_rows(mask, DRAWN["group"], DRAWN["outcome"], logps=DRAWN, merged=True)
    loss_of, aggregate, _ = LOSSES[name](TRL.cases[case])
    check(case, *value_and_gradient(loss_of, aggregate, rows=rows), scale=11 / 12 if name in PER_ROW else 1.0)


def test_rloo_takes_a_completion_for_one_action():
    """So its loss is PPO's of the sequence's log-prob, one edge a sequence; the gradient reaches each of its tokens."""
    golden, settings = TRL["loss/rloo"], TRL.cases["loss/rloo"]
    mask = golden["mask"] > 0
    sums = {name: np.sum(DRAWN[name], axis=1, where=mask, keepdims=True) for name in ("logp", "old_logp", "behaviour_logp", "ref_logp")}
    rows = make_rows(np.ones((len(mask), 1)), DRAWN["group"], DRAWN["outcome"], logps=sums, merged=True)
    drawn = {name: DRAWN[name][:, :1] for name in ("entropy", "value", "old_value", "value_target")}
    inputs = make_inputs(rows, logp=sums["logp"], advantage=DRAWN["row_advantage"][:, :1], drawn=drawn)

    @jax.jit
    @jax.value_and_grad
    def total(logp):
        summed = jnp.sum(jnp.where(mask, logp, 0.0), axis=1)
        loss, _, _ = losses.ppo_clip(dataclasses.replace(inputs, logp=summed), **clip(settings), dual_clip=None)
        above, below = losses.sequence_mean(loss, inputs.tokens.mask, inputs.counts)
        return above / below

    check("loss/rloo", *total(DRAWN["logp"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CORRECTIONS))
def test_corrections(name):
    correction = CORRECTIONS[name](TRL.cases[f"correction/{name}"]["vllm_importance_sampling_clip_max"])
    weight, _ = jax.jit(correction)(inputs_of())
    golden = np.where(ROWS.mask, TRL[f"correction/{name}"]["ratio"], 0.0)
    np.testing.assert_allclose(ROWS.grid(weight), golden, **CLOSE)
    loss_of = functools.partial(losses.corrected, loss=ppo(TRL.cases[f"corrected/{name}"]), correction=correction)
    check(f"corrected/{name}", *value_and_gradient(loss_of, losses.token_mean))


def test_vespo_against_the_samplers_policy():
    check("corrected/vespo", *value_and_gradient(vespo(TRL.cases["corrected/vespo"], "behaviour"), losses.token_mean))


def rloo_normalised(table, c, evidence):
    """Whitening is refused to advantages, since it moves their zero; TRL does move it."""
    left_out = advantages.leave_one_out(table, c, evidence)
    return advantages.whiten(table, Credit(value=left_out, kind="return"), evidence, ddof=1.0, eps=1e-4)


GDPO = functools.partial(advantages.gdpo, weights=(1.0, 0.5), eps=1e-4, degenerate="formula", batch_count="rollouts", batch_eps=1e-4)
ADVANTAGES = {
    "grpo/group": functools.partial(advantages.group_norm, **advantages.preset("trl")),
    "grpo/none": functools.partial(advantages.group_norm, **{**advantages.preset("trl"), "scale": "none"}),
    "grpo/singletons": functools.partial(advantages.group_norm, **advantages.preset("trl")),
    "grpo/two_rewards": GDPO,
    "rloo": advantages.leave_one_out,
    "rloo/normalised": rloo_normalised,
    "rloo/singletons": advantages.leave_one_out,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_advantages(name):
    """Rollouts are cut into calls, which changes nothing."""
    golden = TRL[f"advantage/{name}"]
    group = [str(i) for i in range(len(ROWS.mask))] if name.endswith("singletons") else DRAWN["group"]
    rows = make_rows(DRAWN["action"], group, DRAWN["outcome"])
    table = dataclasses.replace(rows.table, outcome=golden["rewards"][rows.row])

    @jax.jit
    def run(table):
        return ADVANTAGES[name](table, credit.identical(table, NOTHING), NOTHING)

    np.testing.assert_allclose(run(table), np.where(table.valid, golden["advantages"][rows.row], 0.0), **CLOSE)
    assert golden["advantages"].any() != name.endswith("singletons")


def test_everything_recorded_is_compared():
    compared = {"inputs", "loss/rloo", "corrected/vespo", *NOT_REPRODUCED}
    compared |= {f"loss/{name}" for name in LOSSES} | {f"advantage/{name}" for name in ADVANTAGES}
    compared |= {f"{kind}/{name}" for kind in ("correction", "corrected") for name in CORRECTIONS}
    assert compared == set(TRL.cases) - set(TRL.under("empty_row"))
    kinds = {"grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"}
    assert {f"loss/{kind}" for kind in kinds} <= compared and set(TRL.under("empty_row")) == {f"empty_row/{kind}" for kind in kinds}
