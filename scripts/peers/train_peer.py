"""The peers of scripts/bench_train.py: an update of the same policy on the same batch, in torch.

    PYTHON scripts/peers/train_peer.py trl|torch BATCH.npz --hidden 512 --layers 4 --heads 8 --vocab 1024

It needs the environment of scripts/goldens/verl.txt. `trl` is the step of TRL's GRPO trainer: its loss on given completions, padded as its
trainer pads them. `torch` is plain transformers in the faster of two packings: rows of several transitions whose attention does not
cross, or transitions sorted by length and padded. Both: float32, forward, backward, gradients scaled to norm 1, AdamW. A few sizes of
micro-batches are tried on a part of the batch before the start, and the fastest is kept.

BATCH.npz has, for N transitions: `prompt_ids` [N, P] and `response_ids` [N, R], integers, padded on the right; `prompt_length` and
`response_length` [N]; `advantage` [N], float32; `group` [N], integers, which a loss of given advantages has no use for. The policy samples
with temperature 1, and the update is its first on these rollouts, so that every importance ratio is 1.

It prints one line of JSON when it is ready: the setting it chose, and loss and norm of the gradient at the start, for comparison. Then
for every line `step N` on standard input it makes N updates and prints {"useful_tokens", "seconds", "peak_memory"}: sampled tokens a
step, median seconds of a step, and the most bytes that were resident beyond those of the imported libraries.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# Threads that wait for one another spin for milliseconds by default, which is a multiple of a small step where the cores are not all ours.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

CLIP = 0.2
LEARNING_RATE, MAX_NORM = 1e-5, 1.0
MICRO_TOKENS = (1024, 4096, 8192)  # sizes of micro-batches that are tried
TRIAL_TOKENS = 8192  # of the part of the batch that they are tried on

# A micro-batch: the gradient of its part of the loss is added to the parameters'; returns that part.
Micro = Callable[[], torch.Tensor]


class Batch:
    """The transitions without their padding."""

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], advantage: torch.Tensor) -> None:
        self.pairs, self.advantage = pairs, advantage  # prompt and response ids, int64; float32 [N]
        self.useful_tokens = sum(len(response) for _, response in pairs)

    @classmethod
    def read(cls, path: pathlib.Path) -> Batch:
        with np.load(path) as file:
            given = dict(file)
        lengths = zip(given["prompt_length"].tolist(), given["response_length"].tolist(), strict=True)
        rows = zip(given["prompt_ids"].astype(np.int64), given["response_ids"].astype(np.int64), lengths, strict=True)
        pairs = [(torch.as_tensor(prompt[:n]), torch.as_tensor(response[:m])) for prompt, response, (n, m) in rows]
        return cls(pairs, torch.as_tensor(given["advantage"].astype(np.float32)))

    def part(self, tokens: int) -> Batch:
        """Transitions from all over the batch, of about so many tokens."""
        step = -(-sum(map(self.length, range(len(self.pairs)))) // tokens)
        return Batch(self.pairs[::step], self.advantage[::step])

    def length(self, k: int) -> int:
        return sum(map(len, self.pairs[k]))


def make_model(given: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=given.vocab,
        hidden_size=given.hidden,
        intermediate_size=given.intermediate or 4 * given.hidden * 2 // 3,
        num_hidden_layers=given.layers,
        num_attention_heads=given.heads,
        num_key_value_heads=given.kv_heads or given.heads,
        max_position_embeddings=32768,
        tie_word_embeddings=given.tied,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).train()


# A way to cut a batch into micro-batches.
Cut = Callable[[Batch], list[Micro]]


# ---- transformers and torch


def plain(model: LlamaForCausalLM, batch: Batch) -> dict[str, Cut]:
    """Every packing and size. The mask of a packed row is a square, so there are no large ones."""

    def in_order(given: Batch) -> list[int]:
        return sorted(range(len(given.pairs)), key=given.length)

    def sorted_and_padded(given: Batch, tokens: int) -> list[Micro]:
        return [padded(model, given, piece) for piece in pieces(given, in_order(given), tokens)]

    def in_rows(given: Batch, tokens: int) -> list[Micro]:
        return [packed(model, given, row) for row in first_fit(given, in_order(given), tokens)]

    longest = max(map(batch.length, range(len(batch.pairs))))
    rows = {max(tokens, longest) for tokens in MICRO_TOKENS[:2]}
    cuts = {f"sorted, padded, {tokens} tokens": functools.partial(sorted_and_padded, tokens=tokens) for tokens in MICRO_TOKENS}
    return cuts | {f"packed, {tokens} tokens": functools.partial(in_rows, tokens=tokens) for tokens in sorted(rows)}


def pieces(batch: Batch, order: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Neighbours, of so many tokens with their padding, at least one."""
    piece: list[int] = []
    for k in order:
        if piece and (len(piece) + 1) * batch.length(k) > tokens:
            yield piece
            piece = []
        piece.append(k)
    yield piece


def first_fit(batch: Batch, order: Sequence[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for k in reversed(order):
        at = next((i for i, left in enumerate(room) if left >= batch.length(k)), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(capacity)
        rows[at].append(k)
        room[at] -= batch.length(k)
    return rows


def padded(model: LlamaForCausalLM, batch: Batch, piece: Sequence[int]) -> Micro:
    """Padding on the right is after everything that counts, so that a causal mask is enough."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.cat(batch.pairs[k]) for k in piece], batch_first=True)
    starts = [k * ids.shape[1] for k in range(len(piece))]
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    return scored(model, batch, piece, {"input_ids": ids, "position_ids": positions}, starts)


def packed(model: LlamaForCausalLM, batch: Batch, row: Sequence[int]) -> Micro:
    """One row; a token sees those before it of its own transition."""
    lengths = torch.tensor([batch.length(k) for k in row])
    ids = torch.cat([part for k in row for part in batch.pairs[k]])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    owner = torch.repeat_interleave(torch.arange(len(row)), lengths)
    mask = (owner[:, None] == owner[None, :]).tril()[None, None]
    starts = (lengths.cumsum(0) - lengths).tolist()
    return scored(model, batch, row, {"input_ids": ids, "position_ids": positions, "attention_mask": mask}, starts)


def scored(model: LlamaForCausalLM, batch: Batch, piece: Sequence[int], inputs: dict[str, torch.Tensor], starts: Sequence[int]) -> Micro:
    """The clipped loss; logits are computed where a response's token is predicted, and nowhere else."""
    targets = torch.cat([batch.pairs[k][1] for k in piece])
    before = [start + len(batch.pairs[k][0]) - 1 for k, start in zip(piece, starts, strict=True)]
    at = torch.cat([torch.arange(first, first + len(batch.pairs[k][1])) for k, first in zip(piece, before, strict=True)])
    advantage = torch.cat([batch.advantage[k].expand(len(batch.pairs[k][1])) for k in piece])

    def run() -> torch.Tensor:
        hidden = model.model(**inputs).last_hidden_state.flatten(0, 1)[at]
        logp = -torch.nn.functional.cross_entropy(model.lm_head(hidden), targets, reduction="none")
        ratio = torch.exp(logp - logp.detach())
        loss = -torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).sum() / batch.useful_tokens
        loss.backward()
        return loss.detach()

    return run


# ---- a step, and how it is measured


class Update:
    """An optimizer's step over the micro-batches of a batch."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=LEARNING_RATE, fused=True)

    def gradient(self, micros: Sequence[Micro]) -> tuple[float, float]:
        """Loss, and norm of the gradient, which is scaled down afterwards."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = sum(float(micro()) for micro in micros)
        return loss, float(torch.nn.utils.clip_grad_norm_(self._parameters, MAX_NORM))

    def __call__(self, micros: Sequence[Micro]) -> float:
        """Seconds it took."""
        started = time.perf_counter()
        self.gradient(micros)
        self._optimizer.step()
        return time.perf_counter() - started


def resident(name: str) -> int:
    """Bytes that /proc/self/status has as VmRSS, now, or VmHWM, at most since `forget_peak`."""
    for line in pathlib.Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise LookupError(name)


def forget_peak() -> None:
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps of earlier steps
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("way", choices=("trl", "torch"))
    parser.add_argument("batch", type=pathlib.Path)
    for name in ("hidden", "layers", "heads", "vocab"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--kv_heads", type=int, help="default: as many as heads")
    parser.add_argument("--intermediate", type=int, help="default: 8/3 of hidden")
    parser.add_argument("--tied", action="store_true", help="one matrix embeds tokens and gives logits")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    cuts = plain
    if given.way == "trl":
        from train_peer_trl import cuts
    libraries = resident("VmRSS")

    batch, model = Batch.read(given.batch), make_model(given)
    update, trial = Update(model), batch.part(TRIAL_TOKENS)
    offered = cuts(model, batch)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    tried = {}
    for name, cut in offered.items():
        update(cut(trial)[:1])  # the first is slower
        tried[name] = update(cut(trial))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    setting = min(tried, key=tried.__getitem__)
    micros = offered[setting](batch)
    loss, norm = update.gradient(micros)
    print(json.dumps({"way": given.way, "setting": setting, "tried": tried, "loss": loss, "gradient_norm": norm}), flush=True)

    for line in sys.stdin:
        command, number = line.split()
        if command != "step":
            raise ValueError(f"{command!r} is not 'step'")
        forget_peak()
        taken = statistics.median([update(micros) for _ in range(int(number))])
        peak = resident("VmHWM") - libraries
        print(json.dumps({"useful_tokens": batch.useful_tokens, "seconds": taken, "peak_memory": peak}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
