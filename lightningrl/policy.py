"""A policy on disk: weights, the decoder's shape, and the tokenizer with its chat template, in one folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from transformers import PreTrainedTokenizerFast

from lightningrl.checkpoint import load_config, load_params, save_params
from lightningrl.errors import UserError
from lightningrl.model.config import ModelConfig, RopeScaling
from lightningrl.model.params import Params, shapes


@dataclasses.dataclass(frozen=True)
class Policy:
    """What answers an agent's calls."""

    config: ModelConfig
    params: Params
    tokenizer: Any  # a transformers fast tokenizer with a chat template


def save_policy(directory: Path, policy: Policy) -> None:
    """Writes `model.safetensors`, `config.json` and the tokenizer's files."""
    directory.mkdir(parents=True, exist_ok=True)
    policy.tokenizer.save_pretrained(directory)
    save_params(directory, jax.device_get(policy.params), dataclasses.asdict(policy.config))


def load_policy(directory: Path) -> Policy:
    """Reads what `save_policy` wrote. Raises UserError with one sentence if the folder holds no policy of ours."""
    if not directory.is_dir():
        raise UserError(f"there is no policy at {directory}: give a folder that a run has left, such as OUT/policy")
    fields = load_config(directory)
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown := sorted(fields.keys() - known):
        raise UserError(f"{directory}/config.json is not of a policy of ours: it has the unknown setting {unknown[0]!r}")
    try:
        scaling = fields.pop("rope_scaling", None)
        config = ModelConfig(**fields, rope_scaling=None if scaling is None else RopeScaling(**scaling))
    except (TypeError, ValueError) as error:
        raise UserError(f"{directory}/config.json does not describe a decoder: {error}") from error
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    return Policy(config, load_params(directory, shapes(config)), tokenizer)
