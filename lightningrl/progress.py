"""Progress with rewards: bars on a terminal, one line an iteration in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from tqdm import tqdm

from lightningrl.distributed import is_first
from lightningrl.types import Rollout

LINES_OF_A_WARM_START = 5


class Progress:
    """One bar over iterations, one over the rollouts of what is being collected, on stderr."""

    def __init__(self, iterations: int, done: int) -> None:
        self._total = iterations
        self._live = sys.stderr.isatty() and is_first()
        self._iterations = _bar(self._live, total=iterations, initial=max(done, 0), desc="training", unit="it", position=0)
        self._rollouts: tqdm | None = None
        self._shown: dict[str, str] = {}
        self._rewards: list[float] = []
        self._failed = 0
        self._last = time.monotonic()

    def on_rollout(self, phase: str, total: int, rollout: Rollout) -> None:
        if not self._live:
            return
        if self._rollouts is None:
            self._rewards, self._failed = [], 0
            self._rollouts = _bar(True, total=total, desc=f"  {phase}", unit="rollout", leave=False, position=1)
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
        shown = {
            name.removesuffix("_reward"): f"{metrics[name]:.3f}"
            for name in ("train_reward", "heldout_reward", "unseen_reward")
            if name in metrics
        }
        failed = metrics.get("failed", 0) + metrics.get("timed_out", 0)
        shown |= {"failed": str(failed)} if failed else {}
        if not self._live:
            self._line(metrics["iteration"], shown)
            return
        self._shown = {name: text for name, text in self._shown.items() if name != "failed"} | shown
        self._iterations.set_postfix(self._shown, refresh=False)
        if metrics["iteration"] > 0:
            self._iterations.update()
        else:
            self._iterations.refresh()

    def _line(self, iteration: int, shown: Mapping[str, str]) -> None:
        now = time.monotonic()
        numbers = ", ".join(f"{name} {text}" for name, text in shown.items())
        _say(f"iteration {iteration}/{self._total}: {numbers} ({now - self._last:.1f} s)")
        self._last = now

    @staticmethod
    @contextlib.contextmanager
    def imitation(steps: int) -> Iterator[Callable[[int, float], None]]:
        live = sys.stderr.isatty() and is_first()
        every = -(-steps // LINES_OF_A_WARM_START)
        with _bar(live, total=steps, desc="warm start", unit="step") as bar:

            def on_step(step: int, loss: float) -> None:
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                bar.update()
                if not live and ((step + 1) % every == 0 or step + 1 == steps):
                    _say(f"warm start {step + 1}/{steps}: loss {loss:.3f}")

            yield on_step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._rollouts is not None:
            self._rollouts.close()
        self._iterations.close()


def _bar(live: bool, **settings: Any) -> tqdm:
    return tqdm(disable=not live, dynamic_ncols=True, **settings)


def _say(line: str) -> None:
    if is_first():
        print(line, file=sys.stderr, flush=True)
