"""Supervised training on demonstrations, through the same train step as reinforcement learning.

A demonstration is a run of an agent whose calls somebody else answered: transitions with a response and no reward. It is
encoded as the gateway would have recorded it, so that the policy later meets the very tokens that it was shown.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lightningrl import losses
from lightningrl.checkpoint import load_params, save_params
from lightningrl.distributed import from_first, is_first
from lightningrl.gateway.protocol import Message, Tool
from lightningrl.gateway.rendering import Renderer
from lightningrl.model.config import ModelConfig
from lightningrl.model.params import Params, shapes
from lightningrl.packing.rows import PackedBatch, RowSettings, pack
from lightningrl.recipe import Recipe
from lightningrl.recipes import get_recipe
from lightningrl.sharding import HOST, batch_multiple, gathered
from lightningrl.table import TokenTable, UnitCounts
from lightningrl.train import EdgeBatch, OptimizerSettings, TrainStep, make_optimizer
from lightningrl.types import DemonstratedCall, Transition

IMITATION: Recipe = dataclasses.replace(
    get_recipe("lightningrl_paper"),
    name="imitation",
    use_when="there are demonstrations: maximum likelihood of their responses",
    loss=losses.negative_log_likelihood,
    aggregation=losses.token_mean,
)


Demonstration = Sequence[DemonstratedCall]  # the calls of one run, in order


@dataclasses.dataclass(frozen=True)
class ImitationSettings:
    steps: int  # updates on responses
    reading_steps: int = 0  # updates before those, on every token of the calls: a new policy first learns to read
    learning_rate: float = 4e-3
    tokens_per_step: int = 4096
    warmup_steps: int = 20
    weight_decay: float = 0.0

    @property
    def total(self) -> int:
        return self.reading_steps + self.steps


def encode(demonstration: Demonstration, renderer: Renderer) -> list[Transition]:
    """Token ids of a demonstration's calls; one that goes on from an earlier one extends its ids exactly."""
    done: list[tuple[list[dict[str, Any]], np.ndarray, Transition]] = []
    for turn, call in enumerate(demonstration):
        messages = [dict(m) for m in call.messages]
        ids, continues = _prompt_ids(messages, call.tools, done, renderer)
        response = np.array([*renderer.raw(call.response), renderer.end_id], np.int32)
        transition = Transition(
            prompt_ids=ids,
            response_ids=response,
            logprobs=np.zeros(len(response), np.float32),
            temperature=1.0,
            policy_version=0,
            role=call.role,
            turn=turn,
            continues=continues,
            text=call.response,
        )
        answered = [*messages, {"role": "assistant", "content": call.response}]
        done.append((answered, np.concatenate([ids, response]), transition))
    return [transition for _, _, transition in done]


def _prompt_ids(
    messages: list[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    done: list[tuple[list[dict[str, Any]], np.ndarray, Transition]],
    renderer: Renderer,
) -> tuple[np.ndarray, int | None]:
    for turn in range(len(done) - 1, -1, -1):
        answered, ids, _ = done[turn]
        if messages[: len(answered)] == answered:
            new = renderer.continuation([Message.model_validate(m) for m in messages[len(answered) :]], ended=True)
            if new is not None:
                return np.concatenate([ids, np.array(new, np.int32)]), turn
    offered = [Tool.model_validate(tool) for tool in tools]
    return np.array(renderer.prompt([Message.model_validate(m) for m in messages], offered), np.int32), None


def imitate(
    params: Params,
    config: ModelConfig,
    demonstrations: Sequence[Sequence[Transition]],
    settings: ImitationSettings,
    rows: RowSettings,
    mesh: Mesh,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Params:
    """Trains on demonstrations in seeded order, each pass in another one, for `settings.total` updates.

    Args:
      demonstrations: encoded; one is never cut in two.
      on_step: called with the step and its loss, a few steps late, so that nothing waits for the device.
    """
    optimizer = make_optimizer(
        OptimizerSettings(
            learning_rate=settings.learning_rate,
            warmup_steps=min(settings.warmup_steps, settings.total // 10),
            total_steps=settings.total,
            weight_decay=settings.weight_decay,
        )
    )
    step = TrainStep(config, IMITATION, optimizer, mesh)
    state = step.init(params)
    # One shape for both, so that the step is compiled once; when everything is read, every token is an edge.
    rows = dataclasses.replace(rows, edges=rows.tokens) if settings.reading_steps else rows
    reading = _batches([reading_of(d) for d in demonstrations], settings, rows, batch_multiple(mesh), seed)
    answering = _batches(demonstrations, settings, rows, batch_multiple(mesh), seed)
    late: list[tuple[int, jax.Array]] = []
    for i in range(settings.total):
        packed = next(reading if i < settings.reading_steps else answering)
        state, metrics = step.update(state, packed.rows, _edges_of(packed))
        late.append((i, metrics["loss"]))
        if len(late) > 8:
            on_step(late[0][0], float(late.pop(0)[1]))
    for i, loss in late:
        on_step(i, float(loss))
    return state.params


def _batches(
    demonstrations: Sequence[Sequence[Transition]], settings: ImitationSettings, rows: RowSettings, multiple: int, seed: int
) -> Any:
    sizes = [_computed_tokens(d) for d in demonstrations]
    epoch, chosen, tokens = 0, [], 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(demonstrations))
        for d in order:
            chosen.append(demonstrations[d])
            tokens += sizes[d]
            if tokens >= settings.tokens_per_step:
                flat = [t for demonstration in chosen for t in demonstration]
                yield pack(flat, range(len(flat)), rows, multiple=multiple)
                chosen, tokens = [], 0
        epoch += 1


def reading_of(demonstration: Sequence[Transition]) -> list[Transition]:
    """The same calls with every token but the first to be predicted, prompts included."""
    continued = {t.continues for t in demonstration}
    whole = []
    for t in demonstration:
        if t.turn not in continued:
            rest = np.concatenate([t.prompt_ids[1:], t.response_ids])
            logprobs = np.zeros(len(rest), np.float32)
            whole.append(dataclasses.replace(t, prompt_ids=t.prompt_ids[:1], response_ids=rest, logprobs=logprobs, continues=None))
    return whole


def _computed_tokens(demonstration: Sequence[Transition]) -> int:
    """A call that a later one goes on from is computed with it."""
    continued = {t.continues for t in demonstration}
    return sum(len(t.prompt_ids) + len(t.response_ids) for t in demonstration if t.turn not in continued)


def _edges_of(packed: PackedBatch) -> EdgeBatch:
    """Edges for a loss of every token alike: advantages and unit sizes are not looked at."""
    zeros = np.zeros(packed.edges.mask.shape, np.float32)
    tokens: TokenTable = packed.edges
    return EdgeBatch(
        tokens=tokens,
        counts=UnitCounts(sequence_tokens=zeros, rollout_tokens=zeros, group_tokens=zeros),
        advantage=zeros,
        old_value=zeros,
        value_target=zeros,
    )


def cached(
    directory: Path, key: Mapping[str, Any], arrays: Sequence[np.ndarray], config: ModelConfig, make: Callable[[], Params]
) -> Params:
    """`make()`, or what it returned for the same content before.

    With several processes, all make it together unless process 0 has it, which then is the only one that gets it; the others get {}.

    Args:
      key, arrays: all that the result depends on, hashed; the versions of jax are added.
    """
    digest = hashlib.sha256(json.dumps({"key": dict(key), "jax": jax.__version__}, sort_keys=True).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    place = directory / digest.hexdigest()[:32]
    if from_first(lambda: (place / "model.safetensors").exists() and (place / "config.json").exists()):
        return load_params(place, shapes(config)) if is_first() else {}
    params = gathered(make(), HOST)
    if not is_first():
        return params
    partial = directory / f"{place.name}.{os.getpid()}"
    save_params(partial, params, dataclasses.asdict(config))
    try:
        os.replace(partial, place)
    except OSError:  # another process was first, with the same content
        pass
    return jax.tree.map(jnp.asarray, params)
