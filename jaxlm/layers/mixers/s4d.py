"""S4D: the diagonal structured state space model (Gu et al. 2022, arXiv 2206.11893; the authors' minimal s4d.py)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field, field_validator

from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers.common import ChunkSize, LayerContext, State
from jaxlm.ops.diagonal import diagonal_ssm
from jaxlm.parallel.context import constrain
from jaxlm.params import param
from jaxlm.schema import Schema


class S4DSettings(Schema):
    """Time-invariant linear filter of every channel with N states, then GELU and a gated linear unit over channels."""

    op: ClassVar[str] = "diagonal_recurrence"
    kind: Literal["s4d"] = "s4d"
    state: int = Field(64, gt=0, description="N, states a channel, kept as N/2 conjugate pairs: even.")
    initialisation: Literal["lin", "inv", "real"] = Field(
        "lin",
        description="A_n at the start: 'lin' -1/2 + i pi n; 'inv' -1/2 + i N/pi (N/(2n+1) - 1); 'real' -(n+1).",
    )
    discretisation: Literal["zoh", "bilinear"] = Field("zoh", description="How continuous A and B become a step.")
    dt_min: float = Field(1e-3, gt=0, description="Smallest step size at the start.")
    dt_max: float = Field(0.1, gt=0, description="Largest step size at the start; between them log-uniform.")
    chunk_size: ChunkSize = 64

    @field_validator("state")
    @classmethod
    def _even(cls, state: int) -> int:
        if state % 2:
            raise ValueError(f"s4d.state={state} is odd; states come in conjugate pairs, use {state + 1}")
        return state

    def sequence_flops(self, width: int, context: int) -> float:
        """A complex factor (6), the input (1) and the real part of a complex read-out (4) for each of N/2 states."""
        return 5.5 * self.state * width


def initial_rates(initialisation: str, state: int) -> Float[Array, "2 N/2"]:
    """-Re A_n and Im A_n for n = 0 .. N/2 - 1 (section 4; S4D-Lin, S4D-Inv, S4D-Real)."""
    n = jnp.arange(state // 2, dtype=jnp.float32)
    if initialisation == "real":
        return jnp.stack([n + 1, jnp.zeros_like(n)])
    imaginary = math.pi * n if initialisation == "lin" else state / math.pi * (state / (2 * n + 1) - 1)
    return jnp.stack([jnp.full_like(n, 0.5), imaginary])


class S4DFilter(nnx.Module):
    """x' = A x + u, y = 2 Re(C x) + D u in each channel, discretised with its own step dt.

    A = -exp(log_a_real) + i a_imag, B = 1. Rates and step sizes are "dynamics" (no weight decay; the paper trains them
    with a smaller learning rate); C, the filter's weights, is a depthwise "convolution".
    """

    def __init__(self, settings: S4DSettings, channels: int, *, rngs: nnx.Rngs):
        self.settings = settings
        pairs = settings.state // 2
        low, high = math.log(settings.dt_min), math.log(settings.dt_max)
        self.log_dt = param(jax.random.uniform(rngs.params(), (channels,), minval=low, maxval=high), ("heads",), "dynamics")
        real, imaginary = initial_rates(settings.initialisation, settings.state)
        self.log_a_real = param(jnp.tile(jnp.log(real), (channels, 1)), ("heads", None), "dynamics")
        self.a_imag = param(jnp.tile(imaginary, (channels, 1)), ("heads", None), "dynamics")
        # Complex standard normal: real and imaginary parts of variance 1/2.
        c = 0.5**0.5 * jax.random.normal(rngs.params(), (channels, 2, pairs))
        self.c = param(c, ("heads", None, None), "convolution")
        self.skip = param(jax.random.normal(rngs.params(), (channels,)), ("heads",), "dynamics")

    def discretise(self) -> tuple[Float[Array, "D 2 N/2"], Float[Array, "D 2 N/2"]]:
        """The factor Abar and the read-out 2 C Bbar of one step, as pairs (real, imaginary).

        "zoh": Abar = exp(dt A), Bbar = (Abar - 1) / A. "bilinear": Abar = (1 + dt A / 2) / (1 - dt A / 2),
        Bbar = dt / (1 - dt A / 2).
        """
        dt = jnp.exp(self.log_dt[...])[:, None]
        real, imaginary = -jnp.exp(self.log_a_real[...]), self.a_imag[...]
        x, y = dt * real, dt * imaginary
        if self.settings.discretisation == "zoh":
            grown = jnp.exp(x)
            a = grown * jnp.cos(y), grown * jnp.sin(y)
            # exp(x + iy) - 1 without the cancellation, which would leave slow states few digits.
            less_one = jnp.expm1(x) * jnp.cos(y) - 2 * jnp.sin(y / 2) ** 2, a[1]
            b = _divide(less_one, (real, imaginary))
        else:
            below = 1 - x / 2, -y / 2
            a, b = _divide((1 + x / 2, y / 2), below), _divide((dt, jnp.zeros_like(y)), below)
        c_real, c_imag = self.c[..., 0, :], self.c[..., 1, :]
        read = c_real * b[0] - c_imag * b[1], c_real * b[1] + c_imag * b[0]
        return jnp.stack(a, axis=1), 2 * jnp.stack(read, axis=1)


class S4D(S4DFilter):
    """W y of `S4DFilter`'s y after GELU, with a gated linear unit over channels."""

    def __init__(self, settings: S4DSettings, context: LayerContext, *, rngs: nnx.Rngs):
        super().__init__(settings, context.width, rngs=rngs)
        width = context.width
        self.output = Dense(
            width, 2 * width, axes=("heads", "embed"), bias=True, gain=context.output_gain, rngs=rngs
        )  # fmt: skip

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        a, c = self.discretise()
        u = constrain(x, "batch", "sequence", "heads").astype(jnp.float32)
        y, recurrent = diagonal_ssm(
            u, a, c,
            initial_state=None if state is None else state["recurrent"],
            segment_ids=segment_ids,
            chunk_size=self.settings.chunk_size,
        )  # fmt: skip
        y = jax.nn.gelu(y + self.skip[...] * u, approximate=False).astype(x.dtype)
        value, gate = jnp.split(self.output(y), 2, axis=-1)
        return value * jax.nn.sigmoid(gate), {"recurrent": recurrent}

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        return {"recurrent": jnp.zeros((batch, *self.c.shape[-3:]), jnp.float32)}


def _divide(x: tuple[Array, Array], y: tuple[Array, Array]) -> tuple[Array, Array]:
    """x / y of complex numbers as (real, imaginary)."""
    square = y[0] ** 2 + y[1] ** 2
    return (x[0] * y[0] + x[1] * y[1]) / square, (x[1] * y[0] - x[0] * y[1]) / square
