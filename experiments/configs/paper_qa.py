"""The paper's question answering with retrieval, on MuSiQue.

    python -m experiments.configs.paper_qa --policy=LLAMA_3_2_3B --data_dir=MUSIQUE --out=/shared/qa --fsdp=8

Of the original repository's example: 16 questions × 4 rollouts, prompts of 8,192 and responses of 2,048 tokens. The paper searches 21
million passages of Wikipedia by BGE embeddings; here the corpus is that of `--data_dir`, searched by BM25.
"""

from __future__ import annotations

from experiments import multi_hop_qa
from experiments.configs import paper

SETTINGS = paper.SETTINGS | {
    "out": "runs/paper_qa",
    "tasks_per_iteration": 16,
    "context_length": 8192 + 2048,
    "iterations": 400,
    "eval_every": 40,
    "slots": 64,
    "concurrency": 64,
}

if __name__ == "__main__":
    paper.run(multi_hop_qa.Config, multi_hop_qa.EXPERIMENT, SETTINGS)
