"""Inputs of the delta rule that are hard for its kernels, and what the recurrent form makes of them."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ops.delta_rule import _run
from tests.pallas_kernels import linear_attention
from tests.pallas_kernels.linear_attention import assert_all_close

NAMES = ("o", "final state", "dq", "dk", "dv", "dbeta", "dg", "d state")
KINDS = ("none", "scalar", "vector")
TOLERANCES = {
    "float32": dict.fromkeys(NAMES, 5e-6),
    "bfloat16": linear_attention.TOLERANCES["bfloat16"] | {"dbeta": 0.02},
}


def arrays(kind, T, H, K, V, *, B=2, dtype="float32", seed=0, most=1.0):
    """As for linear attention, with keys of length 1 and beta from 0 to `most`."""
    (q, k, v, g), *rest = linear_attention.arrays(kind, T, H, K, V, B=B, dtype=dtype, seed=seed)
    k = k.astype(jnp.float32)
    k = (k / jnp.linalg.norm(k, axis=-1, keepdims=True)).astype(dtype)
    beta = jnp.asarray(np.random.default_rng(seed + 1).uniform(0, most, size=(B, T, H, 1)), jnp.float32)
    return (q, k, v, beta, g), *rest


@jax.jit
def reference(inputs, reset, state, do, d_final):
    """The same of the recurrent form in float32, on the same values."""
    inputs = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    scale = inputs[0].shape[-1] ** -0.5

    def recurrent(q, k, v, beta, g, state):
        return _run(scale, "recurrent", 16, (q, k, v, beta, None, g), reset, state)

    (o, final), pull = jax.vjp(recurrent, *inputs, state)
    return o, final, *pull((do.astype(jnp.float32), d_final))


def assert_close(got, expected, dtype, **others):
    """Outputs and gradients of the delta rule; `others` are other tolerances."""
    assert_all_close(got, expected, NAMES, TOLERANCES[dtype] | others)
