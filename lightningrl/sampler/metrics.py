"""What a sampler counts, and the same as Prometheus' text exposition format (version 0.0.4)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping


@dataclasses.dataclass
class SamplerCounts:
    """Sums since the start, written by the sampler's thread only."""

    requests: int = 0  # admitted to a slot
    completed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0  # of prompts to be read: every token but the last
    cached_tokens: int = 0  # of those, taken from the prefix cache
    sampled_tokens: int = 0
    queue_seconds: float = 0.0  # between a request's arrival and its slot
    busy_seconds: float = 0.0  # turns of the sampler's loop, waiting for work left out

    @property
    def cache_hit_ratio(self) -> float:
        """Prompt tokens that were not computed, of those to be read; 0 if there were none."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def since(self, before: SamplerCounts) -> SamplerCounts:
        """What has been added since `before`, a copy."""
        return SamplerCounts(*(getattr(self, f.name) - getattr(before, f.name) for f in dataclasses.fields(self)))


COUNTERS = {
    "requests": "Requests admitted to a slot.",
    "completed": "Requests answered.",
    "cancelled": "Requests whose caller went away.",
    "prompt_tokens": "Prompt tokens to be read.",
    "cached_tokens": "Prompt tokens taken from the prefix cache.",
    "sampled_tokens": "Tokens sampled.",
    "queue_seconds": "Seconds that requests waited for a slot.",
    "busy_seconds": "Seconds in which the sampler worked.",
}


Gauges = Mapping[str, tuple[str, float]]  # by name: help text and value


def exposition(samplers: Mapping[str, tuple[SamplerCounts, Gauges]]) -> str:
    """The text of `/metrics`: the counts as counters, and gauges.

    Args:
      samplers: what each has counted, by the role that it answers, which becomes a label; "" has none.
    """
    lines: list[str] = []
    for name, text in COUNTERS.items():
        lines += _metric(f"{name}_total", "counter", text, {role: getattr(counts, name) for role, (counts, _) in samplers.items()})
    of_roles = {role: {**_derived(counts), **gauges} for role, (counts, gauges) in samplers.items()}
    for name, (text, _) in next(iter(of_roles.values())).items():
        lines += _metric(name, "gauge", text, {role: gauges[name][1] for role, gauges in of_roles.items()})
    return "\n".join(lines) + "\n"


def _derived(counts: SamplerCounts) -> Gauges:
    per_second = counts.sampled_tokens / counts.busy_seconds if counts.busy_seconds else 0.0
    return {
        "cache_hit_ratio": ("Share of the prompt tokens that was taken from the prefix cache.", counts.cache_hit_ratio),
        "tokens_per_second": ("Tokens sampled per busy second.", per_second),
    }


def _metric(name: str, kind: str, text: str, values: Mapping[str, float]) -> Iterable[str]:
    full = f"lightningrl_sampler_{name}"
    labels = {role: f"{{role={json.dumps(role)}}}" if role else "" for role in values}
    return [f"# HELP {full} {text}", f"# TYPE {full} {kind}", *(f"{full}{labels[role]} {float(x)!r}" for role, x in values.items())]
