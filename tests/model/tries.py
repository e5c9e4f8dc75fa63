"""Random tries as rows, and attention over them by loops in float64."""

from __future__ import annotations

import math

import numpy as np

Gradients = tuple[np.ndarray, np.ndarray, np.ndarray]


def random_end(rng: np.random.Generator, length: int) -> np.ndarray:
    """`end` of a row of random tries: trunks that branch, chains, single tokens, and padding (0) after them, or none."""
    end = np.zeros(length, np.int32)

    def grow(lo: int, hi: int) -> None:
        trunk = int(rng.integers(1, hi - lo + 1))
        end[lo : lo + trunk] = hi
        cuts = np.unique(rng.integers(lo + trunk, hi + 1, int(rng.integers(0, 4))))
        for a, b in zip([lo + trunk, *cuts], [*cuts, hi], strict=True):
            if a < b:
                grow(int(a), int(b))

    at, filled = 0, int(rng.integers(0, length + 1)) if rng.random() < 0.7 else length
    while at < filled:
        root = int(rng.integers(at + 1, filled + 1))
        grow(at, root)
        at = root
    return end


def random_row(
    rng: np.random.Generator, *, rows: int = 2, kv_heads: int = 2, groups: int = 2, length: int = 50, head_dim: int = 8
) -> tuple[np.ndarray, ...]:
    """q, k, v and the output's gradient, float64, and end."""
    q, dout = rng.normal(size=(2, rows, kv_heads, groups, length, head_dim))
    k, v = rng.normal(size=(2, rows, kv_heads, length, head_dim))
    return q, k, v, dout, np.stack([random_end(rng, length) for _ in range(rows)])


def seen(end: np.ndarray, j: int) -> list[int]:
    """Whom token j of one row sees."""
    return [i for i in range(j + 1) if j < end[i] or i == j]


def loops(q: np.ndarray, k: np.ndarray, v: np.ndarray, end: np.ndarray, dout: np.ndarray) -> tuple[np.ndarray, Gradients]:
    """out and (dq, dk, dv), token by token: with p the softmax of one token, ds = p (dp − Σ p dp) and dp = do · v."""
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    root = 1 / math.sqrt(q.shape[-1])
    for b, h, g, j in np.ndindex(*q.shape[:-1]):
        i = seen(end[b], j)
        weights = np.exp(k[b, h, i] @ q[b, h, g, j] * root)
        p = weights / weights.sum()
        out[b, h, g, j] = p @ v[b, h, i]
        dp = v[b, h, i] @ dout[b, h, g, j]
        ds = p * (dp - p @ dp)
        dq[b, h, g, j] = ds @ k[b, h, i] * root
        dk[b, h, i] += ds[:, None] * q[b, h, g, j] * root
        dv[b, h, i] += p[:, None] * dout[b, h, g, j]
    return out, (dq, dk, dv)
