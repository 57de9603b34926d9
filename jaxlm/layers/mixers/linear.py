"""Linear attention without decay (Katharopoulos et al. 2020, arXiv 2006.16236), with a choice of feature maps."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field, model_validator

from jaxlm.layers.activations import FEATURE_MAPS
from jaxlm.layers.mixers.common import QKV, ChunkSize, HeadOutput, LayerContext, State, head_size, recurrent_flops, zeros_state
from jaxlm.ops.linear_attention import linear_attention
from jaxlm.schema import Schema

POSITIVE_FEATURES = ("elu1", "relu", "squared_relu", "softmax")


class LinearSettings(Schema):
    """Linear attention that never forgets."""

    op: ClassVar[str] = "linear_attention"
    kind: Literal["linear"] = "linear"
    heads: int = Field(8, gt=0, description="Number of heads.")
    expand_k: float = Field(1.0, gt=0, description="Total key channels as a multiple of the model width.")
    expand_v: float = Field(1.0, gt=0, description="Total value channels as a multiple of the model width.")
    feature_map: Literal["identity", "elu1", "relu", "squared_relu", "silu", "softmax"] = Field(
        "elu1", description="What queries and keys pass through."
    )
    normalizer: bool = Field(False, description="Divide by q_t . sum of keys (needs positive features).")
    output_gate: bool = Field(False, description="Multiply the normed output by swish of a projection.")
    convolution: int = Field(0, ge=0, description="Width of a short convolution on q, k and v; 0 for none.")
    chunk_size: ChunkSize = 64

    @model_validator(mode="after")
    def _normalizer_needs_positive_features(self):
        if self.normalizer and self.feature_map not in POSITIVE_FEATURES:
            raise ValueError(
                f"normalizer=true divides by a sum that feature_map={self.feature_map} lets reach zero; "
                f"use one of {', '.join(POSITIVE_FEATURES)}"
            )
        return self

    def sizes(self, width: int) -> tuple[int, int]:
        keys = head_size(width * self.expand_k, self.heads, "linear.expand_k")
        return keys, head_size(width * self.expand_v, self.heads, "linear.expand_v")

    def sequence_flops(self, width: int, context: int) -> float:
        keys, values = self.sizes(width)
        return recurrent_flops(self.heads, keys, values + self.normalizer)


class LinearAttention(nnx.Module):
    """S_t = S_{t-1} + f(k_t)^T v_t, o_t = f(q_t) S_t (eq. 16-20), then per-head RMSNorm."""

    def __init__(self, settings: LinearSettings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        self.key_dim, self.value_dim = settings.sizes(context.width)
        keys, values = self.key_dim * settings.heads, self.value_dim * settings.heads
        self.qkv = QKV(context.width, keys, values, settings.heads, settings.convolution, rngs=rngs)
        self.output = HeadOutput(context, values, self.value_dim, gate=settings.output_gate, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        q, k, v, convolution = self.qkv(x, state, segment_ids)
        feature_map = FEATURE_MAPS[self.settings.feature_map]
        q, k = feature_map(q), feature_map(k)
        if self.settings.normalizer:
            # A column of ones among the values makes the recurrence carry the sum of keys beside S.
            v = jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), v.dtype)], axis=-1)
        initial = None if state is None else state["recurrent"]
        o, recurrent = linear_attention(
            q, k, v, initial_state=initial, segment_ids=segment_ids, chunk_size=self.settings.chunk_size
        )
        if self.settings.normalizer:
            o = o[..., :-1] / (o[..., -1:] + 1e-10)
        return self.output(o, x), {"recurrent": recurrent, **convolution}

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        values = self.value_dim + self.settings.normalizer
        recurrent = zeros_state(batch, self.settings.heads, self.key_dim, values)
        return {"recurrent": recurrent, **self.qkv.init_state(batch, dtype)}
