"""The paper's word problems with a calculator.

    python -m experiments.configs.paper_math --policy=LLAMA_3_2_3B --data_dir=CALC --out=/shared/math --fsdp=8

Of the original repository's example: 32 problems × 4 rollouts, prompts of 4,096 and responses of 2,048 tokens. The paper trains on Calc-X,
of GSM8K and Ape210K; `--data_dir` has GSM8K, SVAMP and MAWPS. The reward is exact, where Calc-X's allows for a
hundredth, as `--answer_tolerance=0.01` does.
"""

from __future__ import annotations

from experiments import math_tool
from experiments.configs import paper

SETTINGS = paper.SETTINGS | {"out": "runs/paper_math", "iterations": 436, "time_limit": 300.0}

if __name__ == "__main__":
    paper.run(math_tool.Config, math_tool.EXPERIMENT, SETTINGS)
