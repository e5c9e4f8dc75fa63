"""What the paper's experiments have in common: settings of the experiments' own commands, each still a flag."""

from __future__ import annotations

from typing import Any

from experiments import training
from lightningrl import flags
from lightningrl.errors import UserError

SETTINGS: dict[str, Any] = {
    "recipe": "lightningrl_paper",
    "tasks_per_iteration": 32,
    "rollouts_per_task": 4,
    "updates_per_iteration": 1,
    "learning_rate": 1e-6,
    "weight_decay": 0.01,
    "context_length": 4096 + 2048,  # prompts and responses, which the original limits apart
    "max_tokens": 2048,
    "imitation_steps": 0,  # the model can do the task before
    "heldout_questions": 500,
    "eval_every": 32,
    "compute_dtype": "bfloat16",
    "remat": "layers",
    "slots": 128,
    "concurrency": 128,
    "time_limit": 600.0,
    "prefix_cache_mb": 8192.0,
}


def run(config_class: Any, experiment: training.Experiment[Any], settings: dict[str, Any]) -> None:
    """The experiment's command, with these settings where the command line says nothing else."""

    def main() -> None:
        config = flags.config_from_flags(config_class)
        if config.policy is None or config.data_dir is None:
            raise UserError("give --policy, the folder of the model to start from, and --data_dir, the data in its official layout")
        training.main(config_class, experiment)

    flags.define_flags(config_class, defaults=settings)
    flags.run_app(main)
