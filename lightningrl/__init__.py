"""LightningRL: reinforcement learning for LLM agents in JAX, with the agents left as they are.

An agent's run is cut into transitions, one per LLM call; a credit assigner says what each of them earned, and any
single-step algorithm does the rest (arXiv 2508.03680).

    task ─► agent (any framework) ─HTTP─► gateway ─► sampler (policy in JAX)
                                            │ records exact token ids, log-probs, policy version, role
                                            ▼
                          Rollout = Transitions + rewards              types.py, runtime/, gateway/    host, no JAX
                                            ▼
                          TransitionTable, one entry a transition      table.py                        device, [N]
                                            ▼
                          evidence: what the rollouts alone don't say  evidence/                       host + model
                                            ▼
                          credit       [N]                             credit/                         pure
                                            ▼
                          advantage    [N]                             advantages/                     pure
                                            ▼
                          token trie, fixed-shape rows, edge list [E]  packing/                        host
                                            ▼
                          spread [N]->[E], log-probs, loss, update     advantages/tokens.py, losses/, train.py   jit, sharded
                                            ▼
                          sampler gets version + 1, checkpoint, metrics   loop.py

Notation, used everywhere:

    N   transitions (LLM calls) in a batch, padded to a static size      t       index of a turn or token, 0, 1, 2 …
    E   edges: action tokens, one entry per token of a transition        G       rollouts of one task (its group)
    R   rollouts                                                         γ, λ    discount, GAE's mixing factor
    B   rows of a packed batch                                           r, R    reward, return
    T   tokens of a row                                                  V(s)    critic's value, `value`
    D   named outcomes of a rollout                                      A       advantage
    V   vocabulary                                                       π, π_b, π_ref  policy, behaviour, reference
    `*_mask` true where something counts; `*_ids` integer ids; `*_logp` log-probs of the sampled token, natural log

Public names are loaded when they are first used: `import lightningrl` imports no JAX.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

__version__ = "0.1.0"

# transformers says at import that it found no PyTorch, which nobody here misses: we use its tokenizers only.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_HOMES = {
    "types": ("Completion", "Rollout", "Sampler", "SamplingParams", "Task", "Transition"),
    "errors": ("UserError",),
    "table": ("Credit", "Evidence", "LossInputs", "TokenTable", "TransitionTable"),
    "recipes": ("RECIPES", "Recipe"),
    "checkpoint": ("Checkpoints",),
    "gateway": ("Gateway", "GatewaySettings"),
    "runtime": ("Runner", "RunnerSettings", "Store"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
