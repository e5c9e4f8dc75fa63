"""A sampler for each role, behind one `types.Sampler`: roles that are trained as separate policies also answer as such."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import numpy as np

from lightningrl.model.params import Params
from lightningrl.sampler.engine import OnTokens, PolicySampler
from lightningrl.sampler.metrics import exposition
from lightningrl.types import Completion, SamplingParams


class RoleSampler:
    """Hands every call to the sampler of its role. Each has slots, a cache and a thread of its own.

    Args:
      make: a sampler of some weights.
      weights: by role.
      base: what answers the calls of any other role; never trained.
    """

    def __init__(self, make: Callable[[Params], PolicySampler], weights: Mapping[str, Params], base: Params) -> None:
        self._samplers, self._others, self._base = {role: make(params) for role, params in weights.items()}, make(base), base
        self._all = (*self._samplers.values(), self._others)
        self._running = contextlib.ExitStack()

    @property
    def context_length(self) -> int:
        return self._others.context_length

    @property
    def queue_length(self) -> int:
        return sum(sampler.queue_length for sampler in self._all)

    @property
    def busy_seconds(self) -> float:
        """Of the busiest sampler: they run side by side, and their sum could be more than the time that has passed."""
        return max(sampler.busy_seconds for sampler in self._all)

    def metrics_text(self) -> str:
        """For `/metrics`: every sampler's, by its role; of all other roles as "*"."""
        return exposition({**{role: s.measured() for role, s in self._samplers.items()}, "*": self._others.measured()})

    def submit(
        self, prompt_ids: np.ndarray, params: SamplingParams, key: tuple[int, int], on_tokens: OnTokens | None = None
    ) -> Future[Completion]:
        return self._samplers.get(params.role, self._others).submit(prompt_ids, params, key, on_tokens)

    def set_params(self, params: Mapping[str, Params], policy_version: int) -> None:
        """Takes new weights, by role. Calls of other roles are answered with the base under every version."""
        if params.keys() != self._samplers.keys():
            raise ValueError(f"there are samplers for the roles {sorted(self._samplers)}, but weights for {sorted(params)}")
        for role, sampler in self._samplers.items():
            sampler.set_params(params[role], policy_version)
        self._others.set_params(self._base, policy_version)

    def start(self) -> RoleSampler:
        for sampler in self._all:
            self._running.enter_context(sampler)
        return self

    def stop(self) -> None:
        self._running.close()

    def __enter__(self) -> RoleSampler:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
