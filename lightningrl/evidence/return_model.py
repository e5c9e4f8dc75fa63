"""A return model: a small network, apart from the policy, that reads a rollout call by call and predicts its outcome.

A call is x, the mean embedding of its prompt's new tokens, of its response, and the embedding of its role
(`return_features`). A GRU (arXiv 1406.1078) goes over the calls, attention pools them, and three readouts predict:

  after every call      hₜ = GRU(hₜ₋₁, xₜ),  h₀ = 0;   oₜ = w·hₜ + b        RUDDER: gₜ = oₜ        SPA: ĉₜ = oₜ, gₜ = Σₛ≤ₜ ĉₛ
  attention             zₜ = tanh(W xₜ + b),  α = softmaxₜ(q·zₜ);           u·Σₜ αₜ zₜ + c
  of a subset S         h over the calls in S alone, the others left out;   v(S) = w′·h + b′
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lightningrl.credit.shapley import MAX_CALLS
from lightningrl.evidence.return_features import Calls, call_features
from lightningrl.segments import masked_mean
from lightningrl.table import Array, Evidence
from lightningrl.tabulate import table_size, trained_rollouts
from lightningrl.types import Rollout

Field = Literal["predicted_return", "attention", "coalition"]
Kind = Literal["rudder", "spa"]
When = Literal["before", "after"]
Params = dict[str, Any]  # a pytree of arrays
State = dict[str, Any]  # params, opt_state, step: int32 [], loss: float32 [2]
ABSENT = -1e30  # an attention score that no call gets


def init_return_model(
    key: Array, *, buckets: int = 1024, roles: int = 64, width: int = 24, role_width: int = 8, hidden: int = 64, attention_width: int = 32
) -> State:
    """A return model that has seen nothing: it predicts 0, and attends to all calls of a rollout alike.

    50 thousand parameters by default, half of them the embedding of tokens. What it keeps between batches is this tree and nothing else.

    Args:
      key: of the weights.
      buckets, roles: of `return_features.call_features`.
      width, role_width: of the embeddings of a token and of a role.
      hidden, attention_width: of h and of z.

    Returns:
      `params`, `opt_state`, `step` (int32 [], updates done) and `loss` (float32 [2], of the last fit: before its first and before
      its last update; the first is of rollouts that the model had not seen).
    """
    inputs = 2 * width + role_width
    shapes = {
        "gru": {"inputs": (inputs, 3 * hidden), "hidden": (hidden, 3 * hidden), "bias": (3 * hidden,)},
        "attention": {"keys": (inputs, attention_width), "bias": (attention_width,), "query": (attention_width,)},
        "readout": {
            "predicted_return": {"weight": (hidden,), "bias": ()},
            "attention": {"weight": (attention_width,), "bias": ()},
            "coalition": {"weight": (hidden,), "bias": ()},
        },
    }
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves) + 2)
    params: Params = jax.tree.unflatten(tree, [_initial(k, shape) for k, shape in zip(keys[2:], leaves, strict=True)])
    # Rows of the tables are read one at a time: their scale does not depend on how many there are.
    params |= {"token": jax.random.normal(keys[0], (buckets, width)), "role": jax.random.normal(keys[1], (roles, role_width))}
    return {"params": params, "opt_state": _optimizer(0.0).init(params), "step": jnp.int32(0), "loss": jnp.zeros(2, jnp.float32)}


def return_model(
    policy: Any,
    aux: State,
    rollouts: Sequence[Rollout],
    key: Array,
    *,
    fields: Sequence[Field] = ("predicted_return",),
    kind: Kind = "rudder",
    predict: When = "before",
    steps: int = 16,
    learning_rate: float = 3e-3,
    auxiliary: float = 0.5,
    coalition_calls: int | None = None,
    prompt_tokens: int = 128,
    multiple: int = 1,
) -> tuple[Evidence, State]:
    """The evidence producer of `predicted_return`, `attention` and `coalition`: it predicts, then learns from the batch.

    R is the outcome that is trained on; intermediate rewards are not predicted. `steps` updates by Adam on the whole batch
    minimise, of the fields asked for, the sum of the means over rollouts of

      RUDDER  (arXiv 1806.07857)   (g_T - R)² + a · meanₜ (gₜ - R)²            predicting early is the auxiliary task
      SPA     (arXiv 2505.20732)   (Σₜ ĉₜ - R)²
      ABC     (arXiv 2402.00782)   (u·Σₜ αₜ zₜ + c - R)²
      SCAR    (arXiv 2505.20417)   (v(S) - R)², S drawn anew in every step: p ~ U(0, 1), then each call with chance p

    The last is so that v is fitted on what it is asked for: a model of whole rollouts was never shown half of one. With
    predict="before" no rollout is predicted by a model that knows how it ended: g is a fixed function, and what the batch's own
    luck did is in `rudder`'s residual only. It is one batch behind the policy, and the first batch is predicted by a model that knows
    nothing: gₜ = 0, an equal split for `rudder` and `attention_based`, no credit at all for `spa` and `shapley`.
    "after" is nearer to RUDDER, whose buffer of lessons has the rollouts in it that are redistributed; a model that
    knows a rollout's end by heart spreads it as it likes.

    Not as in the papers: theirs are an LSTM on states and actions, a language model with a head, and a reward model's own
    attention; RUDDER takes differences of states as input, chooses lessons by how badly they are predicted, and
    does not use a model whose predictions are too bad. The auxiliary task's weight of a half is that of demonstration code that we saw
    copies of (`continuous_pred_factor`), not checked in the paper.

    Args:
      policy: not read.
      aux: of `init_return_model`.
      rollouts: those of the table, in its order. Rewards should be of the order of 1: the model predicts them as they are.
      key: of the subsets that are drawn for `coalition`; nothing else is random.
      fields: those that are filled; only their readouts are trained, on a shared embedding.
      kind: what `predicted_return` is of; `credit.rudder` and `credit.spa` read either.
      predict: "before" or "after" this batch is learnt from.
      steps: ≥ 1 updates a batch.
      learning_rate: of Adam.
      auxiliary: a ≥ 0.
      coalition_calls: M in 1 … 10; calls from M on are in no coalition. None: 6, 8 or 10, the least that holds every rollout.
      prompt_tokens: of `return_features.call_features`, ≥ 1.
      multiple: N is the least multiple of it that holds the transitions.

    Returns:
      The evidence: `predicted_return` and `attention` float32 [N], 0 at padding, attention summing to 1 over a rollout; `coalition`
      float32 [R′, 2^M] for the R rollouts and then rows of 0, R′ a multiple of 32. And the state after learning.
      Without rollouts zeros, and the state as it was.

    Raises:
      ValueError: an unknown field, kind or time to predict, no steps, no tokens to read, M out of range, or without M a rollout
        of more than ten calls where coalitions are asked for.
    """
    _check(fields, kind, predict, steps, coalition_calls, prompt_tokens)
    used = trained_rollouts(rollouts)
    params = aux["params"]
    calls = call_features(used, buckets=len(params["token"]), roles=len(params["role"]), prompt_tokens=prompt_tokens)
    settings: dict[str, Any] = {"fields": tuple(name for name in get_args(Field) if name in fields), "kind": kind}
    state = aux
    if used:
        state = fit_returns(aux, calls, key, **settings, steps=steps, learning_rate=learning_rate, auxiliary=auxiliary)
    predicting = (aux if predict == "before" else state)["params"]
    of_all = coalition_calls or (_coalition_calls(used) if "coalition" in fields else 1)
    predicted = jax.device_get(predict_returns(predicting, calls, **settings, coalition_calls=of_all))
    size = table_size(int(calls.exists.sum()), multiple)
    exists = np.asarray(calls.exists)
    return Evidence(**{name: x if name == "coalition" else _in_table(x, exists, size) for name, x in predicted.items()}), state


@functools.partial(jax.jit, static_argnames=("fields", "kind", "steps", "learning_rate", "auxiliary"))
def fit_returns(
    state: State, calls: Calls, key: Array, *, fields: tuple[Field, ...], kind: Kind, steps: int, learning_rate: float, auxiliary: float
) -> State:
    """The state after `steps` updates on these rollouts."""
    optimizer = _optimizer(learning_rate)

    def update(carry: tuple[Params, Any, jax.Array], _: None) -> tuple[tuple[Params, Any, jax.Array], jax.Array]:
        params, opt_state, step = carry
        loss, gradient = jax.value_and_grad(_loss)(params, calls, jax.random.fold_in(key, step), fields, kind, auxiliary)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, step + 1), loss

    start = (state["params"], state["opt_state"], state["step"])
    (params, opt_state, step), losses = jax.lax.scan(update, start, None, length=steps)
    return {"params": params, "opt_state": opt_state, "step": step, "loss": losses[jnp.array([0, -1])]}


@functools.partial(jax.jit, static_argnames=("fields", "kind", "coalition_calls"))
def predict_returns(params: Params, calls: Calls, *, fields: tuple[Field, ...], kind: Kind, coalition_calls: int) -> dict[str, jax.Array]:
    """`predicted_return` and `attention` float32 [R, T], `coalition` float32 [R, 2^M]; those asked for, with 0 for padding."""
    inputs = _inputs(params, calls)
    result = {}
    if "predicted_return" in fields:
        after = _after_calls(params, _hidden(params, inputs, calls.exists), calls.exists, kind)
        result["predicted_return"] = jnp.where(calls.exists, after, 0.0)
    if "attention" in fields:
        result["attention"] = _attend(params, inputs, calls.exists)[0]
    if "coalition" in fields:
        result["coalition"] = jnp.where(calls.exists[:, :1], _coalitions(params, inputs, calls.exists, coalition_calls), 0.0)
    return result


def _loss(params: Params, calls: Calls, key: Array, fields: tuple[Field, ...], kind: Kind, auxiliary: float) -> jax.Array:
    inputs = _inputs(params, calls)
    rollout_exists = calls.exists[:, 0]
    seen = {"predicted_return": calls.exists, "coalition": calls.exists & _some_calls(key, *calls.exists.shape)}
    seen = {name: included for name, included in seen.items() if name in fields}
    hidden = {}
    if seen:  # one pass of the GRU for both: half as much to compile
        both = _hidden(params, jnp.tile(inputs, (len(seen), 1, 1)), jnp.concatenate(list(seen.values())))
        hidden = dict(zip(seen, jnp.split(both, len(seen)), strict=True))

    def mean_square(predicted: Array) -> jax.Array:
        return masked_mean((predicted - calls.outcome) ** 2, rollout_exists)

    loss = jnp.float32(0.0)
    if "predicted_return" in fields:
        after = _after_calls(params, hidden["predicted_return"], calls.exists, kind)
        loss += mean_square(after[:, -1])
        if kind == "rudder":
            share = calls.exists / jnp.maximum(jnp.sum(calls.exists, 1, keepdims=True), 1)
            loss += auxiliary * masked_mean(jnp.sum(share * (after - calls.outcome[:, None]) ** 2, 1), rollout_exists)
    if "attention" in fields:
        loss += mean_square(_attend(params, inputs, calls.exists)[1])
    if "coalition" in fields:
        loss += mean_square(_read(params, "coalition", hidden["coalition"][:, -1]))
    return loss


def _some_calls(key: Array, rollouts: int, turns: int) -> jax.Array:
    """Subsets of all sizes alike, as the Shapley value weighs them: bool [R, T]."""
    uniform = jax.random.uniform(key, (rollouts, turns + 1))
    return uniform[:, 1:] < uniform[:, :1]


def _inputs(params: Params, calls: Calls) -> jax.Array:
    """x, float32 [R, T, inputs]."""
    rows, turns = calls.exists.shape
    embedded = params["token"][calls.token] * calls.share[:, None]
    means = jax.ops.segment_sum(embedded, calls.place, rows * turns * 2)
    return jnp.concatenate([means.reshape(rows, turns, -1), params["role"][calls.role]], -1)


def _hidden(params: Params, inputs: Array, included: Array) -> jax.Array:
    """h after every turn, float32 [R, T, hidden]; a call that is not included leaves it as it was."""

    def step(h: jax.Array, call: tuple[Array, Array]) -> tuple[jax.Array, jax.Array]:
        h = _next(params["gru"], h, *call)
        return h, h

    start = jnp.zeros((len(inputs), params["gru"]["hidden"].shape[0]))
    _, hidden = jax.lax.scan(step, start, (jnp.swapaxes(inputs @ params["gru"]["inputs"], 0, 1), included.T))
    return jnp.swapaxes(hidden, 0, 1)


def _next(gru: Params, h: Array, from_input: Array, included: Array) -> jax.Array:
    """One step of the GRU of R rollouts, with the reset gate on what h adds to the candidate."""
    reset, update, candidate = jnp.split(from_input + gru["bias"], 3, -1)
    of_reset, of_update, of_candidate = jnp.split(h @ gru["hidden"], 3, -1)
    keep = jax.nn.sigmoid(update + of_update)
    new = jnp.tanh(candidate + jax.nn.sigmoid(reset + of_reset) * of_candidate)
    return jnp.where(included[..., None], keep * h + (1.0 - keep) * new, h)


def _after_calls(params: Params, hidden: Array, exists: Array, kind: Kind) -> jax.Array:
    """gₜ, float32 [R, T]; from a rollout's last call on the same."""
    output = _read(params, "predicted_return", hidden)
    return output if kind == "rudder" else jnp.cumsum(jnp.where(exists, output, 0.0), 1)


def _attend(params: Params, inputs: Array, exists: Array) -> tuple[jax.Array, jax.Array]:
    """α, float32 [R, T], and the prediction, float32 [R]."""
    p = params["attention"]
    z = jnp.tanh(inputs @ p["keys"] + p["bias"])
    alpha = jnp.where(exists, jax.nn.softmax(jnp.where(exists, z @ p["query"], ABSENT), 1), 0.0)
    return alpha, _read(params, "attention", jnp.einsum("rt,rtd->rd", alpha, z))


def _coalitions(params: Params, inputs: Array, exists: Array, calls: int) -> jax.Array:
    """v, float32 [R, 2^M]. The subsets of the first t+1 calls are those of the first t, without and with call t."""
    missing = max(calls - exists.shape[1], 0)
    from_inputs = jnp.pad(inputs @ params["gru"]["inputs"], ((0, 0), (0, missing), (0, 0)))
    there = jnp.pad(exists, ((0, 0), (0, missing)))
    h = jnp.zeros((len(inputs), 1, params["gru"]["hidden"].shape[0]))
    for t in range(calls):
        with_it = _next(params["gru"], h, from_inputs[:, t, None], there[:, t, None])
        h = jnp.concatenate([h, with_it], 1)
    return _read(params, "coalition", h)


def _read(params: Params, name: Field, hidden: Array) -> jax.Array:
    readout = params["readout"][name]
    return hidden @ readout["weight"] + readout["bias"]


def _initial(key: Array, shape: tuple[int, ...]) -> jax.Array:
    """Matrices of standard deviation 1/√fan-in; vectors, which are readouts, biases and the query, 0."""
    return jax.random.normal(key, shape) / math.sqrt(shape[0]) if len(shape) == 2 else jnp.zeros(shape)


def _optimizer(learning_rate: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))


def _coalition_calls(rollouts: Sequence[Rollout]) -> int:
    """M for these rollouts: few different ones, since each is a shape that programs are compiled for."""
    longest = max((len(rollout.transitions) for rollout in rollouts), default=0)
    if longest > MAX_CALLS:
        raise ValueError(f"a rollout has {longest} calls, but coalitions are of {MAX_CALLS} at most: use a recipe such as rudder.")
    return next(m for m in (6, 8, MAX_CALLS) if longest <= m)


def _in_table(values: np.ndarray, exists: np.ndarray, size: int) -> np.ndarray:
    """[R, T] in the table's order, float32 [N]."""
    result = np.zeros(size, np.float32)
    result[: exists.sum()] = values[exists]
    return result


def _check(fields: Sequence[str], kind: str, predict: str, steps: int, coalition_calls: int | None, prompt_tokens: int) -> None:
    for what, given, known in (("field", fields, Field), ("kind", [kind], Kind), ("predict", [predict], When)):
        for name in given:
            if name not in get_args(known):
                raise ValueError(f"return_model has no {what} {name!r}: choose of {', '.join(get_args(known))}.")
    if steps < 1:
        raise ValueError(f"return_model learns in {steps} steps a batch: it needs at least one.")
    if coalition_calls is not None and not 1 <= coalition_calls <= MAX_CALLS:
        raise ValueError(f"return_model makes coalitions of {coalition_calls} calls: choose 1 to {MAX_CALLS}.")
    if prompt_tokens < 1:
        raise ValueError(f"return_model reads {prompt_tokens} tokens of a prompt: it needs at least one.")
