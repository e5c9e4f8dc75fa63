"""From measurements of seeds to numbers with 95 % bootstrap intervals. NumPy, float64, [processes, seeds] in front."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Interval = tuple[float, float, float]  # estimate, low, high
Statistic = Callable[[Mapping[str, np.ndarray]], np.ndarray]  # arrays [P, n] -> [P], or [P, draws, n] -> [P, draws]


def _mean(of: str) -> tuple[tuple[str, ...], Statistic]:
    return (of,), lambda m: m[of].mean(-1)


def _part_of_expected(part: str) -> tuple[tuple[str, ...], Statistic]:
    return (part, "expected"), lambda m: _root(m[part].sum(-1), m["expected"].sum(-1))


# What each reads of what was measured, and what it makes of it.
METRICS: dict[str, tuple[tuple[str, ...], Statistic]] = {
    "correlation": _mean("correlation"),
    "cosine": _mean("cosine"),
    "bias": _part_of_expected("left"),
    "noise": _part_of_expected("variance"),
    "regret": _mean("regret"),
    "final_regret": _mean("final_regret"),
}


def regrets(returns: np.ndarray, best: np.ndarray) -> dict[str, np.ndarray]:
    """How much of what there was to gain was not gained, of returns f64[P, seeds, iterations+1] and the best f64[P].

      regret = mean over updates i of (J* - J(θᵢ)) / (J* - J(θ₀)),   final_regret that of the last one

    1 is a policy that did not learn, 0 one that was the best from its first update on; more than 1 got worse.
    """
    missing = best[:, None, None] - returns
    part = missing[..., 1:] / missing[..., :1]
    return {"regret": part.mean(-1), "final_regret": part[..., -1]}


def intervals(measured: Mapping[str, np.ndarray], metric: str, draws: np.ndarray) -> tuple[list[Interval], Interval]:
    """For each process, and for the mean over all of them.

    Args:
      measured: f64[P, n] of each number that the metric reads.
      draws: int[D, n], seeds drawn with replacement; the same for every pair, so that their differences are paired.
    """
    point, sampled = _drawn(measured, metric, draws)
    each = [_interval(p, s) for p, s in zip(point, sampled, strict=True)]
    return each, _interval(point.mean(), sampled.mean(0))


def difference(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], metric: str, draws: np.ndarray) -> list[Interval]:
    """Of two pairs on the same seeds, ours less theirs: for each process, and last for the mean over all of them."""
    (our_point, our_sampled), (their_point, their_sampled) = (_drawn(x, metric, draws) for x in (ours, theirs))
    with np.errstate(invalid="ignore"):  # of two without a signal
        point, sampled = our_point - their_point, our_sampled - their_sampled
    return [*(_interval(p, s) for p, s in zip(point, sampled, strict=True)), _interval(point.mean(), sampled.mean(0))]


def interval_of_mean(x: np.ndarray, draws: np.ndarray) -> Interval:
    """Of one number a seed, f64[n]."""
    return _interval(x.mean(), x[draws].mean(-1))


def draw_seeds(seeds: int, draws: int = 2000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, seeds, (draws, seeds))


def _drawn(measured: Mapping[str, np.ndarray], metric: str, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The statistic of all seeds, [P], and of each draw of them, [P, D]."""
    reads, statistic = METRICS[metric]
    return statistic({name: measured[name] for name in reads}), statistic({name: measured[name][:, draws] for name in reads})


def _interval(point: float, sampled: np.ndarray) -> Interval:
    with np.errstate(invalid="ignore"):  # between infinities there is none
        low, high = np.percentile(sampled, (2.5, 97.5))
    return float(point), float(low), float(high)


def _root(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """√(part / whole), part no less than 0; infinite where nothing is left of the whole but noise."""
    heard = whole > 0
    return np.where(heard, np.sqrt(np.maximum(part, 0.0) / np.where(heard, whole, 1.0)), np.inf)
