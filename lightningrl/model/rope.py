"""Rotary position embedding (RoFormer, arXiv 2104.09864, §3.4.2), in the half-split layout that Llama and Qwen weights use."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from lightningrl.model.config import ModelConfig
from lightningrl.table import Array


def frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each rotated pair, θ^(-2i/d), with Llama 3.1's scaling where configured. float32 [head_dim / 2]."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    freq = config.rope_theta**-exponent
    if (s := config.rope_scaling) is not None:
        wavelength = 2 * math.pi / freq
        smooth = (s.original_max_positions / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        freq = (1 - smooth) * freq / s.factor + smooth * freq
    return freq.astype(np.float32)


def rotation(config: ModelConfig, positions: Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position's angles. positions: int [...]; returns float32 [..., head_dim / 2] twice."""
    angle = positions[..., None].astype(jnp.float32) * frequencies(config)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates each pair (xᵢ, xᵢ₊d/₂) by its position's angle. x: [..., head_dim]; cos, sin broadcast against [..., head_dim / 2]."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
