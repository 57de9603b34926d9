"""Normalisations. Statistics are always float32, the result has the input's dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxlm.params import param


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467); the scale starts at one."""

    def __init__(self, features: int, *, eps: float = 1e-6, axis: str | None = None):
        self.scale = param(jnp.ones(features), (axis,), "norm")
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * scale + bias over the last axis (Ba et al. 2016, arXiv 1607.06450)."""

    def __init__(self, features: int, *, eps: float = 1e-5, axis: str | None = None):
        self.scale = param(jnp.ones(features), (axis,), "norm")
        self.bias = param(jnp.zeros(features), (axis,), "bias")
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
