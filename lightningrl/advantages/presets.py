"""Settings of `group_normalize` and `group_norm` under which they give what other libraries' GRPO gives.

    functools.partial(group_norm, **PRESETS["trl"])

Libraries compute statistics over rows. Where a rollout is one row that is our count="rollouts"; where every call is a row it
is count="transitions", and with it their baselines are weighted by the number of calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

FROM_READING_THEIR_CODE = "from reading their code"
COMPARED = "compared with what the package computes (tests/golden)"

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        name: MappingProxyType(settings)
        for name, settings in {
            "verl": {"scale": "std", "ddof": 1.0, "eps": 1e-6, "singleton": "raw", "degenerate": "formula"},
            "trl": {"scale": "std", "ddof": 1.0, "eps": 1e-4, "singleton": "zero", "degenerate": "formula"},
            "tunix": {"scale": "std", "ddof": 1.0, "eps": 1e-6, "singleton": "zero", "degenerate": "formula"},
            "areal": {"scale": "std", "ddof": 1.0, "eps": 1e-5, "singleton": "zero", "degenerate": "formula"},
            "skyrl": {"scale": "std", "ddof": 1.0, "eps": 1e-6, "singleton": "raw", "degenerate": "formula"},
            "art": {"scale": "std", "ddof": 0.0, "eps": 1e-6, "singleton": "zero", "degenerate": "formula"},
        }.items()
    }
)

PRESET_ORIGINS: Mapping[str, str] = MappingProxyType(
    {
        "verl": f"{COMPARED}, version 0.9.1, estimator grpo; of a group of one it divides the raw reward by 1 + eps",
        "trl": f"{COMPARED}, version 1.16.0, GRPOTrainer with scale_rewards='group'",
        "tunix": f"{FROM_READING_THEIR_CODE}, commit c7d8950f, grpo; it rejects groups of one, where its formula has no number",
        "areal": f"{FROM_READING_THEIR_CODE}, commit 4aef98d8, mean and std by group; ddof 0 before version 0.3.4, in float64",
        "skyrl": f"{FROM_READING_THEIR_CODE}, commit a9564572, grpo",
        "art": f"{FROM_READING_THEIR_CODE}; rows with advantage 0 are then dropped, which an advantage function cannot show",
    }
)


def preset(name: str) -> Mapping[str, Any]:
    """The settings that reproduce a library, for `functools.partial(group_norm, **preset(name))`.

    Raises:
      ValueError: there is no preset of that name; the sentence lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}: choose one of {', '.join(sorted(PRESETS))}.")
    return PRESETS[name]
