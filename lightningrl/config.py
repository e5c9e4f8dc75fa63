"""The settings of a training run: one frozen dataclass, every field of which is a flag of the commands."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from lightningrl.errors import UserError


def setting(default: Any, text: str, *, free: bool = False) -> Any:
    """A field with a default and the help text of its flag.

    Args:
      free: it may change between a run and its continuation, because it changes nothing of what is computed.
    """
    return field(default=default, metadata={"help": text, "free": free})


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """Every setting of a training run."""

    out: str = setting("run", "folder for everything the run leaves; a run that is there already goes on", free=True)
    seed: int = setting(0, "all randomness comes from it")
    recipe: str = setting("lightningrl", "how credit becomes an update; python -m lightningrl.recipes lists them")
    iterations: int = setting(45, "times the agents run and the policy is updated")
    rollout_budget: int = setting(0, "ends a run after the iteration in which it has run as many, extra ones counted; 0: iterations do")
    tasks_per_iteration: int = setting(24, "tasks drawn per iteration")
    rollouts_per_task: int = setting(8, "runs of the agent per task")
    updates_per_iteration: int = setting(3, "optimizer steps per iteration; a task's rollouts stay in one")
    branches_per_call: int = setting(4, "rollouts started before every call, for recipes that need the value of states so")
    judge: str | None = setting(None, "for recipes with a judge: a function of a task's rollouts, as package.module:function")
    judge_model: str | None = setting(None, "instead: a model that judges, behind any OpenAI endpoint; its key is OPENAI_API_KEY")
    judge_url: str | None = setting(None, "base_url of that endpoint", free=True)
    potential: str | None = setting(None, "for recipes with a potential: a function of a rollout, as package.module:function")
    learning_rate: float = setting(5e-4, "AdamW's learning rate")
    weight_decay: float = setting(0.0, "AdamW's weight decay")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    train_roles: tuple[str, ...] = setting((), "roles whose calls are trained, comma-separated; none given: all")
    lora_rank: int = setting(0, "trains low-rank adapters of this rank on a frozen policy; 0: trains all its parameters")
    lora_alpha: float = setting(16.0, "adapters are scaled by lora_alpha / lora_rank")
    lora_targets: tuple[str, ...] = setting(("qkv", "attention_out", "gate_up", "down"), "arrays of every layer that get one")
    lora_per_role: bool = setting(False, "one adapter for each of train_roles: policies trained apart, over one base")
    compute_dtype: Literal["float32", "bfloat16"] = setting("float32", "what is computed in; what is trained stays in float32")
    reference: Literal["start", "ema"] = setting("start", "what a KL term pulls to: the start, or the policy's moving mean")
    ema_decay: float = setting(0.99, "how much of that mean every update leaves in it")
    temperature: float = setting(1.0, "of sampling in training, whatever the agent asks for")
    max_tokens: int = setting(64, "of a response, at most, in training and evaluation")
    intermediate: tuple[str, ...] = setting((), "intermediate rewards: tool_error, repeated_call, new_support, better_draft")
    max_staleness: int = setting(0, "iterations that sampling runs ahead of training, with a correction for its older policy")
    eval_every: int = setting(15, "iterations between evaluations on the held-out tasks; fewer of those that run extra rollouts")
    concurrency: int = setting(64, "agents at once", free=True)
    time_limit: float = setting(60.0, "seconds a rollout may take", free=True)
    max_attempts: int = setting(3, "tries of a rollout that fails for its infrastructure", free=True)
    runner: Literal["local", "processes", "ray"] = setting(
        "local", "where agents run: in this process, in others beside it, or on the hosts of a Ray cluster", free=True
    )
    agent_processes: int = setting(1, "processes beside this one, with --runner=processes", free=True)
    ray_address: str | None = setting(None, "of a Ray cluster; none: RAY_ADDRESS, or else a new one on this machine", free=True)
    ray_cpus: float = setting(1.0, "CPUs that an agent reserves on its host of the Ray cluster", free=True)
    engine: str | None = setting(
        None, "URL of an OpenAI-compatible engine that samples, such as http://host:8000; none: this process", free=True
    )
    engine_model: str | None = setting(None, "the model's name there; none: the only one it serves")
    engine_reload: str = setting(
        "vllm", "how it takes new weights: vllm, lightningrl, or JSON [[path, body], …] with {folder} and {version} in it", free=True
    )
    engine_folder: str | None = setting(None, "where weights for it are written, which its host reads too; none: OUT/engine", free=True)
    engine_correction: Literal["truncated", "none"] = setting(
        "truncated", "with --engine, for recipes that have no rollout correction: truncated importance sampling, or none"
    )
    host: str = setting("127.0.0.1", "address the gateway listens on", free=True)
    port: int = setting(0, "port the gateway listens on; 0: any free one", free=True)
    policy: str | None = setting(None, "folder of a policy to start from; none: a new one")
    vocab_size: int = setting(1024, "of a new policy's tokenizer")
    hidden_size: int = setting(192, "of a new policy")
    num_layers: int = setting(2, "of a new policy")
    num_heads: int = setting(4, "of a new policy")
    num_kv_heads: int = setting(2, "of a new policy")
    intermediate_size: int = setting(512, "of a new policy")
    context_length: int = setting(256, "tokens of a prompt and its response, at most")
    slots: int = setting(32, "conversations that the sampler decodes at once")
    decode_group: int = setting(0, "of those, how many in one matrix product; 0: 4 on a CPU, where a few are done soonest, elsewhere all")
    decode_steps: int = setting(8, "tokens of each that are decoded before others are let in")
    prefill_chunk: int = setting(16, "tokens of a prompt that are read, and kept for other prompts, together")
    prefill_rows: int = setting(4, "such pieces that are read at once")
    prefix_cache_mb: float = setting(64.0, "memory for beginnings of prompts that the sampler has read; 0: none is kept", free=True)
    deterministic: bool = setting(True, "a call is answered alike to the last bit whatever else is sampled; off: shapes follow the load")
    reading_steps: int = setting(220, "updates in which a new policy learns to read the demonstrations, prompts included")
    imitation_steps: int = setting(180, "updates on the demonstrations' responses after that")
    imitation_learning_rate: float = setting(4e-3, "AdamW's learning rate in the warm start")
    data_parallel: int = setting(1, "devices that a batch is split over, with whole parameters", free=True)
    fsdp: int = setting(1, "devices that a batch and the parameters are split over", free=True)
    remat: Literal["none", "layers", "dots"] = setting("none", "what gradients compute again instead of keeping it in memory")
    attention: Literal["auto", "dense", "blocks", "pallas"] = setting(
        "auto", "its implementation in training; auto: by row length and device"
    )
    tensor_parallel: int = setting(1, "devices that every layer is split over", free=True)
    coordinator: str | None = setting(
        None, "HOST:PORT of process 0, in a run of several processes; auto: as Slurm, Open MPI, Kubernetes or a TPU pod say", free=True
    )
    processes: int = setting(1, "processes of the run, each started with the same flags but --process", free=True)
    process: int = setting(0, "which of them this one is; 0 has the agents", free=True)
    cache: str = setting(
        os.path.join("~", ".cache", "lightningrl"), "folder of warm starts and compiled programs, by content hash", free=True
    )

    def __post_init__(self) -> None:
        check_at_least_one(self, AT_LEAST_ONE)
        for name in AT_LEAST_ZERO:
            if not getattr(self, name) >= 0:  # NaN too
                raise UserError(f"{name}={getattr(self, name)} must be at least 0")
            if getattr(self, name) == math.inf:
                raise UserError(f"{name}={getattr(self, name)} must be finite")
        for name in MORE_THAN_ZERO:
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)} must be more than 0, and finite")
        if self.seed >= 2**32:
            raise UserError(f"seed={self.seed} must be less than 2³²")
        if self.lora_per_role and not self.lora_rank:
            raise UserError("lora_per_role needs adapters: give their --lora_rank")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay} must be at least 0 and less than 1")


def check_at_least_one(config: Any, names: Sequence[str]) -> None:
    """Raises UserError for the first of these settings that is less than 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be at least 1")


AT_LEAST_ZERO = (
    "seed",
    "iterations",
    "rollout_budget",
    "max_staleness",
    "ray_cpus",
    "lora_rank",
    "prefix_cache_mb",
    "decode_group",
    "weight_decay",
)
# A policy learns from what it samples: temperature 0 would leave it nothing to learn.
MORE_THAN_ZERO = ("temperature", "learning_rate", "imitation_learning_rate", "max_grad_norm", "time_limit")
AT_LEAST_ONE = (
    "data_parallel",
    "fsdp",
    "tensor_parallel",
    "tasks_per_iteration",
    "rollouts_per_task",
    "updates_per_iteration",
    "branches_per_call",
    "max_tokens",
    "eval_every",
    "concurrency",
    "max_attempts",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "intermediate_size",
    "slots",
    "decode_steps",
    "prefill_chunk",
    "prefill_rows",
)


def same_run(config: FitConfig) -> dict[str, Any]:
    """The settings that make a run what it is, as JSON."""
    free = {f.name for f in dataclasses.fields(config) if f.metadata.get("free")}
    return {name: value for name, value in json.loads(json.dumps(dataclasses.asdict(config))).items() if name not in free}


def most_iterations(config: FitConfig, tasks: int) -> int:
    """How many iterations there can be within the budget of rollouts: each runs its tasks at least."""
    each = min(config.tasks_per_iteration, tasks) * config.rollouts_per_task
    return min(config.iterations, -(-config.rollout_budget // each)) if config.rollout_budget else config.iterations


def cache_folder(config: FitConfig) -> Path:
    return Path(config.cache).expanduser()
