"""What a GPU gets done against what it can do: an update, decoding and the attention kernel, of decoders of 1B and 3B parameters in bf16.

    python scripts/bench_gpu.py --json FILE [--size 1b,3b]

Weights are random, shapes those of Llama 3.2, and one device is used. What it can do is measured first: FLOP/s of the best of some large
bf16 products, and bytes/s of reading and writing large arrays. Then, of every size, medians of five after a warm-up:

- update: one update of `TrainStep` on the calls of scripts/bench_train_calls.npz, of which every token becomes 16: calls have up to
  1,904 tokens, in rows of 4,096, and share as much as they do there. FLOPs are those of `bench_train.Ours.flops`: with P parameters in
  the layers' matrices and T tokens computed, E action tokens, and S pairs of a token and one that it sees,

      6 P T + 6 V D E + 12 L H d S.

  What is computed again to save memory, of padding, and of pairs that the mask hides does not count. All parameters are trained where
  that fits the memory by the formulas of `lightningrl.scaling`, with remat if need be, else an adapter; the file says which.
- decode: tokens/s of the sampler's compiled turn with 1, 8 and 64 slots decoded together, their contexts nearly full, against those of
  the bound: in every step the weights and the whole cache are read once (`scaling.sampler_bytes`).
- attention: the kernel on plain rows, where a token sees all before it, against cuDNN's causal attention on the same arrays; and the
  kernel on the first rows of tries that the update has. 4 H d S FLOPs forward, 12 H d S with the gradients.

`--size tiny` shows on any machine that all of it runs: on a CPU the kernel is interpreted, its peer is XLA's, and no number says anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from bench_gpu_work import ONE, SIZES, SLOTS, Work, lengthened, way_to_train  # noqa: E402
from bench_train import Ours, matmul_peak, recorded, seen  # noqa: E402

from lightningrl.model.attention import attend_tree  # noqa: E402
from lightningrl.model.cache import init_cache  # noqa: E402
from lightningrl.model.config import ModelConfig  # noqa: E402
from lightningrl.model.params import Params, init_params  # noqa: E402
from lightningrl.packing.rows import pack  # noqa: E402
from lightningrl.sampler.steps import Plan, SlotState, TurnShape, turn  # noqa: E402
from lightningrl.scaling import Workload, sampler_bytes  # noqa: E402

REPEATS = 5
GOAL = 0.5  # the update's share of the matmul rate
SIDES = {True: (4096, 8192, 16_384), False: (256, 512)}  # of the products that tell the rate, on a GPU and elsewhere
NUMBERS = {True: 2**28, False: 2**22}  # in an array that tells the memory's rate
TO_DO = "run it on a machine with one, after pip install --editable '.[gpu]', or give --size tiny."
DISTRIBUTIONS = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the chip can do."""

    flops: float  # of bf16 products, a second
    bandwidth: float  # of its memory, bytes/s


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def seconds_of(run: Callable[[], Any]) -> float:
    """The median of some runs after one that compiles."""
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def rates_of_the_chip() -> Rates:
    a, b = (jax.random.normal(jax.random.key(i), (NUMBERS[on_gpu()],), jnp.float32) for i in range(2))
    copy, triad = jax.jit(jnp.negative), jax.jit(lambda a, b: a + 3.0 * b)
    bandwidth = max(2 * a.nbytes / seconds_of(lambda: copy(a)), 3 * a.nbytes / seconds_of(lambda: triad(a, b)))
    return Rates(matmul_peak(SIDES[on_gpu()], jnp.bfloat16), bandwidth)


def memory() -> tuple[float, int | None]:
    """Bytes that JAX may take, and the most that it took so far; no limit and None where the device doesn't say, as a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return float(stats.get("bytes_limit", math.inf)), stats.get("peak_bytes_in_use")


def update(work: Work, rates: Rates) -> dict[str, Any]:
    way = way_to_train(work, memory()[0])
    rollouts = lengthened(recorded(), work.times)
    ours = Ours(work.model, rollouts, work.rows, lora=way.lora, compute_dtype=jnp.bfloat16, remat=way.remat)
    seconds, packed = seconds_of(ours.seconds), ours.packed
    result: dict[str, Any] = {"trained": way.trained, "remat": way.remat, "bytes_by_formula": way.bytes, "most_bytes_so_far": memory()[1]}
    result |= {"useful_tokens": packed.row_tokens, "computed_tokens": packed.computed_tokens, "actions": int(packed.edges.mask.sum())}
    result |= {"with_padding": {"tokens": sum(r.tokens.size for r in packed.rows), "actions": packed.edges.mask.size}}
    result |= {"seconds": seconds, "useful_tokens_per_second": packed.row_tokens / seconds, "flops": ours.flops()}
    return result | {"share_of_matmul_rate": ours.flops() / seconds / rates.flops}


def decode(work: Work, rates: Rates) -> list[dict[str, Any]]:
    params = init_params(work.model, jax.random.key(0), jnp.bfloat16)
    return [decode_slots(work, rates, params, slots) for slots in SLOTS]


def decode_slots(work: Work, rates: Rates, params: Params, slots: int) -> dict[str, Any]:
    shape = TurnShape(slots=slots, group=slots, steps=work.steps, chunk=16, rows=1, pieces=1, loads=1, length=work.context)
    integers, floats = np.zeros((8, slots), np.int32), np.ones((2, slots), np.float32)
    state = SlotState.of(integers, floats)  # views
    state.key[0] = np.arange(slots)
    state.position[:], state.max_tokens[:] = work.context - work.steps, work.steps
    one_group = {"counts": np.array([0, 0, 0, 1], np.int32), "integers": integers, "floats": floats.view(np.int32)}
    plan = dataclasses.replace(Plan.empty(shape), **one_group).flat()
    cache, pool = (init_cache(work.model, *size, jnp.bfloat16) for size in ((slots, work.context), (1, shape.chunk)))

    def run() -> jax.Array:
        nonlocal cache, pool
        cache, pool, tokens, _ = turn(params, cache, pool, plan, config=work.model, shape=shape, end_tokens=(-1,))
        return tokens

    if not (np.asarray(run())[0] >= 0).all():
        raise RuntimeError(f"not all of {slots} slots decoded {work.steps} tokens")
    speed = slots * work.steps / seconds_of(run)
    read = sampler_bytes(work.model, ONE, Workload(slots=slots, context=work.context))
    bound = slots * rates.bandwidth / read
    result: dict[str, Any] = {"slots": slots, "context": work.context, "bytes_of_a_step": read, "tokens_per_second": speed}
    return result | {"bound_tokens_per_second": bound, "share_of_bound": speed / bound}


def attention(work: Work, rates: Rates) -> dict[str, Any]:
    transitions = [t for r in lengthened(recorded(), work.times) for t in r.transitions]
    rows, c = pack(transitions, range(len(transitions)), work.rows).rows[0], work.model
    b, t = rows.tokens.shape
    peer: Literal["cudnn", "xla"] = "cudnn" if on_gpu() else "xla"

    rng = np.random.default_rng(0)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((b, c.num_kv_heads, *shape, c.head_dim), np.float32), jnp.bfloat16)

    ours = random(c.queries_per_kv, t), random(t), random(t), random(c.queries_per_kv, t)
    theirs = tuple(map(flat, ours))

    @jax.jit
    def causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=peer)

    def kernel(end: Any) -> Callable[..., jax.Array]:
        return jax.jit(lambda q, k, v: attend_tree(q, k, v, jnp.asarray(end), implementation="pallas"))

    plain = kernel(np.full((b, t), t, np.int32))
    gap = jnp.abs(flat(plain(*ours[:3])).astype(jnp.float32) - causal(*theirs[:3]).astype(jnp.float32))
    result: dict[str, Any] = {"rows": [b, t], "kernel": "pallas" if on_gpu() else "pallas, interpreted", "peer": peer}
    pairs = b * t * (t + 1) / 2
    result |= {"largest_difference": float(jnp.max(gap))}
    result |= {"kernel_plain": attended(plain, ours, c, pairs, rates), "peer_plain": attended(causal, theirs, c, pairs, rates)}
    return result | {"kernel_tries": attended(kernel(rows.end), ours, c, seen(rows), rates)}


def flat(x: jax.Array) -> jax.Array:
    """[B, K, T, d] or [B, K, G, T, d] -> [B, T, heads, d], as `jax.nn` has it."""
    return jnp.moveaxis(x, -2, 1).reshape(x.shape[0], x.shape[-2], -1, x.shape[-1])


def attended(
    attend: Callable[..., jax.Array], inputs: tuple[jax.Array, ...], c: ModelConfig, pairs: float, rates: Rates
) -> dict[str, dict[str, float]]:
    """What a compiled function takes of q, k, v and the output's gradient."""

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
        out, back = jax.vjp(attend, q, k, v)
        return out, back(dout)

    both = jax.jit(gradients)
    seconds = {"forward": seconds_of(lambda: attend(*inputs[:3])), "forward_and_backward": seconds_of(lambda: both(*inputs))}
    flops = {"forward": 4, "forward_and_backward": 12}
    scale = c.num_heads * c.head_dim * pairs / rates.flops
    return {name: {"seconds": s, "share_of_matmul_rate": flops[name] * scale / s} for name, s in seconds.items()}


MEASURES: dict[str, Callable[[Work, Rates], Any]] = {"update": update, "decode": decode, "attention": attention}


def measure(size: str, rates: Rates) -> tuple[dict[str, Any], dict[str, str]]:
    """Results, and what is wrong with the measures that have none: one that fails doesn't cost the others."""
    results, problems = {}, {}
    for name, of in MEASURES.items():
        try:
            results[name] = of(SIZES[size], rates)
        except Exception as error:  # out of memory, or a kernel that does not compile
            problems[f"{size}: {name}"] = f"{type(error).__name__}: {error}"[:1000]
        gc.collect()  # the next one needs what a failed one held
        print(f"{size}: {name}: {json.dumps(results.get(name, problems.get(f'{size}: {name}')))}", flush=True)
    return results, problems


def goals(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What was not measured has no value and is not met."""
    values = {size: result.get("update", {}).get("share_of_matmul_rate") for size, result in results.items()}
    name = "update with the trie mask, share of the measured matmul rate"
    return [
        {"name": f"{size}: {name}", "value": value, "goal": f">= {GOAL}", "met": value is not None and value >= GOAL}
        for size, value in values.items()
    ]


def chip() -> dict[str, Any]:
    device = jax.local_devices()[0]
    found: dict[str, Any] = {"chip": device.device_kind, "platform": device.client.platform_version, "date": str(datetime.date.today())}
    if on_gpu() and shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
        found["nvidia_smi"] = subprocess.run(asked, capture_output=True, text=True).stdout.splitlines()
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"] in DISTRIBUTIONS}
    return found | {"versions": {"python": platform.python_version(), **installed}}


def sizes(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SIZES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SIZES)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, required=True, metavar="FILE", help="where the numbers go")
    parser.add_argument("--size", type=sizes, default=["1b", "3b"], help=f"some of {', '.join(SIZES)}, with commas (default: 1b,3b)")
    given = parser.parse_args(arguments)
    if given.size != ["tiny"] and not on_gpu():
        print(f"bench_gpu.py: JAX sees no GPU, only {jax.default_backend()}: {TO_DO}", file=sys.stderr)
        return 2
    rates = rates_of_the_chip()
    said: dict[str, Any] = {**chip(), "matmul_flops_per_second": rates.flops, "bytes_per_second": rates.bandwidth}
    said |= {"results": {}, "problems": {}, "goals": []}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    for size in given.size:
        said["results"][size], problems = measure(size, rates)
        said["problems"] |= problems
        said["goals"] = goals(said["results"])
        given.json.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    for goal in said["goals"]:
        value = "not measured" if goal["value"] is None else f"{goal['value']:.3f}"
        print(f"{goal['name']}: {value} ({goal['goal']}, {'met' if goal['met'] else 'MISSED'})")
    return 1 if said["problems"] else 0


if __name__ == "__main__":
    # JAX takes three quarters of the memory unless told otherwise, with which 3B parameters would not be trained whole on 80 GB.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name, which does not go with the newer one
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
    sys.exit(main())
