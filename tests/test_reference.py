"""A reference that follows: the moving mean, what reads it, and that it is the same when a run is stopped and gone on with."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
import pytest

from lightningrl.errors import UserError
from lightningrl.fit import CommandConfig, fit
from lightningrl.model.lora import LoraSettings
from lightningrl.policies import EVERY_ROLE, Policies, load_adapted, pack_policies, score_policies, start_policies, update_policies
from lightningrl.policy import load_policy
from lightningrl.sharding import make_mesh
from lightningrl.train import TrainStep
from lightningrl.types import Rollout
from tests.small_step import CONFIG, REINFORCE, ROLES, ROWS, advantages, edges_of, mean_so_far, params, recorded, table
from tests.test_evidence_in_the_loop import TASKS, TINY, agent

LORA = LoraSettings(rank=2)
EPS = np.finfo(np.float32).eps


@pytest.fixture
def no_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightningrl.train.score_edges", mean_so_far)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Of compiled programs, shared by all runs here."""
    return tmp_path_factory.mktemp("cache")


@functools.cache
def step(lora: LoraSettings | None, decay: float = 0.8) -> TrainStep:
    return TrainStep(CONFIG, REINFORCE, optax.sgd(0.5), make_mesh(), lora=lora, ema_decay=decay)


def trained(policies: Policies, of: TrainStep, updates: int) -> list[Any]:
    """What is trained after each update, and the policies after the last."""
    seen = []
    for seed in range(updates):
        whose, batches = pack_policies(policies, recorded(), table(), 1, ROWS, 1)
        policies, _ = update_policies(of, policies, whose, batches, [edges_of(b, advantages(seed)) for b in batches])
        seen.append(jax.device_get({role: s.params if s.adapter is None else s.adapter for role, s in policies.items()}))
    return [*seen, policies]


@pytest.mark.slow
@pytest.mark.parametrize(("lora", "roles"), [(None, ()), (LORA, ROLES)])
@pytest.mark.usefixtures("no_decoder")
def test_the_mean_after_every_update(lora: LoraSettings | None, roles: tuple[str, ...]) -> None:
    """d·mean + (1 - d)·trained, written as a loop in float64."""
    start = start_policies(step(lora), params(), roles)
    expected = jax.tree.map(np.float64, {role: s.params if s.adapter is None else s.adapter for role, s in start.items()})
    *seen, policies = trained(start, step(lora), 3)
    for after in seen:
        expected = jax.tree.map(lambda mean, new: 0.8 * mean + 0.2 * np.float64(new), expected, after)
    for role, state in policies.items():
        # Three updates, each of which rounds two products and a sum.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=8 * EPS * np.abs(b).max()), state.reference, expected[role])
        far = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), state.reference, seen[-1][role])
        assert max(jax.tree.leaves(far)) > 1e-3  # it lags behind


@pytest.mark.slow
@pytest.mark.usefixtures("no_decoder")
def test_a_decay_of_0_is_the_policy_itself() -> None:
    *_, policies = trained(start_policies(step(LORA, 0.0), params()), step(LORA, 0.0), 1)
    state = policies[EVERY_ROLE]
    jax.tree.map(np.testing.assert_array_equal, state.reference, state.adapter)


@pytest.mark.slow
@pytest.mark.usefixtures("no_decoder")
def test_the_kl_term_reads_the_mean_of_the_policy_whose_call_it_is() -> None:
    *_, policies = trained(start_policies(step(LORA), params(), ROLES), step(LORA), 1)
    whose, batches = pack_policies(policies, recorded(), table(), 1, ROWS, 1)
    scored, _ = score_policies(step(LORA), policies, None, whose, batches)
    for role, batch in zip(whose, scored, strict=True):
        mine = step(LORA).score(step(LORA).reference(policies[role]), batch.rows, batch.edges).logp
        np.testing.assert_array_equal(batch.edges.ref_logp, mine)
        assert np.abs(np.asarray(batch.edges.ref_logp - batch.edges.old_logp))[np.asarray(batch.edges.mask)].max() > 1e-3


# ---- through fit


@pytest.mark.slow
@pytest.mark.parametrize("per_role", [False, True])
def test_a_run_with_adapters_and_a_moving_reference_goes_on_where_it_was_stopped(
    tmp_path: pathlib.Path, cache: pathlib.Path, per_role: bool
) -> None:
    """Every metric and every bit of every adapter; the base is the start's, and each sampler's log-probs are its trainer's."""
    settings: dict[str, Any] = dict(TINY, recipe="grpo", cache=str(cache), rollouts_per_task=2, lora_rank=2, reference="ema", ema_decay=0.5)
    settings |= {"train_roles": ("writer", "rewriter"), "lora_per_role": True} if per_role else {}

    def run(out: str, **changes: Any) -> list[dict[str, Any]]:
        metrics = fit(agent, TASKS[:2], None, CommandConfig(out=str(tmp_path / out), **settings), **changes).metrics
        return [{k: v for k, v in row.items() if not k.endswith(("_seconds", "_per_second"))} for row in metrics]

    def stop(rollouts: Sequence[Rollout], iteration: int) -> Sequence[Rollout]:
        if iteration == 2:
            raise KeyboardInterrupt
        return rollouts

    with pytest.raises(KeyboardInterrupt):
        run("stopped", alter=stop)
    metrics = run("stopped")
    assert metrics == run("whole")
    assert metrics[-1]["logprob_gap_max"] <= 1e-4
    names = ["kl/writer", "kl/rewriter"] if per_role else ["kl"]
    assert all(metrics[-1][name] > 0 for name in names)  # not those of the start, from which nothing has moved in the first update
    files = sorted(path.name for path in (tmp_path / "whole" / "policy").glob("adapter*"))
    assert files == (["adapter-rewriter.safetensors", "adapter-writer.safetensors"] if per_role else ["adapter.safetensors"])
    for name in files:
        assert (tmp_path / "whole/policy" / name).read_bytes() == (tmp_path / "stopped/policy" / name).read_bytes()
        adapted = load_adapted(tmp_path / "whole" / "start", tmp_path / "whole" / "policy" / name)
        start = load_policy(tmp_path / "whole" / "start")
        np.testing.assert_array_equal(adapted.params["embedding"], start.params["embedding"])
        assert not np.array_equal(adapted.params["layers"][0]["qkv"], start.params["layers"][0]["qkv"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"reference": "ema"}, "recipe lightningrl has no KL term, so nothing would read the reference of --reference=ema: leave it off"),
        ({"lora_rank": 2, "lora_per_role": True}, "lora_per_role needs the roles that get an adapter"),
        ({"lora_rank": 2, "lora_targets": ("head",)}, "no adapter can be put on 'head': choose from qkv, attention_out, gate_up, down"),
        ({"lora_rank": 2, "lora_alpha": -1.0}, "an adapter's alpha is -1.0: it must be more than 0"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: pathlib.Path, settings: dict[str, Any], sentence: str) -> None:
    config = CommandConfig(out=str(tmp_path / "out"), cache=str(tmp_path / "cache"), **TINY)  # type: ignore[arg-type]
    with pytest.raises(UserError) as refused:
        fit(agent, TASKS, None, dataclasses.replace(config, **settings))
    assert sentence in str(refused.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lora_rank": -1}, "lora_rank=-1 must be at least 0"),
        ({"lora_per_role": True}, "lora_per_role needs adapters: give their --lora_rank"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must be at least 0 and less than 1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        CommandConfig(**settings)
    assert str(refused.value) == sentence
