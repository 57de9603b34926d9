"""HGRN2: gated linear RNN with state expansion (Qin et al. 2024, arXiv 2404.07904; layer of flash-linear-attention)."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field

from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers.common import (
    ChunkSize,
    HeadOutput,
    LayerContext,
    State,
    head_size,
    recurrent_flops,
    split_heads,
    zeros_state,
)
from jaxlm.layers.mixers.hgrn import forget_gate
from jaxlm.ops.linear_attention import linear_attention
from jaxlm.params import param
from jaxlm.schema import Schema


class HGRN2Settings(Schema):
    """Linear attention whose keys are what its forget gates give away; the gates' lower bound rises with the layer."""

    op: ClassVar[str] = "linear_attention"
    kind: Literal["hgrn2"] = "hgrn2"
    head_dim: int = Field(128, gt=0, description="Channels of keys and values a head (the state expansion).")
    chunk_size: ChunkSize = 64

    def heads(self, width: int) -> int:
        return head_size(width, self.head_dim, "hgrn2: the width over head_dim, as")

    def sequence_flops(self, width: int, context: int) -> float:
        return recurrent_flops(self.heads(width), self.head_dim, self.head_dim)


class HGRN2(nnx.Module):
    """S_t = Diag(f_t) S_{t-1} + (1 - f_t)^T i_t, o_t = silu(q_t) S_t / sqrt(K), f = l + (1 - l) sigmoid(W_f x); RMSNorm(o) W_o.

    The norm takes all channels at once; there is no output gate (section 3.2; eq. 8 of the paper writes 1 - f for the key).

    The lower bound l of layer i of L is sum_{j<i} softmax(table)_j per channel in the paper, with one learned table [L, D]
    of zeros for all layers. Layers here share no parameters, so each has the row of D logits that moves its own bound:
    l = i e^logit / (i e^logit + L - i), which starts at the paper's i / L (0 in layer 0, whatever its logit). L D numbers
    are trained, as in the paper; that bounds rise with the layer holds at the start and is not enforced after.
    """

    def __init__(self, settings: HGRN2Settings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        width = context.width
        self.heads = settings.heads(width)
        self.q = Dense(width, width, axes=("embed", "heads"), rngs=rngs)
        self.forget = Dense(width, width, axes=("embed", "heads"), rngs=rngs)
        self.input = Dense(width, width, axes=("embed", "heads"), rngs=rngs)
        self.bound_logit = param(jnp.zeros(width), ("heads",), "dynamics")
        self.position = param(jnp.asarray(context.index / context.depth, jnp.float32), (), "constant")
        self.output = HeadOutput(context, width, width, gate=False, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        position = jax.lax.stop_gradient(self.position[...])
        # log l - log(1 - l), minus infinity in layer 0.
        bound = (self.bound_logit[...] + jnp.log(position) - jnp.log1p(-position)).reshape(self.heads, -1)
        q = split_heads(jax.nn.silu(self.q(x)), self.heads)
        forget = split_heads(self.forget(x), self.heads).astype(jnp.float32)
        log_f, k = forget_gate(forget, bound)
        initial = None if state is None else state["recurrent"]
        o, recurrent = linear_attention(
            q, k.astype(x.dtype), split_heads(self.input(x), self.heads), log_f,
            initial_state=initial, segment_ids=segment_ids, chunk_size=self.settings.chunk_size,
        )  # fmt: skip
        return self.output(o.reshape(*x.shape[:2], 1, -1), x), {"recurrent": recurrent}

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        return {"recurrent": zeros_state(batch, self.heads, self.settings.head_dim, self.settings.head_dim)}
