"""Mamba-2: state space duality (Dao and Gu 2024, arXiv 2405.21060; the authors' `modules/mamba2.py`)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field, model_validator

from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers.common import (
    ChunkSize,
    LayerContext,
    State,
    head_size,
    recurrent_flops,
    split_heads,
    zeros_state,
)
from jaxlm.ops.convolution import short_convolution
from jaxlm.ops.linear_attention import linear_attention
from jaxlm.parallel.context import constrain
from jaxlm.params import param
from jaxlm.schema import Schema


class Mamba2Settings(Schema):
    """Selective state space whose heads forget at one data-dependent rate each."""

    op: ClassVar[str] = "linear_attention"
    kind: Literal["mamba2"] = "mamba2"
    expand: float = Field(2.0, gt=0, description="Channels as a multiple of the model width.")
    head_dim: int = Field(64, gt=0, description="Channels a head.")
    state: int = Field(128, gt=0, description="N, states a channel.")
    groups: int = Field(1, gt=0, description="Groups of heads that share B and C, and that are normed each for itself.")
    convolution: int = Field(4, gt=0, description="Width of the short convolution in front of the scan.")
    a_min: float = Field(1.0, gt=0, description="Smallest rate -A at the start.")
    a_max: float = Field(16.0, gt=0, description="Largest rate -A at the start; between them uniform.")
    dt_min: float = Field(1e-3, gt=0, description="Smallest step size at the start.")
    dt_max: float = Field(0.1, gt=0, description="Largest step size at the start; between them log-uniform.")
    produces: Literal["memory"] | None = Field(
        None,
        description="memory: gated memory units in later blocks read the heads' output before gate and norm; give them a norm.",
    )
    chunk_size: ChunkSize = 64

    @model_validator(mode="after")
    def _ranges_ascend(self):
        for low, high in (("a_min", "a_max"), ("dt_min", "dt_max")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low}={getattr(self, low)} is above {high}={getattr(self, high)}; swap them")
        return self

    def heads(self, width: int) -> int:
        """Number of heads.

        Raises:
          UserError: if the groups do not divide it, or it is not whole.
        """
        heads = head_size(width * self.expand, self.head_dim, "mamba2.expand over head_dim, as")
        head_size(heads, self.groups, "mamba2.groups: heads over groups, as")
        return heads

    def sequence_flops(self, width: int, context: int) -> float:
        return recurrent_flops(self.heads(width), self.state, self.head_dim)


def dt_bias(key: Array, shape: tuple[int, ...], low: float, high: float) -> Float[Array, "*X"]:
    """Biases b with softplus(b) log-uniform in [low, high]: the initial step sizes of Mamba, also of delta rules."""
    dt = jnp.exp(jax.random.uniform(key, shape, minval=math.log(low), maxval=math.log(high)))
    return dt + jnp.log(-jnp.expm1(-dt))


class Mamba2(nnx.Module):
    """S_t = exp(dt_t A) S_{t-1} + B_t^T (dt_t x_t), y_t = C_t S_t + D x_t a head; RMSNorm(y silu(z)) W_out (section 7).

    x, B, C = silu(conv(W x)), with a bias; dt = softplus(W_dt x + dt_bias), A = -exp(a_log). The gate comes before the
    norm, which takes each group's channels for itself. Heads of a group share B and C (section 7.2).
    """

    def __init__(self, settings: Mamba2Settings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        width, heads = context.width, settings.heads(context.width)
        size, shared = heads * settings.head_dim, 2 * settings.groups * settings.state
        # Projections of their own, not one cut in five: its parts would not align with a mesh's shards.
        self.x = Dense(width, size, axes=("embed", "heads"), rngs=rngs)
        self.gate = Dense(width, size, axes=("embed", "heads"), rngs=rngs)
        self.bc = Dense(width, shared, axes=("embed", None), rngs=rngs)
        self.dt = Dense(width, heads, axes=("embed", "heads"), rngs=rngs)
        bound = settings.convolution**-0.5
        uniform = lambda *shape: jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)  # noqa: E731
        self.x_convolution = param(uniform(settings.convolution, size), (None, "heads"), "convolution")
        self.x_bias = param(uniform(size), ("heads",), "bias")
        self.bc_convolution = param(uniform(settings.convolution, shared), (None, None), "convolution")
        self.bc_bias = param(uniform(shared), (None,), "bias")
        rates = jax.random.uniform(rngs.params(), (heads,), minval=settings.a_min, maxval=settings.a_max)
        self.a_log = param(jnp.log(rates), ("heads",), "dynamics")
        self.dt_bias = param(dt_bias(rngs.params(), (heads,), settings.dt_min, settings.dt_max), ("heads",), "dynamics")
        self.skip = param(jnp.ones(heads), ("heads",), "dynamics")
        self.norm_scale = param(jnp.ones(size), ("heads",), "norm")
        self.output = Dense(size, width, axes=("heads", "embed"), gain=context.output_gain, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        y, state, _ = self.exchange(x, state, segment_ids, None)
        return y, state

    def exchange(
        self, x: Float[Array, "B T D"], state: State | None, segment_ids: Int[Array, "B T"] | None, shared: None
    ) -> tuple[Float[Array, "B T D"], State, Float[Array, "B T M"]]:
        """As a call, and the heads' y_t with the skip, before gate and norm: what normed gated memory units read (SambaY,
        arXiv 2507.06607, section 2)."""
        settings, heads = self.settings, self.skip.shape[-1]
        before = state or dict.fromkeys(("recurrent", "x", "bc"))

        def convolve(u, weight, bias, name):
            weight, bias = weight[...].astype(x.dtype), bias[...].astype(x.dtype)
            return short_convolution(u, weight, bias, state=before[name], segment_ids=segment_ids, activation="silu")

        u, x_state = convolve(constrain(self.x(x), "batch", "sequence", "heads"), self.x_convolution, self.x_bias, "x")
        bc, bc_state = convolve(self.bc(x), self.bc_convolution, self.bc_bias, "bc")
        u = split_heads(u, heads)
        b, c = (
            constrain(jnp.repeat(part, heads // settings.groups, axis=2), "batch", "sequence", "heads", None)
            for part in jnp.split(bc.reshape(*bc.shape[:2], 2 * settings.groups, settings.state), 2, axis=2)
        )
        dt = constrain(self.dt(x), "batch", "sequence", "heads").astype(jnp.float32)
        dt = jax.nn.softplus(dt + self.dt_bias[...])
        y, recurrent = linear_attention(
            c, b, (dt[..., None] * u).astype(x.dtype), -dt * jnp.exp(self.a_log[...]), scale=1.0,
            initial_state=before["recurrent"], segment_ids=segment_ids, chunk_size=settings.chunk_size,
        )  # fmt: skip
        memory = (y + self.skip[...][:, None] * u).astype(x.dtype).reshape(*x.shape[:2], -1)
        y = self.output(self._norm(memory * jax.nn.silu(self.gate(x))))
        return y, {"recurrent": recurrent, "x": x_state, "bc": bc_state}, memory

    def _norm(self, y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        parts = y.astype(jnp.float32).reshape(*y.shape[:2], self.settings.groups, -1)
        parts = parts * jax.lax.rsqrt(jnp.mean(parts**2, axis=-1, keepdims=True) + 1e-5)
        return (parts.reshape(y.shape) * self.norm_scale[...]).astype(y.dtype)

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        settings, heads = self.settings, self.skip.shape[-1]
        past = lambda weight: jnp.zeros((batch, weight.shape[-2] - 1, weight.shape[-1]), dtype)  # noqa: E731
        recurrent = zeros_state(batch, heads, settings.state, settings.head_dim)
        return {"recurrent": recurrent, "x": past(self.x_convolution), "bc": past(self.bc_convolution)}
