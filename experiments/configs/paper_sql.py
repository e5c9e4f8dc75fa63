"""The paper's text-to-SQL experiment: the calls of writer and rewriter are trained on, the checker's are not.

All roles share one set of weights, so what the others learn changes the checker too.

    python -m experiments.configs.paper_sql --policy=LLAMA_3_2_3B --data_dir=SPIDER --out=/shared/sql --fsdp=8

Of the original repository's example: 32 questions × 4 rollouts, prompts of 4,096 and responses of 2,048 tokens, two passes over Spider.
"""

from __future__ import annotations

from experiments import text_to_sql
from experiments.configs import paper

SETTINGS = paper.SETTINGS | {
    "out": "runs/paper_sql",
    "train_roles": ("writer", "rewriter"),
    "iterations": 436,
    "heldout_questions": 100,  # about the databases that are trained on
    "unseen_questions": 500,  # about those of dev.json
}

if __name__ == "__main__":
    paper.run(text_to_sql.Config, text_to_sql.EXPERIMENT, SETTINGS)
