"""Progress bars with rewards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from tqdm import tqdm

from lightningrl.types import Rollout


class Progress:
    """One bar over iterations, one over the rollouts of what is being collected."""

    def __init__(self, iterations: int, done: int) -> None:
        self._iterations = tqdm(total=iterations, initial=max(done, 0), desc="training", unit="it", dynamic_ncols=True, position=0)
        self._rollouts: tqdm | None = None
        self._shown: dict[str, str] = {}
        self._rewards: list[float] = []
        self._failed = 0

    def on_rollout(self, phase: str, total: int, rollout: Rollout) -> None:
        if self._rollouts is None:
            self._rewards, self._failed = [], 0
            self._rollouts = tqdm(total=total, desc=f"  {phase}", unit="rollout", leave=False, dynamic_ncols=True, position=1)
        if rollout.status == "ok":
            self._rewards.append(rollout.reward)
        else:
            self._failed += 1
        mean = sum(self._rewards) / max(len(self._rewards), 1)
        self._rollouts.set_postfix_str(f"reward {mean:.3f}" + (f", {self._failed} failed" if self._failed else ""), refresh=False)
        self._rollouts.update()
        if self._rollouts.n >= total:
            self._rollouts.close()
            self._rollouts = None

    def on_iteration(self, metrics: Mapping[str, Any]) -> None:
        for name in ("train_reward", "heldout_reward", "unseen_reward"):
            if name in metrics:
                self._shown[name.removesuffix("_reward")] = f"{metrics[name]:.3f}"
        failed = metrics.get("failed", 0) + metrics.get("timed_out", 0)
        self._shown |= {"failed": str(failed)} if failed else {}
        self._iterations.set_postfix(self._shown, refresh=False)
        if metrics["iteration"] > 0:
            self._iterations.update()
        else:
            self._iterations.refresh()

    @staticmethod
    @contextlib.contextmanager
    def imitation(steps: int) -> Iterator[Callable[[int, float], None]]:
        with tqdm(total=steps, desc="warm start", unit="step", dynamic_ncols=True) as bar:

            def on_step(step: int, loss: float) -> None:
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                bar.update()

            yield on_step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._rollouts is not None:
            self._rollouts.close()
        self._iterations.close()
