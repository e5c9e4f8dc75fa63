"""TRL's part of train_peer.py: its GRPO trainer's loss as micro-batches."""

from __future__ import annotations

import functools
import os
import tempfile
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from train_peer import CLIP, MICRO_TOKENS, Batch, Cut, Micro  # noqa: E402
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402


def cuts(model: LlamaForCausalLM, batch: Batch) -> dict[str, Cut]:
    """Micro-batches as its trainer makes them: in the order of the batch, padded to the longest of all."""
    trainer = make_trainer(model, len(batch.pairs))
    width = sum(max(map(len, side)) for side in zip(*batch.pairs, strict=True))
    sizes = sorted({min(len(batch.pairs), max(1, tokens // width)) for tokens in MICRO_TOKENS})
    return {f"{rows} rows of {width} tokens": functools.partial(cut, trainer, rows=rows) for rows in sizes}


def cut(trainer: GRPOTrainer, batch: Batch, *, rows: int) -> list[Micro]:
    whole = collated(batch)
    starts = range(0, len(batch.pairs), rows)
    sampled = torch.tensor(batch.useful_tokens)

    def micro(start: int) -> torch.Tensor:
        piece = {name: value[start : start + rows] for name, value in whole.items()}
        trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = len(starts)
        loss = trainer.compute_loss(trainer.model, {**piece, "num_items_in_batch": sampled})
        loss.backward()
        trainer._metrics["train"].clear()
        return loss.detach()

    return [functools.partial(micro, start) for start in starts]


def collated(batch: Batch) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, completions on the right."""
    prompts, responses = zip(*batch.pairs, strict=True)
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ones = [[torch.ones_like(ids) for ids in side] for side in (prompts, responses)]
    return {
        "prompt_ids": pad(prompts, padding_side="left"),
        "prompt_mask": pad(ones[0], padding_side="left"),
        "completion_ids": pad(responses),
        "completion_mask": pad(ones[1]),
        "advantages": batch.advantage,
    }


def make_trainer(model: LlamaForCausalLM, rows: int) -> Any:
    """A trainer as it is published; what it needs besides a model, a dataset and a tokenizer, is never used."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,  # memory is no concern here, and it costs a forward pass
        per_device_train_batch_size=rows,
        num_generations=rows,
        loss_type="dapo",
        epsilon=CLIP,
        beta=0.0,
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": "<pad>"}] * rows),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"),
    )
