"""Retention: linear attention with a fixed decay per head (RetNet, arXiv 2307.08621; Lightning Attention-2, 2401.04658).

TransNormerLLM's layer (arXiv 2307.14995) is decay: lightning, activation: silu, output_gate: sigmoid, norm: all.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field

from jaxlm.layers.mixers.common import QKV, ChunkSize, LayerContext, State, head_size, recurrent_flops, zeros_state
from jaxlm.layers.mixers.delta import GatedOutput
from jaxlm.layers.positions import positions_in_segments, rotary
from jaxlm.ops.linear_attention import linear_attention
from jaxlm.params import param
from jaxlm.schema import Schema


class RetentionSettings(Schema):
    """Linear attention whose heads forget at fixed rates."""

    op: ClassVar[str] = "linear_attention"
    kind: Literal["retention"] = "retention"
    heads: int = Field(8, gt=0, description="Number of heads.")
    expand_k: float = Field(1.0, gt=0, description="Total key channels as a multiple of the model width.")
    expand_v: float = Field(2.0, gt=0, description="Total value channels as a multiple of the model width.")
    decay: Literal["retnet", "lightning"] = Field(
        "retnet",
        description="Log decay of head h: 'retnet' log(1 - 2^(-5-h)); 'lightning' -(8/heads) (1 - layer/depth) h.",
    )
    rope_base: float | None = Field(10_000.0, gt=1, description="Base of the rotary embedding on q and k; null for none.")
    activation: Literal["none", "silu"] = Field("none", description="What queries and keys pass through before they rotate.")
    output_gate: Literal["none", "swish", "sigmoid"] = Field(
        "swish", description="What of a projection of the layer's input multiplies the normed output."
    )
    norm: Literal["head", "all"] = Field(
        "head", description="RMSNorm of the output: of every head for itself, or of all channels at once."
    )
    convolution: int = Field(0, ge=0, description="Width of a short convolution on q, k and v; 0 for none.")
    chunk_size: ChunkSize = 64

    def sizes(self, width: int) -> tuple[int, int]:
        keys = head_size(width * self.expand_k, self.heads, "retention.expand_k")
        return keys, head_size(width * self.expand_v, self.heads, "retention.expand_v")

    def sequence_flops(self, width: int, context: int) -> float:
        return recurrent_flops(self.heads, *self.sizes(width))


def head_log_decay(kind: Literal["retnet", "lightning"], heads: int, context: LayerContext) -> Float[Array, H]:
    """Natural-log decay of every head (RetNet; TransNormerLLM, as flash-linear-attention has it)."""
    head = jnp.arange(heads, dtype=jnp.float32)
    if kind == "retnet":
        return jnp.log1p(-(2.0 ** (-5 - head)))
    return -(8 / heads) * (1 - context.index / context.depth) * head


class Retention(nnx.Module):
    """S_t = exp(g_h) S_{t-1} + k_t^T v_t, o_t = q_t S_t / sqrt(K), rotary on q and k, gated RMSNorm."""

    def __init__(self, settings: RetentionSettings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        self.key_dim, self.value_dim = settings.sizes(context.width)
        keys, values = self.key_dim * settings.heads, self.value_dim * settings.heads
        self.qkv = QKV(context.width, keys, values, settings.heads, settings.convolution, rngs=rngs)
        # Lightning's rates differ between layers, so stacked layers must carry them as an array.
        self.log_decay = param(head_log_decay(settings.decay, settings.heads, context), ("heads",), "constant")
        normed = self.value_dim if settings.norm == "head" else values
        self.output = GatedOutput(context, values, normed, gate=settings.output_gate, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        q, k, v, convolution = self.qkv(x, state, segment_ids)
        if self.settings.activation == "silu":
            q, k = jax.nn.silu(q), jax.nn.silu(k)
        start = None if state is None else state["position"]
        positions = positions_in_segments(segment_ids, x.shape[:2], start)
        if self.settings.rope_base is not None:
            q = rotary(q, positions, base=self.settings.rope_base)
            k = rotary(k, positions, base=self.settings.rope_base)
        log_decay = jnp.broadcast_to(jax.lax.stop_gradient(self.log_decay[...]), k.shape[:3])
        initial = None if state is None else state["recurrent"]
        o, recurrent = linear_attention(
            q, k, v, log_decay,
            initial_state=initial, segment_ids=segment_ids, chunk_size=self.settings.chunk_size,
        )  # fmt: skip
        if self.settings.norm == "all":
            o = o.reshape(*o.shape[:2], 1, -1)
        return self.output(o, x), {"recurrent": recurrent, "position": positions[:, -1] + 1, **convolution}

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        recurrent = zeros_state(batch, self.settings.heads, self.key_dim, self.value_dim)
        position = jnp.zeros(batch, jnp.int32)
        return {"recurrent": recurrent, "position": position, **self.qkv.init_state(batch, dtype)}
