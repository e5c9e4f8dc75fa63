"""One GRPO update with TRL's own loss step, or with plain transformers and torch: the peers of scripts/bench_train.py.

python train.py BATCH.npz --kind trl|torch --hidden 512 …    Answers every line "step" on stdin with a line of JSON.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import resource
import sys
import tempfile
import time
import types

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CLIP_LOW, CLIP_HIGH = 0.2, 0.28


def make_model(a: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=a.vocab,
        hidden_size=a.hidden,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        intermediate_size=a.intermediate,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config).float().train()


class Torch:
    """Rows sorted by length and padded within micro-batches, or packed one after the other with a block-diagonal mask."""

    def __init__(self, model: LlamaForCausalLM, batch: dict[str, np.ndarray], packed: bool, tokens: int) -> None:
        self.model, self.optimizer = model, torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
        prompts, responses = rows(batch)
        self.count = sum(map(len, responses))
        cut = micro_batches(prompts, responses, batch["advantage"], tokens)
        self.batches = [self._packed(x) if packed else self._padded(x) for x in cut]

    def _padded(self, rows: list) -> dict:
        longest = max(len(p) + len(r) for p, r, _ in rows)
        ids, seen = np.zeros((len(rows), longest), np.int64), np.zeros((len(rows), longest), np.int64)
        where, advantage = [], []
        for i, (p, r, a) in enumerate(rows):
            ids[i, : len(p) + len(r)], seen[i, : len(p) + len(r)] = np.concatenate([p, r]), 1
            where += [i * longest + len(p) - 1 + k for k in range(len(r))]
            advantage += [a] * len(r)
        given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(seen)}
        return self._edges(given, rows, where, advantage)

    def _packed(self, rows: list) -> dict:
        ids = np.concatenate([x for p, r, _ in rows for x in (p, r)])
        owner = np.concatenate([np.full(len(p) + len(r), i) for i, (p, r, _) in enumerate(rows)])
        positions = np.concatenate([np.arange(len(p) + len(r)) for p, r, _ in rows])
        sees = (owner[:, None] == owner[None, :]) & np.tri(len(ids), dtype=bool)
        where, advantage, at = [], [], 0
        for p, r, a in rows:
            where += [at + len(p) - 1 + k for k in range(len(r))]
            advantage += [a] * len(r)
            at += len(p) + len(r)
        mask = torch.where(torch.tensor(sees), 0.0, torch.finfo(torch.float32).min)[None, None]
        given = {"input_ids": torch.tensor(ids)[None], "position_ids": torch.tensor(positions)[None], "attention_mask": mask}
        return self._edges(given, rows, where, advantage)

    def _edges(self, given: dict, rows: list, where: list[int], advantage: list[float]) -> dict:
        token = np.concatenate([r for _, r, _ in rows])
        return {"given": given, "where": torch.tensor(where), "token": torch.tensor(token), "advantage": torch.tensor(advantage)}

    def step(self) -> None:
        for batch in self.batches:
            hidden = self.model.model(**batch["given"]).last_hidden_state
            logits = self.model.lm_head(hidden.reshape(-1, hidden.shape[-1])[batch["where"]])
            logp = torch.log_softmax(logits.float(), -1).gather(1, batch["token"][:, None])[:, 0]
            ratio = torch.exp(logp - logp.detach())
            clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
            loss = -torch.minimum(ratio * batch["advantage"], clipped * batch["advantage"]).sum() / self.count
            loss.backward()
        finish(self.model, self.optimizer)


class Trl:
    """TRL's GRPO: its own `_compute_loss` with its own log-probs, prompts padded left and completions right."""

    def __init__(self, model: LlamaForCausalLM, batch: dict[str, np.ndarray], rows_each: int) -> None:
        from accelerate import Accelerator
        from trl import GRPOConfig, GRPOTrainer
        from trl.trainer.utils import add_fused_lm_head

        with tempfile.TemporaryDirectory() as directory:
            args = GRPOConfig(
                output_dir=directory,
                use_cpu=True,
                bf16=False,
                report_to=[],
                num_generations=8,
                per_device_train_batch_size=8,
                loss_type="dapo",
                epsilon=CLIP_LOW,
                epsilon_high=CLIP_HIGH,
            )
        args.steps_per_generation = 1
        # A trainer without data and generation: only what its loss reads is there.
        trainer = object.__new__(GRPOTrainer)
        trainer.args, trainer.accelerator = args, Accelerator(cpu=True)
        trainer._metrics = {mode: collections.defaultdict(list) for mode in ("train", "eval")}
        for name in vars(args):
            if not hasattr(trainer, name):
                setattr(trainer, name, getattr(args, name))
        trainer.model, trainer.epsilon_low, trainer.epsilon_high = model, args.epsilon, args.epsilon_high
        trainer.current_gradient_accumulation_steps = 1
        trainer.aux_loss_enabled = trainer._entropy_bonus_enabled = trainer.mask_truncated_completions = False
        trainer.environment_factories = trainer.environments = trainer.tools = trainer.pad_to_multiple_of = trainer.ref_model = None
        trainer._tokenizer = types.SimpleNamespace(pad_token_id=0)
        add_fused_lm_head(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs", "entropy"))
        self.trainer, self.model = trainer, model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
        prompts, responses = rows(batch)
        count = torch.tensor(sum(map(len, responses)))
        self.batches = []
        for at in range(0, len(prompts), rows_each):
            here = slice(at, at + rows_each)
            p, pm = pad(prompts[here], left=True)
            c, cm = pad(responses[here], left=False)
            given = {"prompt_ids": p, "prompt_mask": pm, "completion_ids": c, "completion_mask": cm}
            self.batches.append(given | {"advantages": torch.tensor(batch["advantage"][here]), "num_items_in_batch": count})

    def step(self) -> None:
        for batch in self.batches:
            self.trainer._compute_loss(self.model, batch).backward()
        finish(self.model, self.optimizer)


def finish(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def rows(batch: dict[str, np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    ends = np.cumsum(batch["prompt_length"] + batch["response_length"])
    both = np.split(batch["ids"].astype(np.int64), ends[:-1])
    return [x[:n] for x, n in zip(both, batch["prompt_length"], strict=True)], [
        x[n:] for x, n in zip(both, batch["prompt_length"], strict=True)
    ]


def micro_batches(prompts: list, responses: list, advantage: np.ndarray, tokens: int) -> list[list]:
    order = sorted(range(len(prompts)), key=lambda i: -(len(prompts[i]) + len(responses[i])))
    batches: list[list] = []
    left = 0
    for i in order:
        size = len(prompts[i]) + len(responses[i])
        if size > left:
            batches.append([])
            left = tokens
        batches[-1].append((prompts[i], responses[i], float(advantage[i])))
        left -= size
    return batches


def pad(sequences: list[np.ndarray], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, sequences))
    ids, mask = np.zeros((len(sequences), longest), np.int64), np.zeros((len(sequences), longest), np.int64)
    for i, x in enumerate(sequences):
        span = slice(longest - len(x), longest) if left else slice(0, len(x))
        ids[i, span], mask[i, span] = x, 1
    return torch.tensor(ids), torch.tensor(mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batch")
    parser.add_argument("--kind", choices=["trl", "torch"], required=True)
    for name in ("hidden", "layers", "heads", "kv_heads", "intermediate", "vocab", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with np.load(arguments.batch) as file:
        batch = dict(file)
    model = make_model(arguments)
    if arguments.kind == "trl":
        peers = {f"{n} rows": Trl(model, batch, n) for n in (32,)}
    else:
        peers = {
            "padded, sorted by length, 4096 tokens": Torch(model, batch, packed=False, tokens=4096),
            "packed, 1024 tokens": Torch(model, batch, packed=True, tokens=1024),
        }
    seconds = {}
    for name, peer in peers.items():
        peer.step()  # warm
        started = time.perf_counter()
        peer.step()
        seconds[name] = time.perf_counter() - started
    best = min(seconds, key=lambda name: seconds[name])
    print(json.dumps({"ready": best, "tried_seconds": seconds}), flush=True)
    for line in sys.stdin:
        if line.strip() == "step":
            started = time.perf_counter()
            peers[best].step()
            took = time.perf_counter() - started
            print(json.dumps({"seconds": took, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), flush=True)


if __name__ == "__main__":
    main()
