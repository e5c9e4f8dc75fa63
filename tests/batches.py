"""Batches of rollouts for tests: hand-written and drawn by hypothesis."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from hypothesis import strategies as st

from lightningrl.losses import Metrics, count_units
from lightningrl.recipe import Recipe
from lightningrl.table import Array, Evidence, LossInputs, TokenTable, TransitionTable
from lightningrl.tabulate import table_from_rollouts
from lightningrl.types import Rollout, Status, Task, Transition

SIZE = 40  # holds every drawn batch: 3 groups × 3 rollouts × 4 transitions
EDGES = 128  # and its edges: at most 3 tokens a response


def make_rollout(
    group: str,
    outcome: float,
    rewards: Sequence[float] = (0.0,),
    *,
    lengths: Sequence[int] | None = None,
    roles: Sequence[str] | None = None,
    trainable: Sequence[bool] | None = None,
    status: Status = "ok",
    name: str = "r",
) -> Rollout:
    """A rollout with one transition for each reward."""
    calls = len(rewards)
    transitions = tuple(
        Transition(
            prompt_ids=np.arange(3, dtype=np.int32),
            response_ids=np.arange(length, dtype=np.int32),
            logprobs=np.full(length, -1.0, np.float32),
            temperature=1.0,
            policy_version=0,
            role=role,
            turn=turn,
            reward=reward,
            trainable=trained,
        )
        for turn, (reward, length, role, trained) in enumerate(
            zip(rewards, lengths or (1,) * calls, roles or ("policy",) * calls, trainable or (True,) * calls, strict=True)
        )
    )
    return Rollout(
        id=name,
        task=Task(id=group, input={}),
        group=group,
        sample=0,
        attempt=0,
        transitions=transitions,
        outcome={"reward": outcome},
        status=status,
    )


def make_table(*rollouts: Rollout, size: int | None = None) -> TransitionTable:
    return table_from_rollouts(rollouts, size=size or sum(len(r.transitions) for r in rollouts))


def make_tokens(table: TransitionTable, size: int | None = None, *, seed: int = 0) -> TokenTable:
    """An edge for every response token, in order; a loss is wanted where the transition is trainable."""
    rng = np.random.default_rng(seed)
    pairs = [(n, k) for n in range(len(table.valid)) if table.valid[n] for k in range(int(table.num_tokens[n]))]
    size = size or len(pairs)
    transition, k, mask = np.zeros(size, np.int32), np.zeros(size, np.int32), np.zeros(size, bool)
    for e, (n, index) in enumerate(pairs):
        transition[e], k[e], mask[e] = n, index, table.trainable[n]
    logp = rng.uniform(-3, -0.1, (3, size)).astype(np.float32)
    return TokenTable(
        transition=transition,
        k=k,
        node=np.arange(size, dtype=np.int32),
        token=np.zeros(size, np.int32),
        temperature=np.ones(size, np.float32),
        old_logp=logp[0],
        behaviour_logp=logp[1],
        ref_logp=logp[2],
        mask=mask,
    )


def make_inputs(table: TransitionTable, tokens: TokenTable, *, seed: int = 0) -> LossInputs:
    rng = np.random.default_rng(seed)
    shape = np.shape(tokens.mask)
    draw = lambda low, high: rng.uniform(low, high, shape).astype(np.float32)  # noqa: E731
    return LossInputs(
        tokens=tokens,
        counts=jax.jit(count_units)(table, tokens),
        advantage=draw(-2, 2),
        logp=draw(-3, -0.1),
        entropy=draw(0, 2),
        value=draw(-1, 1),
        old_value=draw(-1, 1),
        value_target=draw(-1, 1),
    )


def loss_of(recipe: Recipe, inputs: LossInputs) -> tuple[Array, Array, Metrics]:
    """The recipe's loss of a whole batch, with its selection."""
    return recipe.loss(inputs) if recipe.select is None else recipe.loss(inputs, selected=recipe.select(inputs, key=jax.random.key(0)))


def poison(tree, mask):
    """NaN in every float array wherever the mask is false."""

    def spoil(x):
        x = np.asarray(x)
        if not np.issubdtype(x.dtype, np.floating):
            return x
        return np.where(np.reshape(mask, np.shape(mask) + (1,) * (x.ndim - np.ndim(mask))), x, np.float32(np.nan))

    return jax.tree.map(spoil, tree)


def poison_table(table: TransitionTable) -> TransitionTable:
    return poison(table, table.valid)


OF_PAIRS = ("branch_value", "branch_count", "potential", "answer_logp")  # float32 [N, 2]
OF_TOKENS = ("token_value", "sum_pi2", "prm_logp", "prm_ref_logp")  # float32 [E]


def make_evidence(table: TransitionTable, tokens: TokenTable) -> Evidence:
    """Every field, drawn within its range."""
    drawn, size = np.random.default_rng(0), len(table.valid)
    shapes = dict.fromkeys(OF_PAIRS, (size, 2)) | dict.fromkeys(OF_TOKENS, tokens.mask.shape) | {"coalition": (size, 2**3)}
    low = {"sum_pi2": 0.1, "branch_count": 1.0, "attention": 0.0, "answer_logp": -2.0}
    names = [field.name for field in dataclasses.fields(Evidence)]
    return Evidence(**{n: drawn.uniform(low.get(n, -1.0), 1.0, shapes.get(n, (size,))).astype(np.float32) for n in names})


def poison_evidence(evidence: Evidence, table: TransitionTable, tokens: TokenTable) -> Evidence:
    """NaN at padding of each field; `coalition` is of rollouts and has none."""
    fields = {field.name: getattr(evidence, field.name) for field in dataclasses.fields(Evidence) if field.name != "coalition"}
    return dataclasses.replace(evidence, **{n: poison(x, tokens.mask if n in OF_TOKENS else table.valid) for n, x in fields.items()})


def with_padding(rollouts: Sequence[Rollout], extra: int) -> TransitionTable:
    return make_table(*rollouts, size=sum(len(r.transitions) for r in rollouts) + extra)


@st.composite
def batches(draw, *, integers: bool = False) -> list[Rollout]:
    """Up to three groups of up to three rollouts of up to four calls, interleaved; with `integers`, exact in float32."""
    number = st.integers(-4, 4).map(float) if integers else st.floats(-2, 2, width=32)
    rollouts = []
    for group in range(draw(st.integers(1, 3))):
        for _ in range(draw(st.integers(1, 3))):
            calls = draw(st.integers(1, 4))
            rollouts.append(
                make_rollout(
                    f"g{group}",
                    draw(number),
                    [draw(number) for _ in range(calls)],
                    lengths=[draw(st.integers(1, 3)) for _ in range(calls)],
                    roles=[draw(st.sampled_from(["writer", "checker"])) for _ in range(calls)],
                    trainable=[draw(st.booleans()) for _ in range(calls)],
                )
            )
    order = draw(st.permutations(range(len(rollouts))))
    return [dataclasses.replace(rollouts[i], id=f"r{i}") for i in order]


def by_rollout(rollouts: Sequence[Rollout], per_transition: np.ndarray) -> dict[str, list[float]]:
    """Results keyed by rollout, to compare batches in which rollouts stand elsewhere."""
    result, row = {}, 0
    for rollout in rollouts:
        result[rollout.id] = [float(x) for x in per_transition[row : row + len(rollout.transitions)]]
        row += len(rollout.transitions)
    return result
