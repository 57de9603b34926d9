"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635; layer defaults of flash-linear-attention)."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field

from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers.common import QKV, ChunkSize, HeadOutput, LayerContext, State, head_size, recurrent_flops, zeros_state
from jaxlm.ops.linear_attention import linear_attention
from jaxlm.parallel.context import constrain
from jaxlm.schema import Schema


class GLASettings(Schema):
    """Linear attention whose state forgets per key channel, by a data-dependent gate."""

    op: ClassVar[str] = "linear_attention"
    kind: Literal["gla"] = "gla"
    heads: int = Field(4, gt=0, description="Number of heads.")
    expand_k: float = Field(0.5, gt=0, description="Total key channels as a multiple of the model width.")
    expand_v: float = Field(1.0, gt=0, description="Total value channels as a multiple of the model width.")
    gate_rank: int = Field(16, gt=0, description="Rank of the low-rank gate projection.")
    gate_normalizer: float = Field(16.0, gt=0, description="log decay = logsigmoid(gate) / gate_normalizer.")
    output_gate: bool = Field(True, description="Multiply the normed output by swish of a projection.")
    convolution: int = Field(0, ge=0, description="Width of a short convolution on q, k and v; 0 for none.")
    chunk_size: ChunkSize = 64

    def sizes(self, width: int) -> tuple[int, int]:
        keys = head_size(width * self.expand_k, self.heads, "gla.expand_k")
        return keys, head_size(width * self.expand_v, self.heads, "gla.expand_v")

    def sequence_flops(self, width: int, context: int) -> float:
        return recurrent_flops(self.heads, *self.sizes(width))


class GLA(nnx.Module):
    """S_t = Diag(exp(g_t)) S_{t-1} + k_t^T v_t, o_t = q_t S_t / sqrt(K), g_t = logsigmoid(W2 W1 x_t + b) / 16 (eq. 3, 4.4)."""

    def __init__(self, settings: GLASettings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        self.key_dim, self.value_dim = settings.sizes(context.width)
        keys, values = self.key_dim * settings.heads, self.value_dim * settings.heads
        self.qkv = QKV(context.width, keys, values, settings.heads, settings.convolution, rngs=rngs)
        self.gate_down = Dense(context.width, settings.gate_rank, axes=("embed", None), rngs=rngs)
        self.gate_up = Dense(settings.gate_rank, keys, axes=(None, "heads"), bias=True, rngs=rngs)
        self.output = HeadOutput(context, values, self.value_dim, gate=settings.output_gate, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        q, k, v, convolution = self.qkv(x, state, segment_ids)
        gate = self.gate_up(self.gate_down(x)).astype(jnp.float32).reshape(k.shape)
        log_decay = constrain(jax.nn.log_sigmoid(gate), "batch", "sequence", "heads", None) / self.settings.gate_normalizer
        initial = None if state is None else state["recurrent"]
        o, recurrent = linear_attention(
            q, k, v, log_decay,
            initial_state=initial, segment_ids=segment_ids, chunk_size=self.settings.chunk_size,
        )  # fmt: skip
        return self.output(o, x), {"recurrent": recurrent, **convolution}

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        recurrent = zeros_state(batch, self.settings.heads, self.key_dim, self.value_dim)
        return {"recurrent": recurrent, **self.qkv.init_state(batch, dtype)}
