"""The rules that keep the maths right, each a test named after its rule. The published defects behind them: tests/README.md."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningrl import advantages, credit, losses, segments
from lightningrl.ratio import log_ratio
from lightningrl.recipe import describe
from lightningrl.recipes import RECIPES, get_recipe
from lightningrl.table import Credit, Evidence
from tests import batches
from tests.batches import loss_of, make_evidence, make_inputs, make_rollout, poison, poison_evidence, poison_table

AGGREGATIONS = (losses.token_mean, losses.sequence_mean, losses.sequence_sum, losses.rollout_mean, losses.group_mean)
IDENTICAL = jax.jit(credit.identical)
GROUP_NORM = jax.jit(advantages.group_norm, static_argnames=("count", "scale", "ddof", "eps"))
LEAVE_ONE_OUT = jax.jit(advantages.leave_one_out)
COUNT = jax.jit(losses.count_units)
SCAN = jax.jit(segments.reverse_affine_scan)
EVERY_AGGREGATION = pytest.mark.parametrize("aggregation", AGGREGATIONS)
NOTHING = Evidence()

# One size for all batches: what is compiled for one rule serves the others.
make_table = functools.partial(batches.make_table, size=20)
make_tokens = functools.partial(batches.make_tokens, size=16)


@functools.partial(jax.jit, static_argnums=0)
def _advantage(name, table, evidence):
    return get_recipe(name).advantage(table, get_recipe(name).credit(table, evidence), evidence)


def advantage_of(name, table):
    return np.asarray(_advantage(name, table, NOTHING))


def loss_and_gradient(aggregation, table, tokens, advantage, logp, counts=None):
    """(sum, denominator) of a PPO step, and the gradient of the sum in the log-probs."""
    inputs = make_inputs(table, tokens)
    spread = np.where(tokens.mask, advantage[tokens.transition], np.float32(0))
    inputs = dataclasses.replace(inputs, counts=inputs.counts if counts is None else counts, advantage=spread, logp=logp)
    return jax.tree.map(np.asarray, _step(aggregation, inputs))


@functools.partial(jax.jit, static_argnums=0)
def _step(aggregation, inputs):
    def total(logp):
        loss, keep, _ = losses.ppo_clip(dataclasses.replace(inputs, logp=logp))
        return aggregation(jnp.where(keep, loss, 0.0), inputs.tokens.mask, inputs.counts)

    (summed, denominator), gradient = jax.value_and_grad(total, has_aux=True)(inputs.logp)
    return summed, denominator, gradient


def mixed_batch():
    """Rollouts of one to three calls in two groups, responses of one to four tokens."""
    return make_table(
        make_rollout("a", 1.0, [0.0], lengths=[2]),
        make_rollout("a", 0.0, [0.0, -0.5, 0.0], lengths=[1, 2, 3]),
        make_rollout("b", 0.5, [0.0, 0.25], lengths=[4, 1]),
        make_rollout("b", 0.0, [0.0], lengths=[3]),
    )


def test_rule_1_statistics_count_rollouts():
    """A success of one call and a failure of nine: the baseline is ½, and ⅒ only in the paper's own recipe."""
    table = make_table(make_rollout("a", 1.0), make_rollout("a", 0.0, [0.0] * 9))
    ours = GROUP_NORM(table, IDENTICAL(table, NOTHING), NOTHING, scale="none")
    papers = GROUP_NORM(table, IDENTICAL(table, NOTHING), NOTHING, scale="none", count="transitions")
    np.testing.assert_allclose(ours[:10], [0.5] + [-0.5] * 9, rtol=1e-6)
    np.testing.assert_allclose(papers[:10], [0.9] + [-0.1] * 9, rtol=1e-6)
    assert describe(RECIPES["lightningrl_paper"].advantage) == "group_norm(count='transitions')"
    np.testing.assert_allclose(advantage_of("lightningrl", table)[:10], np.array([1.0] + [-1.0] * 9) / np.sqrt(2), rtol=1e-5)


@pytest.mark.slow
@EVERY_AGGREGATION
def test_rule_1_packing_changes_no_loss_and_no_gradient(aggregation):
    """Edges in another order and among more padding: the same sums, and the same gradient edge for edge."""
    table = mixed_batch()
    tokens = make_tokens(table)
    advantage = advantage_of("lightningrl", table)
    size, room = len(tokens.mask), 24
    places = np.random.default_rng(0).permutation(room)[:size]

    def pack(x):
        packed = np.zeros(room, x.dtype)
        packed[places] = x
        return packed

    packed = jax.tree.map(pack, tokens)
    logp = np.linspace(-2, -0.5, size).astype(np.float32)
    total, denominator, gradient = loss_and_gradient(aggregation, table, tokens, advantage, logp)
    other = loss_and_gradient(aggregation, table, packed, advantage, pack(logp))
    np.testing.assert_allclose(other[0], total, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(other[1], denominator, rtol=1e-6)
    np.testing.assert_allclose(other[2][places], gradient, rtol=1e-6)
    assert not np.delete(other[2], places).any()


@pytest.mark.parametrize("aggregation", [losses.token_mean, losses.rollout_mean])
def test_rule_1_merging_transitions_changes_nothing(aggregation):
    """Three calls of 1, 2 and 3 tokens, or one trajectory of 6 tokens: the same advantage, loss and gradient per token."""
    split = make_table(make_rollout("a", 1.0, lengths=[2]), make_rollout("a", 0.0, [0.0] * 3, lengths=[1, 2, 3]))
    merged = make_table(make_rollout("a", 1.0, lengths=[2]), make_rollout("a", 0.0, lengths=[6]))
    logp = np.linspace(-2, -0.5, 16).astype(np.float32)
    results = [
        loss_and_gradient(aggregation, table, make_tokens(table), advantage_of("lightningrl", table), logp) for table in (split, merged)
    ]
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_rule_2_failed_rollouts_leave_the_statistics():
    """A run that failed is no reward of 0: the others' advantages are as if it had never been started."""
    good = [make_rollout("a", 1.0), make_rollout("a", 0.5, [0.0, 0.0]), make_rollout("a", 0.0)]
    failed = [make_rollout("a", 0.0, [0.0, 0.0], status="failed"), make_rollout("a", 0.0, status="timed_out")]
    without, with_failed = make_table(*good), make_table(failed[0], *good[:2], failed[1], good[2])
    assert advantage_of("lightningrl", with_failed).tolist() == advantage_of("lightningrl", without).tolist()
    as_zero = make_table(*good, make_rollout("a", 0.0))
    assert advantage_of("lightningrl", as_zero)[0] != advantage_of("lightningrl", without)[0]


def test_rule_2_what_is_not_trained_still_counts():
    """Rollouts of which no call is trained stay in the baseline of the others: nothing is dropped before the statistics."""
    seen = make_table(make_rollout("a", 1.0), make_rollout("a", 0.0, [0.0, 0.0]))
    untrained = make_table(make_rollout("a", 1.0), make_rollout("a", 0.0, [0.0, 0.0], trainable=[False, False]))
    assert advantage_of("lightningrl", untrained).tolist() == advantage_of("lightningrl", seen).tolist()


@EVERY_AGGREGATION
def test_rule_2_a_dropped_token_leaves_the_numerator_only(aggregation):
    """`keep` false takes a token's loss away; the denominator is still that of the mask that the caller asked for."""
    table = mixed_batch()
    tokens = make_tokens(table)
    counts = COUNT(table, tokens)
    loss = np.ones(len(tokens.mask), np.float32)
    keep = np.arange(len(loss)) % 3 > 0
    aggregate = jax.jit(aggregation)
    total, denominator = aggregate(loss, tokens.mask, counts)
    kept, same = aggregate(np.where(keep, loss, np.float32(0)), tokens.mask, counts)
    gone, _ = aggregate(np.where(keep, np.float32(0), loss), tokens.mask, counts)
    assert same == denominator
    assert 0 < kept < total
    np.testing.assert_allclose(kept + gone, total, rtol=1e-6)


@EVERY_AGGREGATION
def test_rule_3_micro_batches_add_up(aggregation):
    """Cut anywhere, also through rollouts: sums and denominators add up to the whole batch's, and so do gradients."""
    table = mixed_batch()
    tokens = make_tokens(table)
    counts = COUNT(table, tokens)
    advantage = advantage_of("lightningrl", table)
    logp = np.linspace(-2, -0.5, len(tokens.mask)).astype(np.float32)
    whole = loss_and_gradient(aggregation, table, tokens, advantage, logp)
    order = np.random.default_rng(1).permutation(len(logp))
    parts = []
    for chosen in (order[:5], order[5:6], order[6:]):
        part, part_counts = (jax.tree.map(lambda x, c=chosen: np.asarray(x)[c], tree) for tree in (tokens, counts))
        parts.append(loss_and_gradient(aggregation, table, part, advantage, logp[chosen], part_counts))
    np.testing.assert_allclose(sum(p[0] for p in parts), whole[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sum(p[1] for p in parts), whole[1], rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([p[2] for p in parts]), whole[2][order], rtol=1e-6)


def test_rule_3_a_mean_of_means_is_another_number():
    """10 tokens of loss 1 and 90 of loss 0: 0.1, where averaging two micro-batches' means says 0.5."""
    table = make_table(make_rollout("a", 0.0, lengths=[10]), make_rollout("a", 0.0, lengths=[90]))
    tokens = batches.make_tokens(table)
    counts = COUNT(table, tokens)
    loss = (tokens.transition == 0).astype(np.float32)
    halves = [
        losses.token_mean(loss[s], tokens.mask[s], jax.tree.map(lambda x, s=s: np.asarray(x)[s], counts))
        for s in (slice(10), slice(10, 100))
    ]
    total, denominator = (sum(float(half[i]) for half in halves) for i in (0, 1))
    assert (total, denominator) == (10.0, 100.0)


def test_rule_3_metrics_add_up_like_losses():
    table = mixed_batch()
    inputs = make_inputs(table, make_tokens(table))
    for loss in (losses.ppo_clip, losses.value_loss, losses.negative_log_likelihood):
        metrics = jax.jit(lambda inputs, loss=loss: loss(inputs)[2])
        whole = metrics(inputs)
        halves = [metrics(jax.tree.map(lambda x, s=s: np.asarray(x)[s], inputs)) for s in (slice(8), slice(8, None))]
        added = jax.tree.map(lambda *x: sum(np.asarray(y) for y in x), *halves)
        for name, pair in whole.items():
            np.testing.assert_allclose(added[name], pair, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RECIPES))
def test_rule_4_no_nan_crosses_backwards(name):
    """NaN wherever nothing is wanted, from the table to the log-probs: the objective and every gradient are as without."""
    recipe = RECIPES[name]
    rollouts = [make_rollout("a", 1.0, [0.0, 0.5], lengths=[2, 1]), make_rollout("a", 0.0, [0.0], lengths=[3])]
    table = make_table(*rollouts)
    tokens = make_tokens(table)
    evidence = make_evidence(table, tokens)
    inputs = make_inputs(table, tokens)

    @jax.jit
    def run(table, evidence, inputs):
        advantage = recipe.advantage(table, recipe.credit(table, evidence), evidence)
        spread = recipe.spread(table, inputs.tokens, advantage, evidence)

        def total(logp, value):
            filled = dataclasses.replace(inputs, advantage=spread, logp=logp, value=value)
            loss, keep, _ = loss_of(recipe, filled)
            critic, first, _ = recipe.value_loss(filled)
            mask = inputs.tokens.mask
            sums = (
                recipe.aggregation(jnp.where(keep, loss, 0.0), mask, inputs.counts),
                recipe.value_aggregation(critic, first, inputs.counts),
                recipe.aggregation(losses.k3(filled), mask, inputs.counts),
            )
            return sum(total / denominator for total, denominator in sums)

        return jax.value_and_grad(total, argnums=(0, 1))(inputs.logp, inputs.value)

    clean = run(table, evidence, inputs)
    spoiled = run(poison_table(table), poison_evidence(evidence, table, tokens), poison(inputs, tokens.mask))
    assert np.isfinite(clean[0])
    np.testing.assert_array_equal(clean[0], spoiled[0])
    for one, other in zip(clean[1], spoiled[1], strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_array_equal(one, other)


def test_rule_4_log_ratios_are_float32_and_clamped():
    """A log-ratio of ±1000 has a finite ratio and no gradient; bfloat16 log-probs are subtracted in float32."""
    mask = np.ones(2, bool)
    far = np.array([1000.0, -1000.0], np.float32)
    assert log_ratio(far, np.zeros(2, np.float32), mask).tolist() == [20.0, -20.0]
    assert jax.grad(lambda x: jnp.sum(log_ratio(x, jnp.zeros(2), mask)))(far).tolist() == [0.0, 0.0]
    half = jnp.asarray([-1.0, -1.0], jnp.bfloat16)
    difference = log_ratio(half, np.array([-1.001, -0.999], np.float32), mask)
    assert difference.dtype == jnp.float32
    np.testing.assert_allclose(difference, [0.001, -0.001], rtol=1e-3)


# Of recipes that hand a rollout's outcome to its calls alike. Others compare turns, which a discount, a merged step or "the last
# call" sets apart also among equal outcomes; their own files have their degenerate cases. `unchanged` and `accepted` compare
# nothing: rejection sampling imitates a right rollout also where all of its group are right.
ALIKE = [
    name
    for name, recipe in RECIPES.items()
    if not recipe.needs
    and recipe.advantage not in (advantages.unchanged, advantages.accepted)
    and describe(recipe.credit).startswith(("identical", "reward_to"))
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIKE)
def test_rule_5_constant_groups_and_groups_of_one_get_exactly_zero(name):
    """Seven rewards of 0.1 leave 0.1 - mean = -7e-9 in float32; a group of one has nothing to be compared with."""
    rollouts = [make_rollout("a", 0.1, [0.0] * (1 + i % 3)) for i in range(7)]
    table = make_table(*rollouts, make_rollout("b", 0.7, [0.0, 0.0]), make_rollout("c", 1.0), make_rollout("c", 0.0))
    advantage = advantage_of(name, table)
    assert (advantage[table.group < 2] == 0).all()
    # pass@k pays the best rollout of a group and nobody else.
    assert (advantage[table.group == 2] != 0).tolist() == ([True, False] if name == "pass_at_k" else [True, True])


@pytest.mark.slow
def test_rule_5_holds_for_every_epsilon_and_ddof():
    table = make_table(*(make_rollout("a", 0.1, [0.0] * (1 + i % 3)) for i in range(7)), make_rollout("b", 0.7))
    for ddof in (0.0, 1.0):
        for eps in (0.0, 1e-9):
            out = GROUP_NORM(table, IDENTICAL(table, NOTHING), NOTHING, ddof=ddof, eps=eps)
            assert out.tolist() == [0.0] * len(out)
    assert LEAVE_ONE_OUT(table, IDENTICAL(table, NOTHING), NOTHING).tolist() == [0.0] * len(table.valid)


def test_rule_6_recursions_carry_across_masked_entries():
    """An observation between two actions neither consumes a discount nor resets: as if it were not there."""
    rewards, value = np.array([1.0, 0.0, 4.0, 8.0], np.float32), np.array([2.0, 1.0, 0.5, 0.25], np.float32)
    ids, mask = np.zeros(4, np.int32), np.array([True, True, False, True])
    factors = np.full(4, 0.5, np.float32)
    with_gap = SCAN(factors, rewards, ids, mask)
    without = SCAN(factors[mask], rewards[mask], ids[mask], np.ones(3, bool))
    assert with_gap[mask].tolist() == without.tolist() == [3.0, 4.0, 8.0]
    assert segments.next_in_segment(value, ids, mask)[mask].tolist() == [1.0, 0.25, 0.0]


def test_rule_6_credit_skips_invalid_entries():
    """An invalid entry within a rollout, NaN in it: returns and GAE are those of the table without it."""
    table = batches.make_table(make_rollout("a", 1.0, [0.5, 0.0, 0.25, 0.0]))
    valid = np.array([True, False, True, True])
    gap = poison_table(dataclasses.replace(table, valid=valid))
    short = jax.tree.map(lambda x: x[valid], gap)
    value = np.array([0.5, np.nan, 0.25, -0.5], np.float32)
    for assigner in (credit.reward_to_go, credit.gae):
        jitted = jax.jit(assigner)
        with_gap = jitted(gap, Evidence(value=value)).value
        assert with_gap[valid].tolist() == jitted(short, Evidence(value=value[valid])).value.tolist()
        assert with_gap[1] == 0


REDISTRIBUTE = {"predicted_return", "attention", "coalition", "potential"}  # credit by these is no sum of rewards


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RECIPES))
def test_rule_7_rewards_stay_float32(name):
    """0.1 in bfloat16 is 0.10009765625: no stage rounds it, and none widens it."""
    table = make_table(make_rollout("a", 0.1, [0.3]), make_rollout("a", 0.9, [0.3]))
    assert table.outcome[0, 0] == np.float32(0.1) and table.reward[0] == np.float32(0.3)
    evidence = make_evidence(table, make_tokens(table))
    earned = jax.jit(RECIPES[name].credit)(table, evidence)
    assert earned.value.dtype == jnp.float32
    if earned.kind == "return" and not set(RECIPES[name].needs) & REDISTRIBUTE:
        assert earned.value[0] in (np.float32(0.1), np.float32(0.3) + np.float32(0.1))
    assert jax.jit(RECIPES[name].advantage)(table, earned, evidence).dtype == jnp.float32


def test_rule_8_a_reward_of_0_is_a_reward():
    """Turn ends come from ids: with every reward 0 there are still three turns, and no rollout runs into the next."""
    rollouts = [make_rollout("a", 0.0, [0.0, 0.0, 0.0]), make_rollout("a", 8.0, [0.0, 0.0])]
    table = batches.make_table(*rollouts)
    value = Evidence(value=np.array([4.0, 2.0, 1.0, 0.0, 0.0], np.float32))
    assert credit.reward_to_go(table, NOTHING, gamma=0.5).value.tolist() == [0, 0, 0, 4, 8]
    assert credit.gae(table, value, gamma=1.0, lambda_=0.0).value.tolist() == [-2, -1, -1, 0, 8]


def test_rule_8_a_reward_of_0_counts_in_the_statistics():
    """A rollout that earned 0 is as much of its group as any other: means are over four, not over the two that paid."""
    table = make_table(*(make_rollout("a", outcome) for outcome in (1.0, 3.0, 0.0, 0.0)))
    centred = GROUP_NORM(table, IDENTICAL(table, NOTHING), NOTHING, scale="none")
    assert centred[:4].tolist() == [0.0, 2.0, -1.0, -1.0]


def test_an_advantage_is_never_centred_again():
    table = make_table(make_rollout("a", 1.0), make_rollout("a", 0.0))
    finished = Credit(value=np.ones(20, np.float32), kind="advantage")
    for method in (advantages.group_norm, advantages.leave_one_out, advantages.whiten):
        with pytest.raises(ValueError, match="already an advantage and may only be scaled"):
            method(table, finished, NOTHING)
