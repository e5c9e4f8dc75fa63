"""Turns a policy into a Hugging Face checkpoint, or a Hugging Face checkpoint into a policy.

python scripts/convert_hf.py to-hf runs/mine/policy mine-hf --dtype bfloat16   # for transformers, vLLM and others
python scripts/convert_hf.py from-hf Qwen2.5-1.5B-Instruct start               # a training run also takes the checkpoint itself: --policy

IN is a folder of either kind; what is read is Llama 3.x, Qwen 2.5 and Qwen 3 (dense). OUT is made. The tokenizer, its chat template and the
tokens that end an answer go along. A critic of the policy goes to OUT/value_head.safetensors, which from-hf reads and others ignore.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from lightningrl.errors import UserError
from lightningrl.model.params import count_params
from lightningrl.policy import export_policy, load_policy, save_policy

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("direction", choices=("to-hf", "from-hf"))
    parser.add_argument("source", metavar="IN", type=Path, help="folder of the policy or checkpoint")
    parser.add_argument("target", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights that are written (default: %(default)s)")
    parser.add_argument(
        "--max_file_mb", type=float, default=5000, help="to-hf: size of a weights file from which another begins (default: %(default)s MB)"
    )
    chosen = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    try:
        if chosen.target.resolve() == chosen.source.resolve():
            raise UserError(f"OUT is IN, {chosen.source}: give another folder to write")
        policy = load_policy(chosen.source, dtype=DTYPES[chosen.dtype])
        if chosen.direction == "to-hf":
            export_policy(chosen.target, policy, max_file_mb=chosen.max_file_mb)
        else:
            save_policy(chosen.target, policy)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{chosen.target}: {count_params(policy.config):,} parameters in {chosen.dtype}")


if __name__ == "__main__":
    main()
