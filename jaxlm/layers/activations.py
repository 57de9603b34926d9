"""Pointwise functions by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Feature maps of linear attention: what queries and keys pass through before the recurrence.
FEATURE_MAPS = {
    "identity": lambda x: x,
    "elu1": lambda x: jax.nn.elu(x) + 1,
    "relu": jax.nn.relu,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
}
