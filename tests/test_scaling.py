"""The formulas of cost: what they say of shapes one can count by hand. Their bytes against compiled programs: `eight_devices.py`."""

from __future__ import annotations

import dataclasses

import pytest

from lightningrl.model.params import count_params
from lightningrl.scaling import (
    H200,
    LLAMA_1B,
    MODELS,
    V5P,
    Mesh,
    Workload,
    best_mesh,
    cache_bytes,
    compute_seconds,
    layer_params,
    link,
    link_seconds,
    meshes,
    micro_batches,
    sampler_bytes,
    sent_bytes,
    state_bytes,
    total_bytes,
    update_flops,
)
from scripts import make_scaling

WORK = Workload()


@pytest.mark.parametrize(("name", "published"), [("1B", 1.24e9), ("3B", 3.21e9), ("8B", 8.03e9)])
def test_the_shapes_are_those_of_the_published_models(name: str, published: float) -> None:
    model = MODELS[name]
    assert count_params(model) == pytest.approx(published, rel=0.005)
    matrices = model.num_layers * layer_params(model) + model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    assert 0 < count_params(model) - matrices < 1e6  # norms


def test_what_is_split_adds_up() -> None:
    assert state_bytes(LLAMA_1B, Mesh(2, 4, 2)) * 8 == state_bytes(LLAMA_1B, Mesh(1, 1, 1)) == 12 * count_params(LLAMA_1B)
    by_hand = 2 * 16 * 8 * 64 * 2 * 256 * 4096  # keys and values, layers, heads, width, bytes, slots, tokens
    assert cache_bytes(LLAMA_1B, Mesh(1, 1, 1), WORK) == by_hand == 8 * cache_bytes(LLAMA_1B, Mesh(2, 2, 2), WORK)
    assert cache_bytes(LLAMA_1B, Mesh(3, 1, 1), WORK) == by_hand  # 256 slots don't divide by 3
    assert sampler_bytes(LLAMA_1B, Mesh(1, 1, 8), WORK) == (2 * count_params(LLAMA_1B) + by_hand) / 8


def test_flops_are_two_a_parameter_token_and_pass() -> None:
    """Short rows, every token an action: 2 P a token for scores and forward each, 4 P for backward, 2 P with remat."""
    short = dataclasses.replace(WORK, row=1, edges=WORK.tokens)
    for remat, passes in ((False, 4), (True, 5)):
        flops = update_flops(LLAMA_1B, dataclasses.replace(short, remat=remat))
        assert flops == pytest.approx(passes * 2 * count_params(LLAMA_1B) * WORK.tokens, rel=1e-3)


def test_one_device_sends_nothing_and_links_are_near_within_a_group() -> None:
    assert set(sent_bytes(LLAMA_1B, Mesh(1, 1, 1), WORK).values()) == {0.0}
    assert link_seconds(LLAMA_1B, Mesh(1, 1, 1), WORK, H200) == 0.0
    assert [link(H200, Mesh(2, 4, 2), axis) for axis in ("tensor", "fsdp", "data")] == [H200.near, H200.near, H200.far]
    p, n = count_params(LLAMA_1B), micro_batches(Mesh(1, 8, 1), WORK)
    assert n == 8
    assert sent_bytes(LLAMA_1B, Mesh(1, 8, 1), WORK)["fsdp"] == pytest.approx(n * (3 * 2 + 4) * p * 7 / 8)


def test_the_best_mesh_fits_and_no_other_that_fits_is_quicker() -> None:
    for chip in (H200, V5P):
        for model in MODELS.values():
            assert {mesh.size for mesh in meshes(16, model, chip)} == {16}
            best = best_mesh(16, model, WORK, chip)
            assert best is not None and total_bytes(model, best, WORK) <= 0.9 * chip.memory
            took = compute_seconds(model, best, WORK, chip) + link_seconds(model, best, WORK, chip)
            for mesh in meshes(16, model, chip):
                if total_bytes(model, mesh, WORK) <= 0.9 * chip.memory:
                    assert took <= compute_seconds(model, mesh, WORK, chip) + link_seconds(model, mesh, WORK, chip)
    assert best_mesh(1, MODELS["8B"], WORK, H200) is None  # 16 bytes a parameter are 128 GB


def test_devices_without_a_row_do_not_help() -> None:
    few = dataclasses.replace(WORK, tokens=4096, edges=1024)
    assert compute_seconds(LLAMA_1B, Mesh(8, 1, 1), few, H200) == pytest.approx(compute_seconds(LLAMA_1B, Mesh(1, 1, 1), few, H200))


def test_the_page_has_the_tables_of_the_formulas() -> None:
    assert make_scaling.main(["--check"]) == 0
