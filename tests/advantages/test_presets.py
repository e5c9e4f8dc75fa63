"""Presets against the libraries' formulas, written out in float64."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from lightningrl.advantages.group import group_norm
from lightningrl.advantages.presets import COMPARED, FROM_READING_THEIR_CODE, PRESET_ORIGINS, PRESETS, preset
from lightningrl.normalize import group_normalize
from lightningrl.table import Credit, Evidence
from tests.batches import make_rollout, make_table

REWARDS = np.array([1.0, 0.0, 0.5, 0.25, 0.0, 2.0**-12, 0.75], np.float32)  # a group, one of nearly equal rewards, and one of one
GROUPS = np.array([0, 0, 0, 0, 1, 1, 2], np.int32)


def library(name):
    """(x - mean) / (std + eps) per group, and what the library does with a group of one."""
    ddof, eps, alone = {
        "verl": (1, 1e-6, lambda x: x),
        "trl": (1, 1e-4, lambda x: 0.0),
        "tunix": (1, 1e-6, lambda x: 0.0),
        "areal": (1, 1e-5, lambda x: 0.0),
        "skyrl": (1, 1e-6, lambda x: x),
        "art": (0, 1e-6, lambda x: 0.0),
    }[name]
    result = []
    for x, group in zip(REWARDS.astype(np.float64), GROUPS, strict=True):
        mine = REWARDS.astype(np.float64)[group == GROUPS]
        result.append(alone(x) if len(mine) == 1 else (x - mine.mean()) / (mine.std(ddof=ddof) + eps))
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_is_its_librarys_formula(name):
    out = group_normalize(REWARDS, GROUPS, np.ones_like(REWARDS), **preset(name))
    np.testing.assert_allclose(out, library(name), rtol=1e-5, atol=1e-6)


def test_presets_tell_libraries_apart_where_they_differ():
    results = {name: tuple(np.round(library(name), 6)) for name in PRESETS}
    assert results["verl"] == results["skyrl"]
    assert len(set(results.values())) == 5


@pytest.mark.slow
def test_every_preset_fits_both_functions_and_says_where_it_is_from():
    assert PRESETS.keys() == PRESET_ORIGINS.keys() == {"verl", "trl", "tunix", "areal", "skyrl", "art"}
    table = make_table(make_rollout("a", 1.0), make_rollout("a", 0.0))
    for name, settings in PRESETS.items():
        assert PRESET_ORIGINS[name].startswith(COMPARED if name in ("verl", "trl") else FROM_READING_THEIR_CODE)
        for function in (group_norm, group_normalize):
            assert settings.keys() <= inspect.signature(function).parameters.keys()
        out = group_norm(table, Credit(value=table.outcome[:, 0], kind="return"), Evidence(), **settings)
        assert out[0] > 0 > out[1]


def test_an_unknown_preset_is_refused_and_presets_cannot_be_changed():
    with pytest.raises(ValueError, match="There is no preset 'rllm': choose one of areal, art, skyrl, trl, tunix, verl"):
        preset("rllm")
    with pytest.raises(TypeError):
        PRESETS["verl"]["eps"] = 0.0  # type: ignore[index]
