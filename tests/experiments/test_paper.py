"""The paper's configs start: from a checkpoint that `transformers` wrote, on data in the official layouts, for two iterations.

Only what makes a run large is made small. Lengths, precision, recipe and optimizer stay those of the config.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import math_tool, multi_hop_qa, text_to_sql
from experiments.configs import paper_math, paper_qa, paper_sql
from lightningrl.metrics import read_metrics
from lightningrl.recipes import get_recipe
from lightningrl.tokenizer import train_tokenizer

SHAPE = dict(
    hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True
)
MODELS = {"llama": dict(head_dim=8, rope_theta=5e5, rms_norm_eps=1e-5), "qwen2": dict(rope_theta=1e6)}
FEW = ("--iterations=2", "--tasks_per_iteration=2", "--rollouts_per_task=2", "--heldout_questions=2", "--eval_every=2")
SMALL = (*FEW, "--slots=4", "--concurrency=4", "--max_tokens=6", "--prefix_cache_mb=8")


def checkpoint(folder: Path, kind: str, positions: int) -> Path:
    """A random decoder, written by `transformers`, and a tokenizer of ours."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = train_tokenizer(["SELECT name FROM pet WHERE kind", "What is two and three?", "<answer> Rome </answer>"] * 4, 400)
    vocabulary = -(-len(tokenizer) // 64) * 64
    config = AutoConfig.for_model(
        kind, **SHAPE, **MODELS[kind], vocab_size=vocabulary, max_position_embeddings=positions, eos_token_id=tokenizer.eos_token_id
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lines(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def spider(folder: Path) -> Path:
    (folder / "database" / "pets").mkdir(parents=True)
    with sqlite3.connect(folder / "database" / "pets" / "pets.sqlite") as connection:
        connection.execute("CREATE TABLE pet (id INTEGER PRIMARY KEY, name TEXT)")
        connection.executemany("INSERT INTO pet VALUES (?, ?)", [(i, f"name{i}") for i in range(8)])
    columns = {"db_id": "pets", "table_names_original": ["pet"], "column_names_original": [[-1, "*"], [0, "id"], [0, "name"]]}
    (folder / "tables.json").write_text(json.dumps([columns]))
    for split, numbers in {"train_spider": range(6), "dev": range(6, 8)}.items():
        golds = [
            {"db_id": "pets", "question": f"What is the name of pet {i}?", "query": f"SELECT name FROM pet WHERE id = {i}"} for i in numbers
        ]
        (folder / f"{split}.json").write_text(json.dumps(golds))
    return folder


def problems(folder: Path) -> Path:
    folder.mkdir()
    for split, numbers in {"train": range(4), "eval_gsm8k": range(4, 6), "eval_svamp": range(6, 8)}.items():
        each = [
            {"id": f"p{i}", "source": "gsm8k", "question": f"{i} and 1?", "answer": str(i + 1), "chain": [[f"{i}+1", f"{i + 1}"]]}
            for i in numbers
        ]
        lines(folder / f"{split}.jsonl", each)
    return folder


def passages(folder: Path) -> Path:
    folder.mkdir()
    lines(folder / "corpus.jsonl", [{"pid": f"p{i}", "title": f"Mill {i}", "text": f"The mill belongs to Ann {i}."} for i in range(8)])
    for split, numbers in {"train": range(4), "eval": range(4, 8)}.items():
        each = [
            {
                "id": f"q{i}",
                "question": f"Whose is mill {i}?",
                "answer": f"Ann {i}",
                "aliases": [],
                "type": "1hop",
                "hops": 1,
                "support": [f"p{i}"],
            }
            for i in numbers
        ]
        lines(folder / f"{split}.jsonl", each)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "data", "kind", "positions"),
    [(paper_sql, spider, "llama", 8192), (paper_math, problems, "qwen2", 8192), (paper_qa, passages, "llama", 16_384)],
    ids=["sql", "math", "qa"],
)
def test_it_starts(module: Any, data: Any, kind: str, positions: int, tmp_path: Path) -> None:
    policy = checkpoint(tmp_path / "model", kind, positions)
    command = [sys.executable, "-m", module.__name__, f"--policy={policy}", f"--data_dir={data(tmp_path / 'data')}", *SMALL]
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'run'}", f"--cache={tmp_path / 'cache'}"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "run")
    assert [row["iteration"] for row in rows] == [0, 1, 2] and rows[-1]["rollouts"] == 4 and rows[-1]["failed"] == 0
    settings = json.loads((tmp_path / "run" / "manifest.json").read_text())["settings"]
    kept = module.SETTINGS.keys() - {"out", "time_limit", "concurrency", "prefix_cache_mb"} - {text[2:].partition("=")[0] for text in SMALL}
    assert len(kept) >= 7
    assert {name: settings[name] for name in kept} == {name: json.loads(json.dumps(module.SETTINGS[name])) for name in kept}


@pytest.mark.parametrize(
    ("module", "experiment", "prompts", "rollouts"),
    [(paper_sql, text_to_sql, 4096, 128), (paper_math, math_tool, 4096, 128), (paper_qa, multi_hop_qa, 8192, 64)],
    ids=["sql", "math", "qa"],
)
def test_settings_are_the_published_ones(module: Any, experiment: Any, prompts: int, rollouts: int) -> None:
    config = experiment.Config(**module.SETTINGS)
    assert config.context_length == prompts + 2048 and config.max_tokens == 2048
    assert config.tasks_per_iteration * config.rollouts_per_task == rollouts and config.rollouts_per_task == 4
    assert (config.learning_rate, config.updates_per_iteration, config.imitation_steps) == (1e-6, 1, 0)
    clip = get_recipe(config.recipe)
    assert clip.kl is None and {name: clip.loss.keywords[name] for name in ("clip_low", "clip_high")} == {"clip_low": 0.2, "clip_high": 0.3}
    assert (config.train_roles == ("writer", "rewriter")) == (module is paper_sql)


@pytest.mark.slow
def test_a_model_and_data_are_asked_for(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.configs.paper_sql", f"--out={tmp_path}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and done.stderr.strip() == (
        "error: give --policy, the folder of the model to start from, and --data_dir, the data in its official layout"
    )
