"""Depthwise short convolution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlm.ops.convolution import short_convolution
from jaxlm.params import param


class ShortConvolution(nnx.Module):
    """Causal depthwise convolution over the last few tokens followed by silu, restarting at documents."""

    def __init__(self, channels: int, width: int, *, axis: str | None, rngs: nnx.Rngs):
        bound = width**-0.5
        weight = jax.random.uniform(rngs.params(), (width, channels), minval=-bound, maxval=bound)
        self.weight = param(weight, (None, axis), "convolution")

    def __call__(
        self, x: Float[Array, "B T D"], state: Float[Array, "B W-1 D"] | None, segment_ids: Int[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
        weight = self.weight[...].astype(x.dtype)
        return short_convolution(x, weight, state=state, segment_ids=segment_ids, activation="silu")

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike) -> Float[Array, "B W-1 D"]:
        width, channels = self.weight.shape[-2:]
        return jnp.zeros((batch, width - 1, channels), dtype)
