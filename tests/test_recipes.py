"""The named algorithms, and the table that lists them."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningrl import advantages, credit, losses
from lightningrl.recipe import Recipe, describe, with_correction
from lightningrl.recipes import RECIPES, get_recipe
from lightningrl.table import Evidence
from tests.batches import loss_of, make_evidence, make_inputs, make_rollout, make_table, make_tokens

EACH = pytest.mark.parametrize("name", list(RECIPES))


def batch_rollouts():
    return [
        make_rollout("a", 1.0, [0.0], lengths=[2]),
        make_rollout("a", 0.0, [0.0, -0.5, 0.0], lengths=[1, 2, 3]),
        make_rollout("b", 1.0, [0.0, 0.0], lengths=[4, 1]),
        make_rollout("b", 0.0, [0.25], lengths=[2]),
    ]


def batch():
    return make_table(*batch_rollouts(), size=9)


@functools.partial(jax.jit, static_argnums=0)
def advantage(name, table):
    recipe = get_recipe(name)
    return recipe.advantage(table, recipe.credit(table, Evidence()), Evidence())


def objective(recipe, table, tokens, evidence):
    advantage = recipe.advantage(table, recipe.credit(table, evidence), evidence)
    inputs = dataclasses.replace(make_inputs(table, tokens), advantage=recipe.spread(table, tokens, advantage, evidence))

    def objective_of(logp):
        loss, keep, _ = loss_of(recipe, dataclasses.replace(inputs, logp=logp))
        total, denominator = recipe.aggregation(jnp.where(keep, loss, 0.0), tokens.mask, inputs.counts)
        return total / denominator

    return jax.value_and_grad(objective_of)(tokens.old_logp)


@pytest.mark.slow
@EACH
def test_runs_from_table_to_gradient_under_jit(name):
    table = batch()
    tokens = make_tokens(table, 20)
    tokens = dataclasses.replace(tokens, behaviour_logp=tokens.old_logp)  # on policy: m2po drops what is far from it
    made = make_evidence(table, tokens)
    evidence = Evidence(**{need: getattr(made, need) for need in RECIPES[name].needs})
    loss, gradient = jax.jit(functools.partial(objective, RECIPES[name]))(table, tokens, evidence)
    assert np.isfinite(loss) and np.isfinite(gradient).all()
    assert (np.asarray(gradient)[~tokens.mask] == 0).all() and np.abs(gradient).sum() > 0


def test_paper_and_ours_differ_in_what_weighs_one():
    """A success of one call and a failure of three: one in four calls for the paper, one in two rollouts for us."""
    table = make_table(make_rollout("a", 1.0, [0.0]), make_rollout("a", 0.0, [0.0, 0.0, 0.0]))

    np.testing.assert_allclose(advantage("lightningrl_paper", table), [1.5, -0.5, -0.5, -0.5], rtol=1e-4)
    np.testing.assert_allclose(advantage("lightningrl", table), np.array([1, -1, -1, -1]) / np.sqrt(2), rtol=1e-4)


def test_three_arms_differ_in_what_weighs_one_and_in_nothing_else():
    """Row statistics and token mean, rollout statistics and token mean, rollout statistics and rollout mean (arXiv 2608.17528)."""
    rows, tokens, rollouts = (stages(name) for name in ("row_weighted", "dapo", "lightningrl"))
    assert rows | {"advantage": "group_norm"} == tokens and rows["advantage"] == "group_norm(count='transitions')"
    assert tokens | {"aggregation": "rollout_mean"} == rollouts and tokens["aggregation"] == "token_mean"
    assert stages("lightningrl_paper") | {"loss": rows["loss"]} == rows


def stages(name):
    recipe = get_recipe(name)
    named = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    others = {key: value for key, value in named.items() if key not in ("name", "arxiv", "use_when")}
    return {key: describe(value) if callable(value) else value for key, value in others.items()}


@pytest.mark.parametrize(
    ("of_merged", "of_calls"),
    [("lightningrl", "lightningrl"), ("dapo", "dapo"), ("row_weighted", "dapo"), ("sequence_mean", "lightningrl")],
)
def test_merged_trajectories_are_arms_that_there_are(of_merged, of_calls):
    """A rollout that is one conversation, as one sequence with its observations masked: the same objective, the same gradient.

    A token has one log-prob in both, that at its node of the trie, and of the rest only the unit changes: a row is a rollout. So row
    statistics are rollout statistics, and a mean over sequences one over rollouts; nothing else that these recipes have sees a row.
    """
    whole, rollouts = [2, 6, 5, 2], batch_rollouts()
    merged = [make_rollout(r.group, r.reward, lengths=[n]) for r, n in zip(rollouts, whole, strict=True)]
    recipes = {**RECIPES, "sequence_mean": dataclasses.replace(RECIPES["lightningrl"], aggregation=losses.sequence_mean)}

    def result(name, rollouts):
        table = make_table(*rollouts, size=9)
        return jax.jit(functools.partial(objective, recipes[name]))(table, make_tokens(table, 20), Evidence())

    for one, other in zip(result(of_merged, merged), result(of_calls, rollouts), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)  # sums of float32 in another order


def test_call_by_call_row_statistics_are_another_arm():
    """A success of two calls and a failure of three."""
    table = make_table(make_rollout("a", 1.0, [0.0] * 2), make_rollout("a", 0.0, [0.0] * 3))
    assert not np.allclose(advantage("row_weighted", table), advantage("dapo", table), rtol=0.01)


def test_reward_to_go_without_intermediate_rewards_is_lightningrl():
    table = make_table(make_rollout("a", 1.0, [0.0]), make_rollout("a", 0.25, [0.0, 0.0, 0.0]))
    assert advantage("lightningrl", table).tolist() == advantage("lightningrl_rtg", table).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["token_ppo", "bi_level_gae"])
def test_a_token_critic_learns_advantage_plus_value(name):
    """γ and λ of the target are those of the advantage."""
    recipe, table = get_recipe(name), batch()
    tokens = make_tokens(table, 20)
    evidence = Evidence(token_value=np.linspace(-1, 1, 20, dtype=np.float32))
    nothing = np.zeros(9, np.float32)
    expected = np.where(tokens.mask, recipe.spread(table, tokens, nothing, evidence) + evidence.token_value, 0.0)
    # One float32 rounding of numbers up to 4 on either side.
    np.testing.assert_allclose(recipe.token_value_target(table, tokens, nothing, evidence), expected, rtol=0, atol=1e-6)


def test_ppo_and_its_critic_agree_on_gamma_and_lambda():
    recipe = get_recipe("ppo")
    assert recipe.value_target is not None
    assert describe(recipe.value_target) == describe(recipe.credit).replace("gae", "gae_value_target")
    assert recipe.needs == ("value",)


def test_an_unknown_recipe_gets_the_list():
    every = ", ".join(sorted(RECIPES))
    for name, near in (("grop", "grpo"), ("turn_ppo", "ppo"), ("lightningrl-rtg", "lightningrl_rtg")):
        with pytest.raises(ValueError, match=rf"no recipe '{name}': choose one of {every}; nearest to it: .*\b{near}\b.*\.$"):
            get_recipe(name)
    with pytest.raises(ValueError, match=f"no recipe 'xyzzy': choose one of {every}\\.$"):
        get_recipe("xyzzy")


def test_recipes_that_do_not_fit_are_refused():
    mine = functools.partial(
        Recipe,
        name="mine",
        arxiv="",
        use_when="",
        credit=credit.identical,
        advantage=advantages.group_norm,
        loss=losses.ppo_clip,
        aggregation=losses.token_mean,
    )
    assert mine(kl=losses.k3, kl_coef=0.1).kl is losses.k3
    with pytest.raises(ValueError, match="'mine' needs 'oracle', which is no field of Evidence: value"):
        mine(needs=("oracle",))
    with pytest.raises(ValueError, match="both kl and kl_coef, or neither"):
        mine(kl_coef=0.1)
    with pytest.raises(ValueError, match="both value_target and value_coef, or neither"):
        mine(value_target=credit.gae_value_target)
    with pytest.raises(ValueError, match="one value head"):
        mine(value_target=credit.gae_value_target, token_value_target=advantages.token_lambda_return, value_coef=0.5)


def test_describe_shows_the_settings():
    one = functools.partial(functools.partial(credit.gae, gamma=0.5), lambda_=1.0)
    assert describe(one) == "gae(gamma=0.5, lambda_=1.0)"
    assert describe(credit.identical) == "identical"


@pytest.mark.slow
def test_the_command_prints_every_recipe():
    done = subprocess.run([sys.executable, "-m", "lightningrl.recipes"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    for recipe in RECIPES.values():
        assert recipe.name + (f"  (arXiv {recipe.arxiv})\n" if recipe.arxiv else "\n") in done.stdout


def test_a_recipe_gets_a_rollout_correction_once_and_of_its_losss_scope() -> None:
    def correction(recipe):
        return recipe.loss.keywords["correction"]

    corrected = {name: with_correction(recipe) for name, recipe in RECIPES.items()}
    unchanged = {name for name, recipe in corrected.items() if recipe is RECIPES[name]}
    assert unchanged == {"m2po"}  # its ratio is to the behaviour policy
    of_sequences = {name for name in corrected.keys() - unchanged if correction(corrected[name]) is losses.sequence_truncation}
    assert of_sequences == {"gspo", "gmpo"}
    assert all(correction(corrected[name]) is losses.token_truncation for name in corrected.keys() - unchanged - of_sequences)
    assert all(corrected[name].loss.keywords["loss"] is RECIPES[name].loss for name in corrected.keys() - unchanged)
    assert with_correction(corrected["grpo"]) is corrected["grpo"]
    decoupled = dataclasses.replace(RECIPES["grpo"], loss=functools.partial(losses.decoupled_ppo))
    assert with_correction(decoupled) is decoupled


def test_a_correction_is_for_the_ratio_of_a_losss_inner_loss() -> None:
    def made(loss):
        return with_correction(dataclasses.replace(RECIPES["grpo"], loss=loss))

    # opsm drops by the behaviour policy, and then its inner loss has a ratio to the old one.
    masked = functools.partial(losses.opsm, threshold=0.1)
    assert made(masked).loss.keywords["correction"] is losses.token_truncation
    assert made(functools.partial(masked, loss=losses.gspo)).loss.keywords["correction"] is losses.sequence_truncation
    anchored = functools.partial(masked, loss=functools.partial(losses.vespo, anchor="behaviour"))
    assert made(anchored).loss is anchored
    assert made(losses.gspo_token).loss.keywords["correction"] is losses.sequence_truncation


def test_a_recipe_with_weights_normalised_over_a_micro_batch_is_refused() -> None:
    correction = functools.partial(losses.batch_normalised, correction=losses.token_masking)
    loss = functools.partial(losses.corrected, loss=losses.ppo_clip)
    with pytest.raises(ValueError, match="normalise its weights over a micro-batch"):
        dataclasses.replace(RECIPES["grpo"], loss=functools.partial(loss, correction=correction))
    dataclasses.replace(RECIPES["grpo"], loss=functools.partial(loss, correction=functools.partial(correction, mean=np.float32(1.0))))


@pytest.mark.slow
def test_a_correction_hands_on_what_a_recipe_selects() -> None:
    table = batch()
    tokens = make_tokens(table)
    inputs = make_inputs(table, tokens)
    selected = np.arange(len(tokens.mask)) % 3 == 0
    loss, keep, aux = with_correction(RECIPES["clip_cov"]).loss(inputs, selected=selected)
    plain, keep_plain, _ = RECIPES["clip_cov"].loss(inputs, selected=selected)
    ratio = np.exp(np.asarray(tokens.old_logp, np.float64) - np.asarray(tokens.behaviour_logp))
    weighed = np.where(tokens.mask, np.minimum(ratio, 2.0), 0.0) * np.asarray(plain)
    np.testing.assert_allclose(loss, weighed, rtol=1e-5)  # float32 against float64
    np.testing.assert_array_equal(keep, keep_plain)
    assert not np.array_equal(keep, RECIPES["clip_cov"].loss(inputs, selected=np.zeros_like(selected))[1])
    assert "correction_weight_mean" in aux
