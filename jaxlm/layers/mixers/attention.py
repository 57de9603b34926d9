"""Softmax attention with grouped queries, QK-norm, rotary positions, sliding window and output gate."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field, model_validator

from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers.common import LayerContext, State, head_size, split_heads
from jaxlm.layers.norms import RMSNorm
from jaxlm.layers.positions import positions_in_segments, rotary
from jaxlm.ops.attention import attention, init_attention_cache
from jaxlm.parallel.mesh import constrain
from jaxlm.schema import Schema


class AttentionSettings(Schema):
    """Causal softmax attention."""

    op: ClassVar[str] = "attention"
    kind: Literal["attention"] = "attention"
    heads: int = Field(8, gt=0, description="Number of query heads.")
    kv_heads: int | None = Field(None, gt=0, description="Number of key/value heads (divides heads); null: as many as heads.")
    head_dim: int | None = Field(None, gt=0, description="Channels a head; null: width / heads.")
    qk_norm: bool = Field(True, description="RMSNorm of queries and keys per head (Qwen3).")
    rope_base: float | None = Field(10_000.0, gt=1, description="Base of the rotary embedding; null for none (NoPE).")
    rope_fraction: float = Field(1.0, gt=0, le=1, description="Share of the channels that rotate.")
    window: int | None = Field(None, gt=0, description="Tokens a query sees, itself included; null for all.")
    output_gate: Literal["none", "elementwise", "headwise"] = Field(
        "none", description="Multiply the heads' output by sigmoid of a projection of the layer's input (arXiv 2505.06708)."
    )

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}")
        return self

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    def size(self, width: int) -> int:
        return self.head_dim or head_size(width, self.heads, "attention")

    def sequence_flops(self, width: int, context: int) -> float:
        # Scores and values, 2 FLOPs a product; a causal query sees (context + 1) / 2 keys on average, a windowed one fewer.
        window = min(self.window or context, context)
        keys_seen = window * (context - (window - 1) / 2) / context
        return 4.0 * self.heads * self.size(width) * keys_seen


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(K)) v with causal, document and window masks (Vaswani et al. 2017; GQA: arXiv 2305.13245)."""

    def __init__(self, settings: AttentionSettings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        self.head_dim = size = settings.size(context.width)
        width, total, grouped = context.width, settings.heads * size, settings.groups * size
        self.q = Dense(width, total, axes=("embed", "heads"), rngs=rngs)
        self.k = Dense(width, grouped, axes=("embed", "kv_heads"), rngs=rngs)
        self.v = Dense(width, grouped, axes=("embed", "kv_heads"), rngs=rngs)
        self.q_norm = RMSNorm(size) if settings.qk_norm else None
        self.k_norm = RMSNorm(size) if settings.qk_norm else None
        gates = {"none": 0, "elementwise": total, "headwise": settings.heads}[settings.output_gate]
        self.gate = Dense(width, gates, axes=("embed", "heads"), rngs=rngs) if gates else None
        self.output = Dense(total, width, axes=("heads", "embed"), gain=context.output_gain, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State | None]:
        settings = self.settings
        q = split_heads(self.q(x), settings.heads)
        k = split_heads(self.k(x), settings.groups, "kv_heads")
        v = split_heads(self.v(x), settings.groups, "kv_heads")
        if settings.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        start = None if state is None else state["position"]
        positions = positions_in_segments(segment_ids, x.shape[:2], start)
        if settings.rope_base is not None:
            q = rotary(q, positions, base=settings.rope_base, fraction=settings.rope_fraction)
            k = rotary(k, positions, base=settings.rope_base, fraction=settings.rope_fraction)
        cache = None if state is None else state["cache"]
        o, cache = attention(
            q, k, v, window=settings.window, segment_ids=segment_ids, positions=positions, cache=cache
        )
        o = constrain(o, "batch", "sequence", "heads", None)
        if self.gate is not None:
            o = o * jax.nn.sigmoid(self.gate(x)).reshape(*o.shape[:3], -1)
        y = self.output(o.reshape(*x.shape[:2], -1))
        return y, None if cache is None else {"cache": cache, "position": positions[:, -1] + 1}

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        slots = min(length, self.settings.window or length)
        cache = init_attention_cache(batch, slots, self.settings.groups, self.head_dim, dtype)
        return {"cache": cache, "position": jnp.zeros(batch, jnp.int32)}
