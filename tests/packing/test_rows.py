"""Where transitions lie in rows, and what they share there, changes no loss or gradient; limits are kept, errors say what is right."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lightningrl.losses import count_units
from lightningrl.model import decoder
from lightningrl.packing.rows import PackedBatch, RowSettings, pack
from lightningrl.recipes import get_recipe
from lightningrl.segments import safe_divide
from lightningrl.sharding import make_mesh
from lightningrl.table import LossInputs, TokenTable
from lightningrl.tabulate import table_from_rollouts
from lightningrl.train import EdgeBatch, TrainStep
from lightningrl.types import Transition
from tests.conversations import call, rollouts
from tests.tiny import tiny_policy

POLICY = tiny_policy()
RECIPE = get_recipe("lightningrl")
EPS = np.finfo(np.float32).eps
LAYOUTS = (
    RowSettings(lengths=(64,), tokens=256, edges=64),  # chains share rows, rows share micro-batches
    RowSettings(lengths=(32, 64), tokens=64, edges=64),  # two lengths, one or two rows a micro-batch
)


def close(result: object, expected: object) -> None:
    """Equal up to float32 rounding: two layouts sum the same terms in other orders and other blocks. Some hundred roundings
    of half an epsilon, relative to the largest value, bound what that can do."""
    a, b = np.asarray(result), np.asarray(expected)
    np.testing.assert_allclose(a, b, rtol=0, atol=128 * EPS * max(np.abs(b).max(), 1e-3))


@functools.cache
def batch() -> tuple[tuple[Transition, ...], object, np.ndarray]:
    """Transitions, the table, and each one's advantage."""
    made = rollouts()
    table = table_from_rollouts(made, size=32)
    advantage = np.random.default_rng(0).normal(size=32).astype(np.float32)
    flat = tuple(t for r in made for t in r.transitions)
    return flat, table, advantage


def packed_in(settings: RowSettings, seed: int, share: bool = True) -> PackedBatch:
    transitions = batch()[0]
    order = np.random.default_rng(seed).permutation(len(transitions)).tolist()
    return pack([transitions[i] for i in order], order, settings, share=share)


def by_edge(packed: PackedBatch, values: object) -> dict[tuple[int, int], float]:
    edges, mask = packed.edges, np.asarray(packed.edges.mask)
    keys = zip(np.asarray(edges.transition)[mask].tolist(), np.asarray(edges.k)[mask].tolist(), strict=True)
    return dict(zip(keys, np.asarray(values)[mask].tolist(), strict=True))


def one_by_one(params: object) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies of all edges in order, each transition at the start of a row of its own."""
    transitions = batch()[0]
    tokens, end = np.zeros((len(transitions), 48), np.int32), np.zeros((len(transitions), 48), np.int32)
    for i, t in enumerate(transitions):
        ids = np.concatenate([t.prompt_ids, t.response_ids])
        tokens[i, : len(ids)], end[i, : len(ids)] = ids, len(ids)
    hidden = decoder.forward(params, POLICY.config, tokens, np.broadcast_to(np.arange(48), tokens.shape), end)
    places = [
        (i, len(t.prompt_ids) - 1 + k, token, t.temperature) for i, t in enumerate(transitions) for k, token in enumerate(t.response_ids)
    ]
    row, column, token, temperature = (np.array(x) for x in zip(*places, strict=True))
    logits = decoder.logits(params, POLICY.config, hidden[row, column])
    logp = jax.nn.log_softmax(logits / temperature.astype(np.float32)[:, None])
    return logp[np.arange(len(token)), token], -jnp.sum(jnp.exp(logp) * logp, axis=-1)


@functools.cache
def alone() -> tuple[dict[tuple[int, int], float], float, object]:
    """By edge the log-prob, and the loss and gradients of the whole batch, without rows."""
    transitions, table, advantage = batch()
    pairs = [(i, k) for i, t in enumerate(transitions) for k in range(len(t.response_ids))]
    which, k = (np.array(x, np.int32) for x in zip(*pairs, strict=True))
    flat = lambda name: np.concatenate([getattr(t, name) for t in transitions])  # noqa: E731
    tokens = TokenTable(
        transition=which,
        k=k,
        node=np.zeros_like(k),
        token=flat("response_ids"),
        temperature=np.array([transitions[i].temperature for i in which], np.float32),
        old_logp=flat("logprobs"),
        behaviour_logp=flat("logprobs"),
        ref_logp=np.zeros(len(k), np.float32),
        mask=np.ones(len(k), bool),
    )
    counts, zeros = count_units(table, tokens), np.zeros(len(k), np.float32)

    def objective(params: object) -> tuple[jax.Array, jax.Array]:
        logp, entropy = one_by_one(params)
        inputs = LossInputs(tokens, counts, advantage[which], logp, entropy, zeros, zeros, zeros)
        loss, keep, _ = RECIPE.loss(inputs)
        return safe_divide(*RECIPE.aggregation(jnp.where(keep, loss, 0.0), tokens.mask, counts)), logp

    (loss, logp), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(POLICY.params)
    return dict(zip(pairs, np.asarray(logp).tolist(), strict=True)), float(loss), gradients


@functools.cache
def step() -> TrainStep:
    # A trace that decays at once: the optimizer's state is the gradient itself.
    return TrainStep(POLICY.config, RECIPE, optax.trace(decay=0.0), make_mesh())


@pytest.mark.slow
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("settings", LAYOUTS)
def test_the_layout_changes_no_logprob_loss_or_gradient(settings: RowSettings, share: bool) -> None:
    logps, loss, gradients = alone()
    packed = packed_in(settings, seed=settings.tokens + share, share=share)
    scores = by_edge(packed, step().score(POLICY.params, packed.rows, packed.edges).logp)
    assert scores.keys() == logps.keys()
    close([scores[key] for key in logps], list(logps.values()))

    _, table, advantage = batch()
    # Ratios away from 1 on both sides of the clip: what the sampler said stands for the old policy.
    edges = dataclasses.replace(packed.edges, old_logp=packed.edges.behaviour_logp)
    zeros = np.zeros(edges.mask.shape, np.float32)
    made = EdgeBatch(edges, count_units(table, edges), advantage[edges.transition], zeros, zeros)
    state, metrics = step().update(step().init(POLICY.params), packed.rows, made)
    close(metrics["loss"], loss)
    jax.tree.map(close, state.opt_state.trace, gradients)


def test_calls_share_the_tokens_of_their_trie() -> None:
    first = call([1, 2, 3], [4, 5], 0)
    second = call([1, 2, 3, 4, 5, 6], [7], 1)
    other = call([1, 2, 3], [4, 9], 0)  # of another rollout, which may well begin alike
    packed = pack([second, other, first], range(3), RowSettings((16,), 32, 16))
    assert packed.row_tokens == 5 + 7 + 5
    assert packed.computed_tokens == 7 + 1
    assert packed.reuse_ratio == 17 / 8
    (rows,) = packed.rows
    np.testing.assert_array_equal(rows.tokens[0, :8], [1, 2, 3, 4, 5, 6, 7, 9])
    np.testing.assert_array_equal(rows.positions[0, :8], [0, 1, 2, 3, 4, 5, 6, 4])
    np.testing.assert_array_equal(rows.end[0], [8] * 4 + [7] * 3 + [8] + [0] * 8)
    np.testing.assert_array_equal(packed.edges.transition[0, :5], [2, 2, 0, 1, 1])
    np.testing.assert_array_equal(packed.edges.node[0, :5], [2, 3, 5, 2, 3])
    np.testing.assert_array_equal(packed.edges.token[0, :5], [4, 5, 7, 4, 9])
    np.testing.assert_array_equal(packed.edges.mask[0], [True] * 5 + [False] * 11)


def test_equal_calls_of_more_edges_than_a_micro_batch_holds_are_all_kept() -> None:
    same = [call([1], [2, 3, 4], 0)] * 90
    packed = pack(same, range(90), RowSettings((8,), 16, 8))
    assert packed.edges.mask.shape[1] == 8 * 8  # the largest table
    np.testing.assert_array_equal(np.bincount(packed.edges.transition[packed.edges.mask]), [3] * 90)


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("settings", LAYOUTS)
def test_every_token_is_packed_once_and_within_the_limits(settings: RowSettings, multiple: int) -> None:
    transitions = batch()[0]
    packed = pack(transitions, range(len(transitions)), settings, multiple=multiple)
    for rows in packed.rows:
        count, length = rows.tokens.shape
        assert length in settings.lengths
        assert count % multiple == 0
        assert count * length <= max(settings.tokens, multiple * length)
    assert len(packed.edges.mask) == len(packed.rows)
    times = -(-max(settings.tokens, multiple * settings.lengths[-1]) // settings.tokens)
    assert packed.edges.mask.shape[1] in {times * settings.edges * 2**i for i in range(4)}
    expected = {(i, k): int(token) for i, t in enumerate(transitions) for k, token in enumerate(t.response_ids)}
    assert by_edge(packed, packed.edges.token) == expected
    assert packed.edges.mask.sum() == len(expected)
    assert sum(int((np.asarray(r.end) > 0).sum()) for r in packed.rows) == packed.computed_tokens


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_more_devices_have_fewer_micro_batches(multiple: int) -> None:
    """A row of 16 tokens a device: edges must not run out before the rows of all devices are full."""
    calls = [call(range(10 * n, 10 * n + 12), [1, 2, 3, 4], 0) for n in range(64)]
    packed = pack(calls, range(64), RowSettings((16,), 16, 16), multiple=multiple, share=False)
    assert len(packed.rows) == 64 // multiple and all((r.end > 0).all() for r in packed.rows)


def test_a_greedy_call_is_scored_at_temperature_1() -> None:
    greedy = dataclasses.replace(call([1, 2], [3], 0), temperature=0.0)
    packed = pack([greedy], [0], RowSettings((8,), 8, 8))
    np.testing.assert_array_equal(packed.edges.temperature, np.ones((1, 8), np.float32))


def test_errors_say_what_would_be_right() -> None:
    with pytest.raises(ValueError, match="a call of 9 tokens does not fit a row of 8: raise the row length or lower the context"):
        pack([call(range(8), [1], 0)], [0], RowSettings((8,), 8, 8))
    with pytest.raises(ValueError, match="no transition to train on"):
        pack([], [], RowSettings((8,), 8, 8))
    with pytest.raises(ValueError, match="must ascend"):
        RowSettings((16, 8), 64, 16)
    with pytest.raises(ValueError, match="edges=8 must be at least the longest row, 16"):
        RowSettings((8, 16), 64, 8)
