"""The GPU kernel in interpret mode, and lowered for a GPU without one. In float32 also: test_attention.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from lightningrl.model.attention_pallas import attend_pallas
from tests.model.tries import loops, random_row


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "head_dim"), [(1, 16), (3, 24)], ids=["d 16", "d 24, padded to 32"])
def test_bfloat16_in_float32_sums(groups: int, head_dim: int) -> None:
    q, k, v, dout, end = random_row(np.random.default_rng(0), groups=groups, length=40, head_dim=head_dim)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, dout)]
    expected = loops(*(np.asarray(x, np.float64) for x in low[:3]), end, np.asarray(low[3], np.float64))

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> tuple[jax.Array, ...]:
        out, pullback = jax.vjp(lambda q, k, v: attend_pallas(q, k, v, end, block=16), q, k, v)
        return out, *pullback(dout)

    for a, b in zip(run(*low), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.bfloat16
        # Weights, ds and the result are rounded to 8 bits, 2⁻⁹ of each; the sums between are exact in comparison.
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=3 * 2**-9 * np.abs(b).max())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_it_lowers_to_triton(dtype: jnp.dtype) -> None:
    """All three kernels, at the shapes of a 7B policy. What compiles and runs them needs a GPU."""

    def gradient(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array) -> tuple[jax.Array, ...]:
        return jax.grad(lambda *x: jnp.sum(attend_pallas(*x, end, interpret=False).astype(jnp.float32)), argnums=(0, 1, 2))(q, k, v)

    q, k = jax.ShapeDtypeStruct((2, 4, 7, 512, 128), dtype), jax.ShapeDtypeStruct((2, 4, 512, 128), dtype)
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")  # asked for from jax 0.12 on
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(gradient).trace(q, k, k, jax.ShapeDtypeStruct((2, 512), jnp.int32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("forward", "dq", "dkv"):
        assert text.count(f'name = "tree_attention_{kernel}"') == 1


def test_what_the_kernel_cannot_take_is_refused() -> None:
    q, k, v, _, end = random_row(np.random.default_rng(0), length=16)
    with pytest.raises(ValueError, match="block=24 must be a power of two of at least 16"):
        attend_pallas(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), end, block=24)
    with jax.enable_x64(True), pytest.raises(ValueError, match="float64 is for attend_blocks or attend_dense"):
        attend_pallas(*(jnp.asarray(x) for x in (q, k, v)), end)
