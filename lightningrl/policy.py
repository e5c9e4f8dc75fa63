"""A policy on disk: weights, the decoder's shape, and the tokenizer with its chat template, in one folder.

A folder is ours (`save_policy`: what a run leaves), or a Hugging Face checkpoint (`export_policy`, or from elsewhere).
`load_policy` takes both; `model_type` in `config.json` tells them apart.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from lightningrl.checkpoint import load_config, save_params
from lightningrl.errors import UserError
from lightningrl.model.config import ModelConfig, RopeScaling
from lightningrl.model.hf import VALUE_HEAD, load_arrays, save_hf
from lightningrl.model.hf_config import config_from_hf
from lightningrl.model.hf_layout import hf_sources, own_sources
from lightningrl.model.params import Params
from lightningrl.sharding import params_sharding

GENERATION = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class Policy:
    """What answers an agent's calls."""

    config: ModelConfig
    params: Params
    tokenizer: Any  # a transformers fast tokenizer with a chat template
    end_ids: tuple[int, ...] = ()  # tokens that end an answer besides the tokenizer's eos, as a checkpoint's generation config has it


def save_policy(directory: Path, policy: Policy) -> None:
    """Writes `model.safetensors`, `config.json`, `generation_config.json` and the tokenizer's files."""
    directory.mkdir(parents=True, exist_ok=True)
    policy.tokenizer.save_pretrained(directory)
    (directory / GENERATION).write_text(json.dumps(_token_ids(policy), indent=2) + "\n", encoding="utf-8")
    save_params(directory, jax.device_get(policy.params), dataclasses.asdict(policy.config))


def export_policy(directory: Path, policy: Policy, *, dtype: Any = None, max_file_mb: float = 5000) -> None:
    """Writes a Hugging Face checkpoint that `transformers`, and what reads its format, loads: see `model.hf.save_hf`.

    A critic goes to `value_head.safetensors`, which `load_policy` reads and others ignore.

    Raises:
      UserError: no architecture of `transformers` computes what the policy's decoder does.
    """
    ids = _token_ids(policy)
    save_hf(directory, policy.params, policy.config, dtype=dtype, max_file_mb=max_file_mb, token_ids=ids)
    policy.tokenizer.save_pretrained(directory)
    _name_as_before(directory / "tokenizer_config.json")
    (directory / GENERATION).write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")


def load_policy(directory: Path, *, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Policy:
    """Reads a policy that `save_policy` wrote, or a Hugging Face checkpoint of Llama 3.x, Qwen 2.5 or Qwen 3 (dense).

    Args:
      dtype: of the parameters, whatever that of the files.
      mesh: where the parameters go, by the rules of `sharding.py`, each device's part read by itself; None: this process' first device.

    Raises:
      UserError: the folder holds neither, or what it holds is broken; one sentence says which file and why.
    """
    if not directory.is_dir():
        raise UserError(
            f"there is no policy at {directory}: give a folder that a run has left, such as OUT/policy, or a Hugging Face checkpoint"
        )
    fields = load_config(directory)
    theirs = "model_type" in fields
    if theirs:
        config = config_from_hf(fields, f"{directory}/config.json")
        config = dataclasses.replace(config, value_head=(directory / VALUE_HEAD).exists())
    else:
        config = _own_config(fields, directory)
    tokenizer = _load_tokenizer(directory)
    end_ids = _end_ids(directory, fields if theirs else {})
    if tokenizer.eos_token is None and end_ids:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_ids[0])
    shardings = None if mesh is None else params_sharding(config, mesh)
    sources = hf_sources(config) if theirs else own_sources(config)
    params = load_arrays(directory, config, sources, dtype=dtype, shardings=shardings)
    return Policy(config, params, tokenizer, tuple(i for i in end_ids if i != tokenizer.eos_token_id))


def _own_config(fields: dict[str, Any], directory: Path) -> ModelConfig:
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown := sorted(fields.keys() - known):
        raise UserError(f"{directory}/config.json is not of a policy of ours: it has the unknown setting {unknown[0]!r}")
    try:
        scaling = fields.pop("rope_scaling", None)
        return ModelConfig(**fields, rope_scaling=None if scaling is None else RopeScaling(**scaling))
    except (TypeError, ValueError) as error:
        raise UserError(f"{directory}/config.json does not describe a decoder: {error}") from error


def _load_tokenizer(directory: Path) -> Any:
    if not (directory / "tokenizer.json").exists():
        raise UserError(f"{directory} has no tokenizer.json: a policy is kept with its tokenizer, in the format of fast tokenizers")
    try:
        return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for a broken file
        raise UserError(f"the tokenizer in {directory} cannot be read: {error}") from error


def _end_ids(directory: Path, fields: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end an answer: by the generation config, else by the model's."""
    path = directory / GENERATION
    try:
        generation = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        ids = generation.get("eos_token_id", fields.get("eos_token_id"))
        return tuple(int(i) for i in (ids if isinstance(ids, list) else [ids]) if i is not None)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as a generation config ({error})") from error


def _name_as_before(path: Path) -> None:
    """Gives class and special tokens the names that `transformers` 4 knows; version 5 takes them too."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _token_ids(policy: Policy) -> dict[str, Any]:
    """Which tokens begin, end and pad, as a generation config says it. How to sample is left to who asks."""
    tokenizer = policy.tokenizer
    ends = [i for i in (tokenizer.eos_token_id, *policy.end_ids) if i is not None]
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {name: value for name, value in ids.items() if value is not None}
