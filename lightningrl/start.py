"""The policy that a run starts from: one from a folder or a new one, after imitation where there are demonstrations."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lightningrl.config import FitConfig, cache_folder
from lightningrl.distributed import from_first, is_first, wait_for_all
from lightningrl.errors import UserError, settings_of_a_person
from lightningrl.gateway.rendering import Renderer
from lightningrl.model.config import ModelConfig
from lightningrl.model.params import init_params
from lightningrl.packing.rows import RowSettings
from lightningrl.policy import Policy, load_policy, save_policy
from lightningrl.progress import Progress
from lightningrl.sharding import HOST, gathered, params_sharding, place
from lightningrl.tokenizer import train_tokenizer
from lightningrl.types import DemonstratedCall, Task, Transition
from lightningrl.warm_start import Demonstration, ImitationSettings, cached, encode, imitate

TOO_LONG = 0.05  # share of the demonstrations that may be left out of the warm start because they do not fit the context


def starting_policy(
    config: FitConfig, out: Path, demonstrations: Sequence[Demonstration], tasks: Sequence[Task], *, critic: bool, mesh: Mesh
) -> Policy:
    """The policy of `--policy`, or a new one; after imitation where there are demonstrations. Kept in OUT/start.

    Its parameters lie as training has them. One that is read lies so from the start; a new one, or one after imitation, is whole on one
    device before.
    """
    if from_first((out / "start" / "config.json").exists):
        return load_policy(out / "start", mesh=mesh)
    policy = load_policy(Path(config.policy), mesh=mesh) if config.policy else new_policy(config, demonstrations, tasks, critic=critic)
    policy = with_value_head(policy) if critic else policy
    if demonstrations and config.imitation_steps:
        policy = warm_started(policy, config, demonstrations, mesh)
    whole = gathered(policy.params, HOST if is_first() else None)
    if is_first():
        save_policy(out / "start", dataclasses.replace(policy, params=whole))
    wait_for_all("the policy to start from")
    if jax.process_count() > 1:
        return load_policy(out / "start", mesh=mesh)
    return dataclasses.replace(policy, params=place(policy.params, params_sharding(policy.config, mesh)))


def new_policy(config: FitConfig, demonstrations: Sequence[Demonstration], tasks: Sequence[Task], *, critic: bool) -> Policy:
    """A small random decoder of Qwen 3's kind, and a tokenizer trained on what the agent will read and write.

    Its normalised queries and keys bear the warm start's high learning rate: after the same updates, held-out first drafts
    that are right or one of the demonstrator's own mistakes were 0.49, against 0.36 without them.
    """
    texts = [text for demo in demonstrations for call in demo for text in texts_of(call)]
    texts += [json.dumps(dict(task.input), ensure_ascii=False) for task in tasks] if not demonstrations else []
    if config.hidden_size % config.num_heads:
        raise UserError(f"hidden_size={config.hidden_size} must be a multiple of num_heads={config.num_heads}")
    with settings_of_a_person():
        tokenizer = train_tokenizer(texts, config.vocab_size)
        shape = ModelConfig(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.hidden_size // config.num_heads,
            intermediate_size=config.intermediate_size,
            max_positions=config.context_length,
            qk_norm=True,
            value_head=critic,
        )
    return Policy(shape, init_params(shape, jax.random.key(config.seed)), tokenizer)


def texts_of(call: DemonstratedCall) -> list[str]:
    """What a call reads and writes."""
    catalogue = [tool["function"].get(part) or "" for tool in call.tools for part in ("name", "description")]
    return [*catalogue, *(str(message["content"]) for message in call.messages), call.response]


def with_value_head(policy: Policy) -> Policy:
    """The policy with a critic, which values everything 0 at first; one that has a critic as it is."""
    if policy.config.value_head:
        return policy
    params = {**policy.params, "value_head": jnp.zeros((policy.config.hidden_size,), jnp.float32)}
    return dataclasses.replace(policy, config=dataclasses.replace(policy.config, value_head=True), params=params)


def warm_started(policy: Policy, config: FitConfig, demonstrations: Sequence[Demonstration], mesh: Mesh) -> Policy:
    """The policy after imitation; from the cache if the same was done before."""
    renderer = Renderer(policy.tokenizer)
    encoded = that_fit([encode(demonstration, renderer) for demonstration in demonstrations], config.context_length)
    settings = ImitationSettings(
        steps=config.imitation_steps,
        reading_steps=0 if config.policy else config.reading_steps,
        learning_rate=config.imitation_learning_rate,
    )
    arrays = [ids for demo in encoded for t in demo for ids in (t.prompt_ids, t.response_ids)]
    arrays += jax.tree.leaves(gathered(policy.params, HOST))
    key = {"settings": dataclasses.asdict(settings), "config": dataclasses.asdict(policy.config), "seed": config.seed}

    def make() -> Any:
        with Progress.imitation(settings.total) as on_step:
            return imitate(policy.params, policy.config, encoded, settings, row_settings(config), mesh, config.seed, on_step)

    params = cached(cache_folder(config) / "warm_starts", key, arrays, policy.config, make)
    return dataclasses.replace(policy, params=params)


def that_fit(demonstrations: Sequence[Sequence[Transition]], context_length: int) -> list[Sequence[Transition]]:
    """The demonstrations whose calls all fit. Few may be left out: a policy would else be warm on the short tasks alone.

    Raises:
      UserError: a share of more than `TOO_LONG` is too long; the sentence says what length would hold them all.
    """
    longest = [max(len(t.prompt_ids) + len(t.response_ids) for t in demo) for demo in demonstrations]
    fit = [demo for demo, tokens in zip(demonstrations, longest, strict=True) if tokens <= context_length]
    left_out = len(demonstrations) - len(fit)
    if left_out > TOO_LONG * len(demonstrations):
        raise UserError(
            f"{left_out} of {len(demonstrations)} demonstrations have a call of more tokens than context_length={context_length}: "
            f"the longest has {max(longest)}"
        )
    if left_out:
        print(f"{left_out} of {len(demonstrations)} demonstrations are longer than context_length={context_length} and left out")
    return fit


def row_settings(config: FitConfig) -> RowSettings:
    """One row length, that of the context: every further one costs a compilation of the step."""
    length, usual = config.context_length, RowSettings()
    return RowSettings(lengths=(length,), tokens=max(usual.tokens, length), edges=max(usual.edges, length))
