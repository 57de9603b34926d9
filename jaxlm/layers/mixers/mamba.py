"""Mamba-1: selective state space layer (Gu and Dao 2023, arXiv 2312.00752)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field

from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers.common import ChunkSize, LayerContext, State, head_size
from jaxlm.ops.convolution import short_convolution
from jaxlm.ops.diagonal import selective_scan
from jaxlm.parallel.context import constrain
from jaxlm.params import param
from jaxlm.schema import Schema


class MambaSettings(Schema):
    """Selective scan: a recurrence whose step size, input and read-out depend on the token."""

    op: ClassVar[str] = "diagonal_recurrence"
    kind: Literal["mamba"] = "mamba"
    state: int = Field(16, gt=0, description="N, states a channel.")
    expand: float = Field(2.0, gt=0, description="Channels as a multiple of the model width.")
    convolution: int = Field(4, gt=0, description="Width of the short convolution in front of the scan.")
    dt_rank: int | None = Field(None, gt=0, description="Rank of the step size's projection; null for width / 16, rounded up.")
    dt_min: float = Field(1e-3, gt=0, description="Smallest step size at the start.")
    dt_max: float = Field(0.1, gt=0, description="Largest step size at the start; between them log-uniform.")
    produces: Literal["memory"] | None = Field(
        None, description="memory: gated memory units in later blocks read the scan's output (SambaY)."
    )
    chunk_size: ChunkSize = 64

    def size(self, width: int) -> int:
        return head_size(width * self.expand, 1, "mamba.expand")

    def rank(self, width: int) -> int:
        return self.dt_rank or math.ceil(width / 16)

    def sequence_flops(self, width: int, context: int) -> float:
        """dt A, dt u B, the update (2) and the read-out (2) for every state of every channel."""
        return 6.0 * self.state * self.size(width)


class Mamba(nnx.Module):
    """u, z = W_in x; u = silu(conv(u)); h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, m_t = C_t h_t + D u_t; (m silu(z)) W_out.

    dt = softplus(W_dt W_r u + dt_bias), B = W_B u, C = W_C u, A = -exp(A_log) (section 3.4; authors' `mamba_simple.py`).
    """

    def __init__(self, settings: MambaSettings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        size, rank, states = settings.size(context.width), settings.rank(context.width), settings.state
        # Two projections, not one of twice the width: its halves would not align with a mesh's shards.
        self.input = Dense(context.width, size, axes=("embed", "heads"), rngs=rngs)
        self.gate = Dense(context.width, size, axes=("embed", "heads"), rngs=rngs)
        bound = settings.convolution**-0.5
        uniform = lambda *shape: jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)  # noqa: E731
        self.convolution = param(uniform(settings.convolution, size), (None, "heads"), "convolution")
        self.convolution_bias = param(uniform(size), ("heads",), "bias")
        self.select = Dense(size, rank + 2 * states, axes=("heads", None), rngs=rngs)
        # The variance of the reference's uniform(-rank^-1/2, rank^-1/2).
        self.dt = Dense(rank, size, axes=(None, "heads"), gain=3**-0.5, rngs=rngs)
        low, high = math.log(settings.dt_min), math.log(settings.dt_max)
        dt = jnp.exp(jax.random.uniform(rngs.params(), (size,), minval=low, maxval=high))
        # The inverse of softplus.
        self.dt_bias = param(dt + jnp.log(-jnp.expm1(-dt)), ("heads",), "dynamics")
        rates = jnp.log(jnp.arange(1, states + 1, dtype=jnp.float32))
        self.a_log = param(jnp.tile(rates, (size, 1)), ("heads", None), "dynamics")
        self.skip = param(jnp.ones(size), ("heads",), "dynamics")
        self.output = Dense(size, context.width, axes=("heads", "embed"), gain=context.output_gain, rngs=rngs)

    def with_memory(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State, Float[Array, "B T 2D"]]:
        """As a call, and the scan's output m with the skip, before the gate: what gated memory units read (SambaY,
        arXiv 2507.06607)."""
        u, convolution = short_convolution(
            constrain(self.input(x), "batch", "sequence", "heads"),
            self.convolution[...].astype(x.dtype), self.convolution_bias[...].astype(x.dtype),
            state=None if state is None else state["convolution"], segment_ids=segment_ids, activation="silu",
        )  # fmt: skip
        rank, states = self.settings.rank(x.shape[-1]), self.settings.state
        dt, b, c = jnp.split(self.select(u), (rank, rank + states), axis=-1)
        dt = jax.nn.softplus(self.dt(dt).astype(jnp.float32) + self.dt_bias[...])
        y, recurrent = selective_scan(
            u.astype(jnp.float32), dt, -jnp.exp(self.a_log[...]), b, c,
            initial_state=None if state is None else state["recurrent"],
            segment_ids=segment_ids, chunk_size=self.settings.chunk_size,
        )  # fmt: skip
        memory = (y + self.skip[...] * u).astype(x.dtype)
        y = self.output(memory * jax.nn.silu(self.gate(x)))
        return y, {"recurrent": recurrent, "convolution": convolution}, memory

    def exchange(
        self, x: Float[Array, "B T D"], state: State | None, segment_ids: Int[Array, "B T"] | None, shared: None
    ) -> tuple[Float[Array, "B T D"], State, Float[Array, "B T 2D"]]:
        return self.with_memory(x, state, segment_ids)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        y, state, _ = self.with_memory(x, state, segment_ids)
        return y, state

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        channels = self.skip.shape[-1]
        recurrent = jnp.zeros((batch, channels, self.settings.state), jnp.float32)
        return {"recurrent": recurrent, "convolution": jnp.zeros((batch, self.settings.convolution - 1, channels), dtype)}
