"""Log-linear attention (Guo et al. 2025, arXiv 2506.04761)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field

from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers.common import QKV, ChunkSize, HeadOutput, LayerContext, State, head_size
from jaxlm.layers.mixers.mamba2 import dt_bias
from jaxlm.ops.log_linear import levels_for, log_linear_attention, log_linear_state
from jaxlm.parallel.context import constrain
from jaxlm.params import param
from jaxlm.schema import Schema, UserError

# Of level scales: softplus of it is 1.
LEVEL_BIAS = math.log(math.e - 1)


class LogLinearSettings(Schema):
    """Linear attention that keeps log2(T) + 1 states of doubling age and weighs them anew at each token."""

    op: ClassVar[str] = "log_linear_attention"
    kind: Literal["log_linear"] = "log_linear"
    heads: int = Field(4, gt=0, description="Number of heads.")
    expand_k: float = Field(0.5, gt=0, description="Total key channels as a multiple of the model width.")
    expand_v: float = Field(1.0, gt=0, description="Total value channels as a multiple of the model width.")
    max_length: int = Field(2048, gt=0, description="Most tokens of a row: sets the number of levels, ceil(log2) + 1.")
    output_gate: bool = Field(True, description="Multiply the normed output by swish of a projection.")
    convolution: int = Field(4, ge=0, description="Width of a short convolution on q, k and v; 0 for none.")
    chunk_size: ChunkSize = 64

    def sizes(self, width: int) -> tuple[int, int]:
        """Key and value channels a head."""
        keys = head_size(width * self.expand_k, self.heads, "log_linear.expand_k")
        return keys, head_size(width * self.expand_v, self.heads, "log_linear.expand_v")

    def sequence_flops(self, width: int, context: int) -> float:
        """2KV a head to read each level of `context` tokens, and 2KV to write."""
        keys, values = self.sizes(width)
        return 2.0 * self.heads * keys * values * (levels_for(context) + 1)


def check_length(kind: str, max_length: int, length: int) -> None:
    """Raises UserError for rows of more tokens than a mixer has levels for."""
    if length > max_length:
        raise UserError(
            f"{kind}.max_length={max_length} is less than the {length} tokens of a row; "
            f"set it to at least {length}, which adds levels (and parameters), or shorten the rows"
        )


class LogLinearAttention(nnx.Module):
    """o_t = sum_{s<=t} lambda_t[level(t, s)] exp(g_{s+1} + .. + g_t) (q_t . k_s) v_s / sqrt(K)   (eq. 4, section 3).

    g = -exp(a_log) softplus(W_a x + dt_bias) a head, as in Mamba-2; lambda = softplus(W x + level_bias) a head and level,
    which starts at 1 on average, where the layer is scalar-decay linear attention.

    Projections, head norm and gate have the shapes of GLA's. It is not the Mamba-2 block that flash-linear-attention puts
    around log-linear attention: that has rates 1 to H at the start (here uniform in 1 to 16), values times their step, a
    skip D x, its norm after the gate, scale 1 instead of 1 / sqrt(K), and levels for 16K tokens whatever the rows, weighed
    by softplus(L W x).
    """

    def __init__(self, settings: LogLinearSettings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        heads, width = settings.heads, context.width
        self.key_dim, self.value_dim = settings.sizes(width)
        self.levels = levels_for(settings.max_length)
        self.qkv = QKV(width, self.key_dim * heads, self.value_dim * heads, heads, settings.convolution, rngs=rngs)
        self.decay = Dense(width, heads, axes=("embed", "heads"), rngs=rngs)
        rates = jax.random.uniform(rngs.params(), (heads,), minval=1, maxval=16)
        self.a_log = param(jnp.log(rates), ("heads",), "dynamics")
        self.dt_bias = param(dt_bias(rngs.params(), (heads,), 1e-3, 0.1), ("heads",), "dynamics")
        self.level = Dense(width, heads * self.levels, axes=("embed", "heads"), rngs=rngs)
        self.level_bias = param(jnp.full((heads, self.levels), LEVEL_BIAS), ("heads", None), "dynamics")
        self.output = HeadOutput(context, self.value_dim * heads, self.value_dim, gate=settings.output_gate, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        check_length("log_linear", self.settings.max_length, x.shape[1])
        q, k, v, convolution = self.qkv(x, state, segment_ids)
        dt = constrain(self.decay(x), "batch", "sequence", "heads").astype(jnp.float32)
        log_decay = -jnp.exp(self.a_log[...]) * jax.nn.softplus(dt + self.dt_bias[...])
        level = constrain(self.level(x), "batch", "sequence", "heads").astype(jnp.float32)
        scales = jax.nn.softplus(level.reshape(*level.shape[:2], -1, self.levels) + self.level_bias[...])
        o, recurrent = log_linear_attention(
            q, k, v, log_decay, scales, scale=self.key_dim**-0.5,
            initial_state=None if state is None else state["recurrent"],
            segment_ids=segment_ids, chunk_size=self.settings.chunk_size,
        )  # fmt: skip
        return self.output(o, x), {"recurrent": recurrent, **convolution}

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        check_length("log_linear", self.settings.max_length, length)
        recurrent = log_linear_state(batch, self.levels, self.settings.heads, self.key_dim, self.value_dim)
        return {"recurrent": recurrent, **self.qkv.init_state(batch, dtype)}
