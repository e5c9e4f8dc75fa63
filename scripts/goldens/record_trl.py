"""Runs TRL's own advantages and losses, GRPO, RLOO and GMPO: python record_trl.py DIRECTORY.

They are methods of trainers. So a trainer is made without a model: what it would get from one, log-probs, completions and rewards,
is handed to it, and its methods do the rest.
"""

from __future__ import annotations

import collections
import inspect
import os
import pathlib
import re
import sys
import tempfile
import types

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import inputs  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from recorder import Recorder, demand  # noqa: E402
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer  # noqa: E402
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer  # noqa: E402

FOUR, ROWS = 4, len(inputs.FOURS_OUTCOME)
CLIP = {"epsilon": 0.2, "epsilon_high": 0.28}
LOSSES = {
    "grpo": {"loss_type": "grpo", **CLIP},
    "bnpo": {"loss_type": "bnpo", **CLIP},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 16, **CLIP},
    "dapo": {"loss_type": "dapo", **CLIP},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.06},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05},
    "vespo": {"loss_type": "vespo", "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0},
    "grpo/sequence": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.06},
    "grpo/delta": {"loss_type": "grpo", "delta": 1.5, **CLIP},
    "dapo/kl": {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": False, **CLIP},
    "dapo/kl_unbiased": {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": True, **CLIP},
    "dapo/off_policy_mask": {"loss_type": "dapo", "off_policy_mask_threshold": 0.05, **CLIP},
}
CORRECTIONS = {
    "token_truncate": {"vllm_importance_sampling_clip_max": 1.2},
    "token_mask": {"vllm_importance_sampling_clip_min": 0.7, "vllm_importance_sampling_clip_max": 1.3},
    "sequence_truncate": {"vllm_importance_sampling_clip_max": 1.2},
    "sequence_mask": {"vllm_importance_sampling_clip_max": 1.3},
}


def action_mask(*, observations: bool = True) -> np.ndarray:
    """[12, T]: ten rows of the inputs and the first two again."""
    mask = inputs.masks(observations=observations)["action"]
    return np.concatenate([mask, mask[:2]])


def tensor(x) -> torch.Tensor:
    return torch.tensor(np.asarray(x))


def bare(trainer, config_class, *, training: bool = True, **settings):
    """A trainer of which only what its methods read is there: its settings, and nothing that needs a model."""
    with tempfile.TemporaryDirectory() as directory:
        args = config_class(
            output_dir=directory, use_cpu=True, bf16=False, report_to=[], num_generations=FOUR, per_device_train_batch_size=ROWS, **settings
        )
    args.steps_per_generation = 1
    self = object.__new__(trainer)
    self.args, self.accelerator = args, Accelerator(cpu=True)
    self.model = types.SimpleNamespace(training=training, is_gradient_checkpointing=False)
    self._metrics = {mode: collections.defaultdict(list) for mode in ("train", "eval")}
    self._logs = {"prompt": [], "completion": [], "advantages": [], "rewards": collections.defaultdict(list), "extra": {}}
    self._pending_extra_logs, self._pending_metrics = {}, {}
    for name in vars(args):
        if not hasattr(self, name):
            setattr(self, name, getattr(args, name))
    self.epsilon_low, self.epsilon_high = args.epsilon, args.epsilon if args.epsilon_high is None else args.epsilon_high
    self.current_gradient_accumulation_steps = 1
    self.aux_loss_enabled = self._entropy_bonus_enabled = self.mask_truncated_completions = False
    self.num_generations_eval = 1
    self.environment_factories = self.environments = self.tools = self.pad_to_multiple_of = self.ref_model = None
    self._tokenizer = types.SimpleNamespace(pad_token_id=0)
    return self


def record_losses(out: Recorder) -> None:
    offered = re.findall(r"self\.loss_type (?:==|in) (\[.*?\]|\".*?\")", inspect.getsource(GRPOTrainer._compute_loss))
    demand({settings["loss_type"] for settings in LOSSES.values()}, set(re.findall(r"\w+", " ".join(offered))), "TRL's GRPO loss types")
    drawn, action = inputs.numbers(ROWS), action_mask()
    one_empty = action.copy()
    one_empty[5] = 0.0
    for name, settings in LOSSES.items():
        out.add(f"loss/{name}", settings, **grpo_loss(settings, drawn, action))
        if "/" not in name:
            out.add(f"empty_row/{name}", settings, **grpo_loss(settings, drawn, one_empty))
    gmpo = {"epsilon": 0.3, "epsilon_high": 0.4}
    out.add("loss/gmpo", gmpo, **grpo_loss(gmpo, drawn, action, (GMPOTrainer, GMPOConfig)))

    for mode, limits in CORRECTIONS.items():
        ratio = correction(mode, limits, drawn, action)
        out.add(f"correction/{mode}", limits, ratio=np.broadcast_to(ratio, action.shape))
        settings = {"loss_type": "dapo", **CLIP}
        out.add(f"corrected/{mode}", {**settings, **limits}, **grpo_loss(settings, drawn, action, ratio=ratio))
    # With nothing truncated, VESPO's weight is that of the sampler's policy.
    ratio = correction("token_truncate", {"vllm_importance_sampling_clip_max": 1e6}, drawn, action)
    out.add("corrected/vespo", LOSSES["vespo"], **grpo_loss(LOSSES["vespo"], drawn, action, ratio=ratio))

    plain, rloo = action_mask(observations=False), {"epsilon": 0.3, "epsilon_high": 0.4}
    out.add("loss/rloo", rloo, mask=plain, **rloo_loss(rloo, drawn, plain))


def batch_of(drawn, mask, logp):
    """The trainers' inputs, and a trainer's method that gives the log-probs instead of a model."""
    ids = torch.ones(mask.shape, dtype=torch.long)
    given = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": ids}
    given |= {"advantages": tensor(drawn["row_advantage"][:, 0]), "num_items_in_batch": tensor(mask).sum()}
    return given, lambda *_, **__: (logp, tensor(drawn["entropy"]), None)


def grpo_loss(settings, drawn, mask, classes=(GRPOTrainer, GRPOConfig), ratio=None):
    trainer, logp = bare(*classes, **settings), tensor(drawn["logp"]).requires_grad_()
    given, trainer._get_per_token_logps_and_entropies = batch_of(drawn, mask, logp)
    given |= {"tool_mask": tensor(mask), "old_per_token_logps": tensor(drawn["old_logp"])}
    given |= {"ref_per_token_logps": tensor(drawn["ref_logp"])}
    if ratio is not None:
        trainer.use_vllm, given["importance_sampling_ratio"] = True, tensor(ratio)
        trainer.vllm_importance_sampling_correction = True
    if trainer.args.off_policy_mask_threshold is not None:
        given["sampling_per_token_logps"] = tensor(drawn["behaviour_logp"])
    loss = trainer._compute_loss(trainer.model, given)
    loss.backward()
    return {"loss": loss.detach(), "gradient": logp.grad}


def rloo_loss(settings, drawn, mask):
    trainer, logp = bare(RLOOTrainer, RLOOConfig, **settings), tensor(drawn["logp"]).requires_grad_()
    given, trainer._get_per_token_logps_and_entropies = batch_of(drawn, mask, logp)
    given |= {"completion_mask": tensor(mask), "old_logps": tensor((drawn["old_logp"] * mask).sum(axis=1))}
    loss = trainer._compute_loss(trainer.model, given)
    loss.backward()
    return {"loss": loss.detach(), "gradient": logp.grad}


def scored(trainer, drawn, action, rewards) -> dict[str, torch.Tensor]:
    """What a trainer makes of completions with these rewards, one column a reward function."""
    lengths = [int(np.flatnonzero(row)[-1]) + 1 for row in action]
    answers = [[1] * n for n in lengths]
    generated = ([[1]] * len(action), answers)
    if isinstance(trainer, RLOOTrainer):
        trainer._generate = lambda prompts: (*generated, [""] * len(action))
    else:
        tool_mask = [row[:n].tolist() for row, n in zip(action, lengths, strict=True)]
        sampled = [row[:n].tolist() for row, n in zip(drawn["behaviour_logp"], lengths, strict=True)]
        trainer._generate = lambda prompts: (*generated, tool_mask, [""] * len(action), sampled, {}, None, None)
    trainer._calculate_rewards = lambda *_: tensor(rewards)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (tensor(drawn["old_logp"]), None, None)
    trainer.reward_weights = tensor(np.array([1.0, 0.5][: rewards.shape[1]], np.float32))
    trainer.reward_func_names = trainer.reward_funcs = ["accuracy", "format"][: rewards.shape[1]]
    return trainer._generate_and_score_completions([{"prompt": ""}] * len(action))


def correction(mode: str, limits, drawn, action) -> np.ndarray:
    settings = {"use_vllm": True, "vllm_importance_sampling_mode": mode, **limits}
    trainer = bare(GRPOTrainer, GRPOConfig, vllm_importance_sampling_correction=True, **settings)
    rewards = np.array(inputs.FOURS_OUTCOME, np.float32)[:, None]
    return scored(trainer, drawn, action, rewards)["importance_sampling_ratio"].numpy()


def record_advantages(out: Recorder) -> None:
    drawn, action = inputs.numbers(ROWS), action_mask()
    outcome, other = (np.array(x, np.float32) for x in (inputs.FOURS_OUTCOME, inputs.FOURS_FORMAT))
    one, two = outcome[:, None], np.stack([outcome, other], axis=1)

    def run(case, classes, rewards, *, training=True, **settings) -> None:
        trainer = bare(*classes, training=training, **settings)
        advantages = scored(trainer, drawn, action, rewards)["advantages"]
        out.add(f"advantage/{case}", settings, rewards=rewards, advantages=advantages)

    grpo, rloo = (GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)
    for scale in ("group", "batch", "none"):
        run(f"grpo/{scale}", grpo, one, scale_rewards=scale)
    run("grpo/singletons", grpo, one, training=False, scale_rewards="group")
    run("grpo/two_rewards", grpo, two, multi_objective_aggregation="normalize_then_sum")
    run("rloo", rloo, one, beta=0.0)
    run("rloo/normalised", rloo, one, beta=0.0, normalize_advantages=True)
    run("rloo/singletons", rloo, one, beta=0.0, training=False)


def main(directory: str) -> None:
    out = Recorder("trl", "torch", "transformers")
    group = np.repeat(["t1", "t2", "t3"], FOUR)
    out.add("inputs", group=group, outcome=np.array(inputs.FOURS_OUTCOME, np.float32), action=action_mask(), **inputs.numbers(ROWS))
    record_losses(out)
    record_advantages(out)
    out.write(pathlib.Path(directory) / "trl.npz")


if __name__ == "__main__":
    main(sys.argv[1])
