"""What `test_distributed.py` runs in processes of their own: five updates on the recorded rollouts, and a checkpoint of them.

python -m tests.two_processes PORT PROCESSES PROCESS FOLDER
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from typing import Any

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lightningrl.batches import edge_batches, pack_updates, score
from lightningrl.checkpoint import Checkpoints
from lightningrl.distributed import joined
from lightningrl.loop import assign, checkpoint_tree
from lightningrl.model.config import ModelConfig
from lightningrl.model.params import init_params
from lightningrl.packing.rows import RowSettings
from lightningrl.policies import EVERY_ROLE
from lightningrl.recipes import get_recipe
from lightningrl.runtime.store import Store
from lightningrl.sharding import HOST, batch_multiple, gathered, make_mesh
from lightningrl.table import Evidence
from lightningrl.tabulate import table_from_rollouts
from lightningrl.train import TrainState, TrainStep

RECORDED = pathlib.Path(__file__).parent.parent / "notebooks" / "recorded"
SHAPE = ModelConfig(
    vocab_size=1024,  # of the recorded rollouts' tokenizer
    hidden_size=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
    max_positions=256,
    qk_norm=True,
)
ROWS = RowSettings(lengths=(192,), tokens=1536, edges=256)


async def agent(task: dict[str, Any], base_url: str, api_key: str) -> float:
    """One call, paid by the ASCII character."""
    async with httpx.AsyncClient(base_url=base_url, headers={"Authorization": f"Bearer {api_key}"}, timeout=60) as client:
        body = {"model": "policy:speaker", "messages": [{"role": "user", "content": task["say"]}]}
        reply = await client.post("/chat/completions", json=body)
        reply.raise_for_status()
        return float(sum(character.isascii() for character in reply.json()["choices"][0]["message"]["content"]))


def keep_gradients() -> optax.GradientTransformation:
    """Whose state is the last gradient."""
    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, state, params=None: (g, g))


OPTIMIZER = optax.chain(keep_gradients(), optax.sgd(0.1, momentum=0.9))


@functools.cache
def step_on(data: int, fsdp: int, tensor: int) -> TrainStep:
    return TrainStep(SHAPE, get_recipe("lightningrl"), OPTIMIZER, make_mesh(data, fsdp, tensor))


def five_updates(step: TrainStep) -> tuple[TrainState, list[dict[str, Any]]]:
    """The state after them, and of each update its metrics and its gradient as NumPy arrays."""
    with Store(RECORDED / "rollouts.sqlite") as store:
        rollouts = store.read("train", 4)
    table = table_from_rollouts(rollouts, size=96)
    state, seen = step.init(init_params(SHAPE, jax.random.key(0))), []
    multiple = batch_multiple(make_mesh_of_four())
    for i in range(5):
        packed = pack_updates(rollouts, table, 3, ROWS, multiple)[i % 3 : i % 3 + 1]
        (batch,), (scores,) = score(step, state.params, None, packed)
        advantage, target = assign(step.recipe, table, Evidence())
        (edges,) = edge_batches(step.recipe, table, [batch.edges], [scores], advantage, target, Evidence())
        state, metrics = step.update(state, batch.rows, edges)
        named = {name: np.asarray(value) for name, value in metrics.items()}
        gradient = gathered(state.opt_state[0], HOST)
        seen.append(named | {f"gradient{k}": leaf for k, leaf in enumerate(jax.tree.leaves(gradient))})
    return state, seen


def make_mesh_of_four() -> Any:
    """What decides how rows are padded, so that every mesh gets the same rows."""
    return dataclasses.make_dataclass("M", ["shape"])({"data": 1, "fsdp": 4, "tensor": 1})


def checkpoints(folder: pathlib.Path) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", config={"of": "a test"})


def main(port: str, processes: str, process: str, folder: str) -> None:
    jax.config.update("jax_num_cpu_devices", 4 // int(processes))
    with joined(f"127.0.0.1:{port}", int(processes), int(process)):
        assert jax.device_count() == 4 and jax.process_count() == int(processes)
        state, seen = five_updates(step_on(1, 2, 2))
        saved = checkpoints(pathlib.Path(folder))
        alone = {"moments": jnp.arange(3.0)}  # as a producer's: each process has all of it
        saved.save(5, checkpoint_tree({EVERY_ROLE: state}, alone), {"iteration": 5})
        like = step_on(1, 4, 1).init(init_params(SHAPE, jax.random.key(1)))
        restored, host = saved.restore(5, checkpoint_tree({EVERY_ROLE: like}, alone))
        assert host == {"iteration": 5}
        np.testing.assert_array_equal(restored["evidence"]["moments"], [0.0, 1.0, 2.0])
        before, after = (
            gathered({"params": t["params"], "opt_state": t["opt_state"]}, HOST)
            for t in (checkpoint_tree({EVERY_ROLE: state}, {}), restored)
        )
        jax.tree.map(np.testing.assert_array_equal, after, before)
        saved.close()
        named = {f"{i}/{name}": value for i, update in enumerate(seen) for name, value in update.items()}
        params = {f"params{k}": leaf for k, leaf in enumerate(jax.tree.leaves(before["params"]))}
        np.savez(pathlib.Path(folder) / f"of_{process}.npz", **named, **params)


if __name__ == "__main__":
    main(*sys.argv[1:])
